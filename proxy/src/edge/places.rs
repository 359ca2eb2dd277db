//! How many connections and requests there may be, over all and by network. A connection's place is
//! taken before anything of it is read and given back when it has ended; nobody is remembered after
//! that. Requests are bounded apart, because one connection by HTTP/2 carries many.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::limits::Limits;
use crate::api::strangers::network;

/// All connections and requests.
#[derive(Debug)]
pub(crate) struct Places {
    limits: Arc<Limits>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: Count,
    by_network: HashMap<IpAddr, Count>,
}

#[derive(Debug, Default, PartialEq)]
struct Count {
    connections: u32,
    told: u32,
    requests: u32,
}

/// One connection's place.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    network: IpAddr,
    /// It is one too many, and has none for requests.
    crowded: bool,
}

/// One request's place.
#[derive(Debug)]
pub(crate) struct RequestPlace {
    places: Arc<Places>,
    network: IpAddr,
}

impl Places {
    pub(crate) fn new(limits: &Arc<Limits>) -> Arc<Self> {
        Arc::new(Self {
            limits: Arc::clone(limits),
            taken: Mutex::default(),
        })
    }

    /// A place for a connection from `address`.
    pub(crate) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let network = network(address);
        let mut taken = self.lock();
        let Taken { all, by_network } = &mut *taken;
        let limits = &self.limits;
        let (connections, told) = by_network
            .get(&network)
            .map_or((0, 0), |own| (own.connections, own.told));
        let crowded =
            all.connections >= limits.connections || connections >= limits.connections_per_network;
        if crowded
            && (all.told >= limits.connections_told || told >= limits.connections_told_per_network)
        {
            return None;
        }
        let place = Place {
            places: Arc::clone(self),
            network,
            crowded,
        };
        for count in [all, by_network.entry(network).or_default()] {
            let count = place.kind()(count);
            *count = count.saturating_add(1);
        }
        Some(place)
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Whether the connection is above the limits, only to be told so.
    pub(crate) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// What it counts as.
    fn kind(&self) -> fn(&mut Count) -> &mut u32 {
        if self.crowded {
            |count| &mut count.told
        } else {
            |count| &mut count.connections
        }
    }

    /// A place for a request on this connection.
    pub(crate) fn request(&self) -> Option<RequestPlace> {
        if self.crowded {
            return None;
        }
        let mut taken = self.places.lock();
        let Taken { all, by_network } = &mut *taken;
        let limits = &self.places.limits;
        let own = by_network.entry(self.network).or_default();
        if all.requests >= limits.requests || own.requests >= limits.requests_per_network {
            return None;
        }
        own.requests = own.requests.saturating_add(1);
        all.requests = all.requests.saturating_add(1);
        Some(RequestPlace {
            places: Arc::clone(&self.places),
            network: self.network,
        })
    }
}

impl Taken {
    fn give_back(&mut self, network: IpAddr, count: impl Fn(&mut Count) -> &mut u32) {
        let all = count(&mut self.all);
        *all = all.saturating_sub(1);
        if let Entry::Occupied(mut own) = self.by_network.entry(network) {
            let counted = count(own.get_mut());
            *counted = counted.saturating_sub(1);
            if *own.get() == Count::default() {
                own.remove();
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.give_back(self.network, self.kind());
    }
}

impl Drop for RequestPlace {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.give_back(self.network, |count| &mut count.requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_by_network_and_over_all_and_come_back() {
        let limits = Limits {
            connections: 3,
            connections_per_network: 2,
            connections_told: 3,
            connections_told_per_network: 2,
            requests: 4,
            requests_per_network: 3,
            ..Limits::default()
        };
        let places = Places::new(&Arc::new(limits));
        let take = |text: &str| places.take(text.parse().unwrap());
        let first = take("192.0.2.1").unwrap();
        let second = take("192.0.2.1").unwrap();
        assert!(!first.is_crowded() && !second.is_crowded());
        let told: Vec<_> = (0..2).map(|_| take("192.0.2.1").unwrap()).collect();
        assert!(
            told.iter()
                .all(|place| place.is_crowded() && place.request().is_none())
        );
        assert!(take("192.0.2.1").is_none(), "as many as are told");
        let third = take("2001:db8::1").unwrap();
        assert!(!third.is_crowded());
        let over_all = take("2001:db8:1::1").unwrap();
        assert!(over_all.is_crowded(), "over all");
        assert!(take("2001:db8:2::1").is_none(), "as many as are told");
        drop((told, over_all));
        let mut requests: Vec<_> = (0..2).map(|_| first.request().unwrap()).collect();
        requests.push(second.request().unwrap());
        assert!(first.request().is_none(), "the network has three");
        requests.push(third.request().unwrap());
        assert!(third.request().is_none(), "over all");
        drop((first, third));
        assert!(!take("192.0.2.1").unwrap().is_crowded());
        assert!(second.request().is_none());
        requests.pop();
        requests.pop();
        assert!(second.request().is_some());
        drop(second);
        assert_eq!(
            places.lock().by_network.len(),
            1,
            "requests outlive connections"
        );
        drop(requests);
        assert!(places.lock().by_network.is_empty(), "nobody is remembered");
    }
}
