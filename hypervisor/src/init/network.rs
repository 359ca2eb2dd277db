//! The host's links, addresses and routes, set by netlink. What is set comes from the settings or,
//! already checked and typed, from net; nothing here reads a packet. The name servers that net learned
//! are written where control finds them as on any host.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

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
    /// By interface.
    name_servers: BTreeMap<u32, Vec<Ipv4Addr>>,
    /// Where they are written; none for nowhere.
    resolv_conf: Option<PathBuf>,
}

/// Where every host keeps its name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

impl Links {
    pub(super) fn new(fixed: Fixed) -> Self {
        Self {
            fixed,
            resolv_conf: Some(RESOLV_CONF.into()),
            ..Self::default()
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
        self.note_name_servers(lease);
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

    /// Writes down the name servers of all interfaces, those of the lowest first.
    fn note_name_servers(&mut self, lease: &Lease) {
        let servers = lease.name_servers.iter().copied().map(Ipv4Addr::from);
        let servers: Vec<Ipv4Addr> = servers.collect();
        let before = self
            .name_servers
            .insert(lease.interface, servers.clone())
            .unwrap_or_default();
        let Some(path) = self.resolv_conf.as_deref().filter(|_| before != servers) else {
            return;
        };
        let mut text = String::new();
        for server in self.name_servers.values().flatten() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "nameserver {server}");
        }
        match write(path, &text) {
            Ok(()) => tracing::info!(interface = lease.interface, ?servers, "name servers noted"),
            Err(error) => tracing::error!(path = %path.display(), %error, "name servers not noted"),
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

/// Whoever reads the file sees the old one or the new one.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_servers_of_all_interfaces_are_written_and_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("etc/resolv.conf");
        let mut links = Links {
            resolv_conf: Some(path.clone()),
            ..Links::default()
        };
        let mut lease = |interface, servers: &[[u8; 4]]| {
            links.note_name_servers(&Lease {
                interface,
                address: None,
                gateway: None,
                name_servers: servers.to_vec(),
            });
            fs::read_to_string(&path).unwrap()
        };
        let one = "nameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        assert_eq!(lease(3, &[[192, 0, 2, 2], [192, 0, 2, 3]]), one);
        let both = format!("nameserver 10.0.0.1\n{one}");
        assert_eq!(lease(2, &[[10, 0, 0, 1]]), both);
        assert_eq!(lease(3, &[]), "nameserver 10.0.0.1\n");
    }
}
