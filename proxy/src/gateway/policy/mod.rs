//! What one VM may reach. Decisions are made about addresses, after names were resolved, and in
//! one order: addresses that are never opened; `offline`; the operator's rules, then the VM's, of
//! which the first that matches decides; then the public internet is open and all else is closed.
//!
//! A rule for a name is about the addresses that the gateway's own name server gave the VM for
//! that name. Such a rule closes any address, but opens only public ones: whoever runs the name's
//! zone must not be able to point it at the host's neighbours. Those are opened by a rule for their
//! addresses.

mod host;
mod pins;
mod special;

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use protocol::network::{Destination, DomainName, Egress, Rule, RuleAction, RuleProtocol};

pub use host::{HostAddresses, interface_addresses};
use pins::Pins;
use special::{Standing, Target};

/// Whether a VM may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not.
    Deny,
}

/// One VM's rules and what it learned about names. Shared by its stack and its resolver.
#[derive(Debug)]
pub struct Policy {
    host: Arc<HostAddresses>,
    state: RwLock<State>,
}

struct State {
    operator: Vec<Rule>,
    egress: Egress,
    pins: Pins,
}

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("State")
            .field("operator", &self.operator)
            .field("egress", &self.egress)
            .field("pins", &self.pins.len())
            .finish()
    }
}

impl Policy {
    /// The operator's rules, which come first, and the VM's own.
    pub fn new(operator: Vec<Rule>, egress: Egress, host: Arc<HostAddresses>) -> Self {
        Self {
            host,
            state: RwLock::new(State {
                operator,
                egress,
                pins: Pins::default(),
            }),
        }
    }

    /// Replaces the VM's own rules. What it learned about names stays.
    pub fn update(&self, egress: Egress) {
        self.write(|state| state.egress = egress);
    }

    /// Replaces the operator's rules.
    pub fn set_operator(&self, rules: Vec<Rule>) {
        self.write(|state| state.operator = rules);
    }

    /// Whether everything is closed.
    pub fn offline(&self) -> bool {
        self.read().egress.offline
    }

    /// Whether the VM may connect to `port` of `address`; ICMP has no port, any number will do.
    pub fn decide(&self, protocol: RuleProtocol, address: IpAddr, port: u16) -> Verdict {
        self.decide_at(protocol, address, port, Instant::now())
    }

    fn decide_at(
        &self,
        protocol: RuleProtocol,
        address: IpAddr,
        port: u16,
        now: Instant,
    ) -> Verdict {
        let target = Target::of(address);
        let state = self.read();
        if target.standing == Standing::Never || state.egress.offline {
            return Verdict::Deny;
        }
        let public = target.standing == Standing::Public
            && !self.host.contains(target.address)
            && !self.host.contains(address);
        let decides = |rule: &&Rule| {
            let opens = rule.action == RuleAction::Allow;
            applies(rule, protocol, port)
                && (rule.to.contains(target.address)
                    // A rule for IPv6 does not open what NAT64 makes of it.
                    || !opens && rule.to.contains(address)
                    || is_name(&rule.to)
                        && (public || !opens)
                        && state
                            .pins
                            .names(target.address, now)
                            .any(|name| rule.to.names(name)))
        };
        match state.rules().find(decides) {
            Some(rule) if rule.action == RuleAction::Allow => Verdict::Allow,
            Some(_) => Verdict::Deny,
            None if public => Verdict::Allow,
            None => Verdict::Deny,
        }
    }

    /// Whether the VM may ask for a name; none stands for the root, which has no text.
    ///
    /// The first rule about the name decides, if it is about every port and protocol: one that is
    /// narrower says something about connections, not about the name. `*` is about every name,
    /// too: a VM that may reach nothing but what earlier rules open does not get the names of the
    /// rest, so that names cannot carry data out. Where an earlier rule opens addresses, names may
    /// lead to those, and are answered.
    pub fn may_ask(&self, name: Option<&DomainName>) -> Verdict {
        let state = self.read();
        if state.egress.offline {
            return Verdict::Deny;
        }
        let mut addresses_open = false;
        for rule in state.rules() {
            let opens = rule.action == RuleAction::Allow;
            match &rule.to {
                Destination::Network { .. } => addresses_open |= opens,
                Destination::Everything if opens => return Verdict::Allow,
                Destination::Everything if whole(rule) => {
                    return if addresses_open {
                        Verdict::Allow
                    } else {
                        Verdict::Deny
                    };
                }
                to if name.is_some_and(|name| to.names(name)) => {
                    if opens {
                        return Verdict::Allow;
                    }
                    if whole(rule) {
                        return Verdict::Deny;
                    }
                }
                _ => {}
            }
        }
        Verdict::Allow
    }

    /// Notes which addresses the VM was given for the name that it asked for.
    pub fn pin(&self, name: &DomainName, addresses: &[(IpAddr, Duration)]) {
        self.pin_at(name, addresses, Instant::now());
    }

    fn pin_at(&self, name: &DomainName, addresses: &[(IpAddr, Duration)], now: Instant) {
        if addresses.is_empty() {
            return;
        }
        let name = Arc::new(name.clone());
        self.write(|state| {
            for (address, ttl) in addresses {
                let address = Target::of(*address).address;
                state.pins.insert(&name, address, *ttl, now);
            }
        });
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }
}

impl State {
    fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.operator.iter().chain(&self.egress.rules)
    }
}

fn is_name(to: &Destination) -> bool {
    matches!(to, Destination::Name(_) | Destination::Below(_))
}

/// Whether a rule is about every port of every protocol. One that this build does not understand
/// is, unless it would open something.
fn whole(rule: &Rule) -> bool {
    rule.ports == (0, u16::MAX)
        && matches!(rule.protocol, RuleProtocol::Any | RuleProtocol::Other(_))
}

fn applies(rule: &Rule, protocol: RuleProtocol, port: u16) -> bool {
    let (first, last) = rule.ports;
    let of_protocol = match rule.protocol {
        RuleProtocol::Any => true,
        // A newer peer's: closes all that it might be about, opens nothing.
        RuleProtocol::Other(_) => rule.action != RuleAction::Allow,
        own => own == protocol,
    };
    let of_port = match protocol {
        RuleProtocol::Icmp => (first, last) == (0, u16::MAX),
        _ => (first..=last).contains(&port),
    };
    of_protocol && of_port
}

#[cfg(test)]
mod tests;
