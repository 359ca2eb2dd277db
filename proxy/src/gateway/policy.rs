//! What a VM may reach: rules in their order, and where none matches only public addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{PoisonError, RwLock};

use protocol::network::{Egress, Rule, RuleAction, RuleProtocol};

use super::address::{GATEWAY_V4, GATEWAY_V6};

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not.
    Deny,
}

/// The rules of one VM.
#[derive(Debug)]
pub struct Policy(RwLock<(Vec<Rule>, Egress)>);

impl Policy {
    /// The operator's rules come before the VM's own.
    pub fn new(operator: Vec<Rule>, egress: Egress) -> Self {
        Self(RwLock::new((operator, egress)))
    }

    /// Replaces the VM's own rules.
    pub fn update(&self, egress: Egress) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).1 = egress;
    }

    /// Replaces the operator's rules.
    pub fn set_operator(&self, rules: Vec<Rule>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).0 = rules;
    }

    /// Whether the VM may open this connection or flow.
    pub fn decide(&self, protocol: RuleProtocol, address: IpAddr, port: u16) -> Verdict {
        let rules = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let address = address.to_canonical();
        if rules.1.offline || closed(address) {
            return Verdict::Deny;
        }
        let matching = rules.0.iter().chain(&rules.1.rules).find(|rule| {
            let (first, last) = rule.ports;
            (rule.protocol == RuleProtocol::Any || rule.protocol == protocol)
                && (first..=last).contains(&port)
                && rule.to.contains(address)
        });
        match matching {
            Some(rule) if rule.action == RuleAction::Allow => Verdict::Allow,
            Some(_) => Verdict::Deny,
            None if public(address) => Verdict::Allow,
            None => Verdict::Deny,
        }
    }
}

/// What no rule opens.
fn closed(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let [ours, own, net, _] = GATEWAY_V4.octets();
            v4.is_unspecified()
                || v4.is_loopback()
                || v4.is_multicast()
                || v4 == Ipv4Addr::BROADCAST
                || [a, b, c] == [ours, own, net]
        }
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.to_bits() >> 64 == GATEWAY_V6.to_bits() >> 64
        }
    }
}

fn public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            !(v4.is_private()
                || v4.is_link_local()
                || v4.is_documentation()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b))
                || (a == 192 && b == 0 && c == 0)
                || (a == 198 && (18..20).contains(&b)))
        }
        IpAddr::V6(v6) => global(v6),
    }
}

fn global(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    first & 0xe000 == 0x2000
        && first != 0x2002
        && !(first == 0x2001 && second < 0x0200)
        && !(first == 0x2001 && second == 0x0db8)
}
