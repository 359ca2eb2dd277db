//! How many connections may be open, over all and by network. A place is taken before anything is
//! read and given back when the connection has ended; nobody is remembered after that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::api::strangers::network;

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Places(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: u32,
    by_network: HashMap<IpAddr, u32>,
}

/// One connection's place.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    network: IpAddr,
}

impl Places {
    /// A place for a connection from `address`.
    pub(crate) fn take(
        self: &Arc<Self>,
        address: IpAddr,
        most: u32,
        most_per_network: u32,
    ) -> Option<Place> {
        let network = network(address);
        let mut taken = self.lock();
        if taken.all >= most {
            return None;
        }
        let count = taken.by_network.entry(network).or_insert(0);
        if *count >= most_per_network {
            return None;
        }
        *count = count.saturating_add(1);
        taken.all = taken.all.saturating_add(1);
        Some(Place {
            places: Arc::clone(self),
            network,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all = taken.all.saturating_sub(1);
        if let Entry::Occupied(mut count) = taken.by_network.entry(self.network) {
            *count.get_mut() = count.get().saturating_sub(1);
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_by_network_and_over_all_and_come_back() {
        let places = Arc::new(Places::default());
        let take = |text: &str| places.take(text.parse().unwrap(), 3, 2);
        let first = take("192.0.2.1").unwrap();
        let _second = take("192.0.2.1").unwrap();
        assert!(take("192.0.2.1").is_none());
        let third = take("2001:db8::1").unwrap();
        assert!(take("2001:db8:1::1").is_none(), "over all");
        drop((first, third));
        assert!(take("192.0.2.1").is_some());
        assert_eq!(places.lock().by_network.len(), 1);
    }
}
