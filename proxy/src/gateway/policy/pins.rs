//! Which addresses which names had when a VM asked for them, so that rules for names can decide
//! about connections. Bounded in every direction, because a VM chooses what it asks for: in all, by
//! names per address, and in time.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::network::DomainName;

/// Most pairs of a name and an address.
pub(super) const MAX_PINS: usize = 4096;

/// Most names of one address: a decision looks at each. One content network's address may well
/// serve this many at once.
pub(super) const MAX_NAMES: usize = 16;

/// A program that connects a little after it asked must still be let through.
const SHORTEST: Duration = Duration::from_secs(60);

/// No answer holds for longer than a day.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

struct Pin {
    name: Arc<DomainName>,
    order: u64,
    until: Instant,
}

/// The pairs that are known.
#[derive(Default)]
pub(super) struct Pins {
    by_address: HashMap<IpAddr, Vec<Pin>>,
    /// Oldest first.
    order: BTreeMap<u64, IpAddr>,
    next: u64,
}

impl Pins {
    /// Notes that a name has an address. The oldest makes room.
    pub(super) fn insert(
        &mut self,
        name: &Arc<DomainName>,
        address: IpAddr,
        ttl: Duration,
        now: Instant,
    ) {
        let until = now.checked_add(ttl.clamp(SHORTEST, LONGEST)).unwrap_or(now);
        let order = self.next;
        self.next = self.next.wrapping_add(1);
        let of_address = self.by_address.entry(address).or_default();
        let same = of_address.iter().position(|pin| pin.name == *name);
        let oldest = || {
            let full = of_address.len() >= MAX_NAMES;
            let oldest = of_address
                .iter()
                .enumerate()
                .min_by_key(|(_, pin)| pin.order);
            oldest.filter(|_| full).map(|(index, _)| index)
        };
        if let Some(index) = same.or_else(oldest) {
            let old = of_address.swap_remove(index);
            self.order.remove(&old.order);
        }
        of_address.push(Pin {
            name: Arc::clone(name),
            order,
            until,
        });
        self.order.insert(order, address);
        while self.order.len() > MAX_PINS {
            self.remove_oldest();
        }
    }

    fn remove_oldest(&mut self) {
        let Some((order, address)) = self.order.pop_first() else {
            return;
        };
        if let Some(of_address) = self.by_address.get_mut(&address) {
            of_address.retain(|pin| pin.order != order);
            if of_address.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    /// The names that an address has now.
    pub(super) fn names(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = &DomainName> {
        self.by_address
            .get(&address)
            .into_iter()
            .flatten()
            .filter(move |pin| now <= pin.until)
            .map(|pin| pin.name.as_ref())
    }

    /// How many pairs are held.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn name(text: &str) -> Arc<DomainName> {
        Arc::new(text.parse().unwrap())
    }

    fn names(pins: &Pins, address: IpAddr, now: Instant) -> Vec<String> {
        let mut names: Vec<_> = pins.names(address, now).map(ToString::to_string).collect();
        names.sort();
        names
    }

    #[test]
    fn a_pin_lasts_as_long_as_its_answer_and_at_least_a_minute() {
        let (start, address) = (Instant::now(), IpAddr::from([1, 1, 1, 1]));
        let mut pins = Pins::default();
        pins.insert(&name("a.example"), address, Duration::ZERO, start);
        pins.insert(&name("b.example"), address, Duration::from_secs(300), start);
        pins.insert(&name("c.example"), address, Duration::MAX, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(names(&pins, address, at(60)).len(), 3);
        assert_eq!(names(&pins, address, at(61)), ["b.example", "c.example"]);
        assert_eq!(names(&pins, address, at(301)), ["c.example"]);
        assert_eq!(names(&pins, address, at(86_401)), [""; 0]);
        pins.insert(&name("a.example"), address, Duration::ZERO, at(100));
        assert_eq!(pins.len(), 3, "asked again, a pair is held once");
        assert_eq!(names(&pins, address, at(160)).len(), 3);
    }

    #[test]
    fn pins_are_bounded_and_the_oldest_goes_first() {
        let now = Instant::now();
        let mut pins = Pins::default();
        let address = |n: u32| IpAddr::from(Ipv4Addr::from_bits(n));
        for n in 0..10_000 {
            pins.insert(&name("a.example"), address(n), Duration::ZERO, now);
        }
        assert_eq!(pins.len(), MAX_PINS);
        assert_eq!(pins.by_address.len(), MAX_PINS);
        assert!(names(&pins, address(10_000 - 4097), now).is_empty());
        assert_eq!(names(&pins, address(10_000 - 4096), now), ["a.example"]);
        for n in 0..10_000 {
            pins.insert(
                &name(&format!("n{n}.example")),
                address(0),
                Duration::ZERO,
                now,
            );
        }
        assert_eq!(names(&pins, address(0), now).len(), MAX_NAMES);
        assert!(names(&pins, address(0), now).contains(&"n9999.example".to_owned()));
        let held: usize = pins.by_address.values().map(Vec::len).sum();
        assert_eq!(held, pins.order.len());
    }
}
