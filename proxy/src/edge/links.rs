//! One-time links that were not opened yet. Of a link's secret only the hash is here. What is not
//! here is refused: a link that was opened, that is too old, or that a proxy before this one knew.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use protocol::host::proxy::AdmitLink;
use protocol::id::Subdomain;
use tokio::time::Instant;

/// Links of one VM that wait to be opened; of more, the oldest goes.
const PER_VM: usize = 16;

/// VMs whose links wait; of more, those go that were longest without a new one.
const VMS: usize = 4_096;

#[derive(Debug)]
struct Link {
    secret: blake3::Hash,
    token: [u8; 32],
    until: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Links(Mutex<HashMap<Subdomain, VecDeque<Link>>>);

impl Links {
    /// Takes in a link that may be opened.
    pub(crate) fn admit(&self, link: &AdmitLink, now: Instant) {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lifetime = Duration::from_secs(link.lifetime_s.into());
        let Some(until) = now.checked_add(lifetime) else {
            return;
        };
        if links.len() >= VMS && !links.contains_key(&link.subdomain) {
            links.retain(|_, of_vm| of_vm.back().is_some_and(|link| link.until > now));
            if links.len() >= VMS {
                let oldest = links
                    .iter()
                    .min_by_key(|(_, of_vm)| of_vm.back().map(|link| link.until))
                    .map(|(subdomain, _)| subdomain.clone());
                oldest.map(|oldest| links.remove(&oldest));
            }
        }
        let of_vm = links.entry(link.subdomain.clone()).or_default();
        of_vm.retain(|link| link.until > now);
        if of_vm.len() >= PER_VM {
            of_vm.pop_front();
        }
        of_vm.push_back(Link {
            secret: blake3::Hash::from_bytes(link.secret),
            token: link.token,
            until,
        });
    }

    /// Opens a link to a VM whose token has this hash; true once for each.
    pub(crate) fn spend(
        &self,
        subdomain: &Subdomain,
        token: &[u8; 32],
        secret: &str,
        now: Instant,
    ) -> bool {
        let secret = blake3::hash(secret.as_bytes());
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of_vm) = links.get_mut(subdomain) else {
            return false;
        };
        let at = of_vm.iter().position(|link| link.secret == secret);
        let link = at.and_then(|at| of_vm.remove(at));
        if of_vm.is_empty() {
            links.remove(subdomain);
        }
        link.is_some_and(|link| link.token == *token && link.until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: [u8; 32] = [7; 32];

    fn name(number: u16) -> Subdomain {
        let mut random = [0; 20];
        for (digit, shift) in random.iter_mut().zip([0, 5, 10, 15]) {
            *digit = (number >> shift) as u8 & 31;
        }
        Subdomain::from_random(random)
    }

    fn link(vm: u16, secret: &str) -> AdmitLink {
        AdmitLink {
            subdomain: name(vm),
            secret: *blake3::hash(secret.as_bytes()).as_bytes(),
            token: TOKEN,
            lifetime_s: 60,
        }
    }

    #[test]
    fn a_link_opens_one_vm_once_while_it_is_young_and_the_token_the_same() {
        let links = Links::default();
        let now = Instant::now();
        let spend = |vm, token, secret, after| {
            links.spend(&name(vm), token, secret, now + Duration::from_secs(after))
        };
        links.admit(&link(1, "a"), now);
        assert!(!spend(2, &TOKEN, "a", 0), "another VM");
        assert!(!spend(1, &TOKEN, "b", 0), "another secret");
        assert!(spend(1, &TOKEN, "a", 59));
        assert!(!spend(1, &TOKEN, "a", 0), "again");
        links.admit(&link(1, "a"), now);
        assert!(!spend(1, &[8; 32], "a", 0), "another token");
        links.admit(&link(1, "a"), now);
        assert!(!spend(1, &TOKEN, "a", 60), "too old");
        assert!(links.0.lock().unwrap().is_empty(), "nothing is kept");
    }

    #[test]
    fn what_waits_is_bounded_for_each_vm_and_over_all() {
        let links = Links::default();
        let now = Instant::now();
        for number in 0..20 {
            links.admit(&link(1, &number.to_string()), now);
        }
        let spend = |vm, secret| links.spend(&name(vm), &TOKEN, secret, now);
        assert!(!spend(1, "3"), "the oldest have gone");
        assert!(spend(1, "4"));
        assert!(spend(1, "19"));
        for vm in 2..6_000_u16 {
            links.admit(&link(vm, "a"), now + Duration::from_millis(vm.into()));
        }
        assert_eq!(links.0.lock().unwrap().len(), VMS);
        assert!(!spend(2, "a"));
        assert!(spend(5_999, "a"));
    }
}
