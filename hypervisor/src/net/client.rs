//! One interface's DHCP client: smoltcp's state machine on a packet socket. It says when it wants to
//! be called and what it has learned; it sets nothing.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use protocol::host::supervisor::Lease;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::dhcpv4;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use super::packets::Packets;

/// Nobody answered: how long until the question is asked again.
const ASK_AGAIN_AFTER: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(3);

/// The client.
pub(super) struct Client {
    interface: u32,
    packets: Packets,
    stack: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    epoch: Instant,
    told: Lease,
}

impl Client {
    /// Begins to ask on an interface with this hardware address.
    pub(super) fn new(interface: u32, address: [u8; 6]) -> io::Result<Self> {
        let mut packets = Packets::open(interface)?;
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(address)));
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        config.random_seed = u64::from_ne_bytes(seed);
        let epoch = Instant::now();
        let stack = Interface::new(config, &mut packets, smoltcp::time::Instant::ZERO);
        let mut socket = dhcpv4::Socket::new();
        let mut retries = socket.get_retry_config();
        retries.discover_timeout = ASK_AGAIN_AFTER;
        socket.set_retry_config(retries);
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = sockets.add(socket);
        Ok(Self {
            interface,
            packets,
            stack,
            sockets,
            dhcp,
            epoch,
            told: super::no_lease(interface),
        })
    }

    /// Becomes readable when a frame has come.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.packets.descriptor()
    }

    /// How long until it wants to be called again.
    pub(super) fn wait(&mut self) -> Option<Duration> {
        let now = self.now();
        let delay = self.stack.poll_delay(now, &self.sockets)?;
        Some(Duration::from_micros(delay.total_micros()))
    }

    /// Reads, sends, and says what was learned.
    pub(super) fn turn(&mut self) -> Option<Lease> {
        let now = self.now();
        self.packets.begin_turn();
        self.stack.poll(now, &mut self.packets, &mut self.sockets);
        let event = self
            .sockets
            .get_mut::<dhcpv4::Socket<'_>>(self.dhcp)
            .poll()?;
        let mut lease = super::no_lease(self.interface);
        if let dhcpv4::Event::Configured(config) = event {
            lease.address = Some((
                config.address.address().octets(),
                config.address.prefix_len(),
            ));
            lease.gateway = config.router.map(|router| router.octets());
            let name_servers = config.dns_servers.iter();
            lease.name_servers = name_servers.map(|server| server.octets()).collect();
        }
        if lease == self.told {
            return None;
        }
        self.take(&lease);
        self.told = lease.clone();
        Some(lease)
    }

    /// The lease is renewed from its own address.
    fn take(&mut self, lease: &Lease) {
        let address = lease.address;
        self.stack.update_ip_addrs(|addresses| {
            addresses.clear();
            if let Some((address, prefix)) = address {
                // The first of a list that holds at least one.
                let _ = addresses.push(IpCidr::new(Ipv4Addr::from(address).into(), prefix));
            }
        });
        let routes = self.stack.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(gateway) = lease.gateway {
            let _ = routes.add_default_ipv4_route(gateway.into());
        }
    }

    fn now(&self) -> smoltcp::time::Instant {
        let passed = self.epoch.elapsed().as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(passed).unwrap_or(i64::MAX))
    }
}
