//! The host's links, addresses and routes, set by netlink. What is set comes from the settings or,
//! already checked and typed, from net; nothing here reads a packet.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use protocol::host::supervisor::Lease;

use crate::netlink::{Link, Netlink};
use crate::settings::{Settings, StaticInterface};

/// Interfaces with addresses from the settings.
#[derive(Clone, Debug, Default)]
pub(super) struct Fixed(Vec<StaticInterface>);

impl Fixed {
    /// Takes them from the settings.
    pub(super) fn of(settings: &Settings) -> Self {
        Self(settings.network.fixed.clone())
    }

    fn find(&self, link: &Link) -> Option<&StaticInterface> {
        self.0.iter().find(|fixed| {
            fixed.interface == link.name
                || link
                    .hardware_address()
                    .is_some_and(|address| fixed.interface.eq_ignore_ascii_case(&address))
        })
    }
}

/// What an interface was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    address: (Ipv4Addr, u8),
    gateway: Option<Ipv4Addr>,
}

/// The host's interfaces.
#[derive(Debug, Default)]
pub(crate) struct Links {
    fixed: Fixed,
    given: BTreeMap<u32, Given>,
}

impl Links {
    pub(super) fn new(fixed: Fixed) -> Self {
        Self {
            fixed,
            given: BTreeMap::new(),
        }
    }

    /// Brings up what is down, and gives fixed addresses.
    pub(crate) fn bring_up(&mut self) {
        if let Err(error) = self.try_bring_up() {
            tracing::error!(%error, "interfaces not brought up");
        }
    }

    fn try_bring_up(&mut self) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        for link in netlink.links()? {
            if !link.up {
                match netlink.set_up(link.index) {
                    Ok(()) => tracing::info!(interface = link.name, "up"),
                    Err(error) => tracing::warn!(interface = link.name, %error, "not up"),
                }
            }
            if let Some(fixed) = self.fixed.find(&link) {
                let given = Given {
                    address: (fixed.address.address, fixed.address.prefix),
                    gateway: fixed.gateway,
                };
                self.give(&mut netlink, link.index, Some(given))?;
            }
        }
        Ok(())
    }

    /// Sets what net learned.
    pub(crate) fn apply(&mut self, lease: &Lease) {
        let given = lease.address.map(|(address, prefix)| Given {
            address: (Ipv4Addr::from(address), prefix.min(32)),
            gateway: lease.gateway.map(Ipv4Addr::from),
        });
        let done = Netlink::open().and_then(|mut netlink| {
            // An interface with a fixed address takes none from the network.
            let fixed = netlink
                .links()?
                .into_iter()
                .any(|link| link.index == lease.interface && self.fixed.find(&link).is_some());
            match fixed {
                true => Ok(()),
                false => self.give(&mut netlink, lease.interface, given),
            }
        });
        if let Err(error) = done {
            tracing::error!(interface = lease.interface, %error, "address not set");
        }
    }

    fn give(&mut self, netlink: &mut Netlink, index: u32, given: Option<Given>) -> io::Result<()> {
        let before = self.given.get(&index).copied();
        if before == given {
            return Ok(());
        }
        if let Some(old) = before
            && given.is_none_or(|new| new.address != old.address)
        {
            netlink.remove_address(index, old.address)?;
            self.given.remove(&index);
        }
        let Some(new) = given else {
            tracing::warn!(interface = index, "address taken away");
            return Ok(());
        };
        netlink.add_address(index, new.address)?;
        if let Some(gateway) = new.gateway {
            netlink.add_default_route(index, gateway)?;
        }
        self.given.insert(index, new);
        let (address, prefix) = new.address;
        let gateway = new.gateway.map(|gateway| gateway.to_string());
        tracing::info!(interface = index, %address, prefix, gateway, "address set");
        Ok(())
    }
}
