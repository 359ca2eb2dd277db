//! Net: finds out the host's addresses by DHCP, on each Ethernet interface with carrier, and tells
//! init, which sets them. It reads packets, so it has no right but to read and send them.

mod client;
mod packets;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use protocol::host::channel::{ChannelError, send};
use protocol::host::supervisor::Lease;

use self::client::Client;
use crate::descriptors::{DescriptorError, Descriptors};
use crate::netlink::{Link, Netlink};

/// Most interfaces that are asked on.
const MOST: usize = 64;

/// Why net ended.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// It was not started with what it needs.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The kernel does not tell of interfaces.
    #[error("cannot watch the interfaces: {0}")]
    Watch(io::Error),
    /// Init cannot be told.
    #[error("cannot tell init of a lease: {0}")]
    Tell(#[from] ChannelError),
}

/// What is told when an interface has no address.
fn no_lease(interface: u32) -> Lease {
    Lease {
        interface,
        address: None,
        gateway: None,
        name_servers: Vec::new(),
    }
}

fn log(lease: &Lease) {
    let interface = lease.interface;
    let Some((address, prefix)) = lease.address else {
        tracing::info!(interface, "no lease any more");
        return;
    };
    let address = format!("{}/{prefix}", Ipv4Addr::from(address));
    let gateway = lease
        .gateway
        .map(|gateway| Ipv4Addr::from(gateway).to_string());
    let name_servers = lease.name_servers.iter();
    let name_servers: Vec<Ipv4Addr> = name_servers.map(|bytes| (*bytes).into()).collect();
    tracing::info!(interface, address, gateway, ?name_servers, "lease");
}

/// Runs until the supervisor closes its end. The descriptors hold `supervisor`.
pub fn run(mut descriptors: Descriptors) -> Result<(), NetError> {
    let supervisor = descriptors.take(crate::supervisor::SUPERVISOR)?;
    Net::new(supervisor)?.run()
}

struct Net {
    supervisor: OwnedFd,
    news: OwnedFd,
    clients: BTreeMap<u32, Client>,
}

impl Net {
    fn new(supervisor: OwnedFd) -> Result<Self, NetError> {
        Ok(Self {
            supervisor,
            news: link_news().map_err(|error| NetError::Watch(error.into()))?,
            clients: BTreeMap::new(),
        })
    }

    fn run(mut self) -> Result<(), NetError> {
        self.look_at_links()?;
        loop {
            self.turn()?;
            let wait = self.clients.values_mut().filter_map(Client::wait).min();
            let timeout = wait.map_or(PollTimeout::NONE, round_up);
            let mut descriptors = vec![
                PollFd::new(self.supervisor.as_fd(), PollFlags::empty()),
                PollFd::new(self.news.as_fd(), PollFlags::POLLIN),
            ];
            let clients = self.clients.values();
            let clients = clients.map(|client| PollFd::new(client.descriptor(), PollFlags::POLLIN));
            descriptors.extend(clients);
            match poll(&mut descriptors, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(NetError::Watch(error.into())),
            }
            let is_ready = |index: usize| {
                let descriptor = descriptors.get(index);
                descriptor.and_then(PollFd::any).unwrap_or_default()
            };
            // Only a hang-up makes the supervisor's socket ready.
            if is_ready(0) {
                return Ok(());
            }
            if is_ready(1) {
                self.drain_news();
                self.look_at_links()?;
            }
        }
    }

    /// Gives every client its turn and tells what they learned.
    fn turn(&mut self) -> Result<(), NetError> {
        let mut leases = Vec::new();
        for client in self.clients.values_mut() {
            leases.extend(client.turn());
        }
        for lease in leases {
            log(&lease);
            send(self.supervisor.as_fd(), &lease, &[])?;
        }
        Ok(())
    }

    /// Begins to ask where there is carrier, stops where there is none.
    fn look_at_links(&mut self) -> Result<(), NetError> {
        let links = Netlink::open().and_then(|mut netlink| netlink.links());
        let links = links.map_err(NetError::Watch)?;
        let usable: BTreeMap<u32, &Link> = links
            .iter()
            .filter(|link| link.ethernet.is_some() && link.up && link.carrier)
            .map(|link| (link.index, link))
            .take(MOST)
            .collect();
        let clients = self.clients.keys().copied();
        let gone: Vec<u32> = clients
            .filter(|index| !usable.contains_key(index))
            .collect();
        for index in gone {
            tracing::info!(interface = index, "no carrier");
            self.clients.remove(&index);
            send(self.supervisor.as_fd(), &no_lease(index), &[])?;
        }
        for (index, link) in usable {
            let Some(address) = link.ethernet else {
                continue;
            };
            if self.clients.contains_key(&index) {
                continue;
            }
            match Client::new(index, address) {
                Ok(client) => {
                    tracing::info!(interface = link.name, "asking for an address by DHCP");
                    self.clients.insert(index, client);
                }
                Err(error) => {
                    tracing::error!(interface = link.name, %error, "cannot ask for an address");
                }
            }
        }
        Ok(())
    }

    /// Throws the news away: that there was some is enough to look at everything.
    fn drain_news(&self) {
        let mut buffer = vec![0; 64 << 10];
        let flags = MsgFlags::MSG_DONTWAIT;
        while !matches!(
            recv(self.news.as_raw_fd(), &mut buffer, flags),
            Err(nix::Error::EAGAIN) | Err(nix::Error::EBADF) | Ok(0)
        ) {}
    }
}

fn link_news() -> nix::Result<OwnedFd> {
    const LINK_GROUP: u32 = 1;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkRoute;
    let news = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(news.as_raw_fd(), &NetlinkAddr::new(0, LINK_GROUP))?;
    Ok(news)
}

/// Rounded up, so that the time has come when the wait is over.
fn round_up(wait: Duration) -> PollTimeout {
    let milliseconds = wait.as_micros().div_ceil(1000).min(3_600_000);
    PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
}
