//! Connections over TCP whose `Hello` has not been accepted yet. One network may have few of them at
//! a time, so that nobody without a token can take all the places there are.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One network's share of all connections: a sixteenth, and never less than this.
const LEAST: u32 = 4;
const SHARE: u32 = 16;

/// Who is there, by network: an IPv4 address, or the first 64 bits of an IPv6 one (RFC 6177: a
/// site has them to itself).
#[derive(Clone, Debug, Default)]
pub(crate) struct Strangers(Arc<Mutex<HashMap<IpAddr, u32>>>);

/// One connection's place; it is given back when this goes.
#[derive(Debug)]
pub(crate) struct Stranger {
    all: Strangers,
    network: IpAddr,
}

impl Strangers {
    /// A place for a connection from `address`, where `max_connections` may be open in all.
    pub(crate) fn take(&self, address: IpAddr, max_connections: u32) -> Option<Stranger> {
        let network = network(address);
        let most = (max_connections / SHARE).max(LEAST);
        let mut counts = self.lock();
        let count = counts.entry(network).or_insert(0);
        if *count >= most {
            return None;
        }
        *count = count.saturating_add(1);
        drop(counts);
        Some(Stranger {
            all: self.clone(),
            network,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.all.lock().entry(self.network) {
            *count.get_mut() = count.get().saturating_sub(1);
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_has_its_share_and_leaves_the_rest_to_others() {
        let strangers = Strangers::default();
        let take = |text| strangers.take(at(text), 64);
        let mut held: Vec<_> = (0..4).map(|_| take("192.0.2.1").unwrap()).collect();
        assert!(take("192.0.2.1").is_none());
        assert!(take("::ffff:192.0.2.1").is_none(), "the same address");
        assert!(take("192.0.2.2").is_some());
        held.pop();
        assert!(take("192.0.2.1").is_some());
    }

    #[test]
    fn a_site_with_ipv6_is_one_network() {
        let strangers = Strangers::default();
        let held: Vec<_> = (0..4)
            .map(|host| {
                strangers
                    .take(at(&format!("2001:db8::{host}")), 64)
                    .unwrap()
            })
            .collect();
        assert!(strangers.take(at("2001:db8::ff:1"), 64).is_none());
        assert!(strangers.take(at("2001:db8:0:1::1"), 64).is_some());
        drop(held);
        assert!(strangers.lock().is_empty(), "nobody is remembered");
    }
}
