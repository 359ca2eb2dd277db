//! The fixed numbers of every VM's link: the same for all, so that a machine can become another
//! VM, or a copy of one, without being renumbered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

/// The largest IP packet on the link.
pub const MTU: usize = 65_520;

/// The gateway's IPv4 address, in a network of [`V4_PREFIX`] bits.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);

/// The guest's IPv4 address.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);

/// Bits of the link's IPv4 network.
pub const V4_PREFIX: u8 = 24;

/// The gateway's IPv6 address, in a network of [`V6_PREFIX`] bits.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 1);

/// The gateway's link-local address.
pub const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The guest's IPv6 address.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 2);

/// Bits of the link's IPv6 network.
pub const V6_PREFIX: u8 = 64;

/// The gateway's Ethernet address.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x02, 0x73, 0x75, 0x70, 0x00, 0x01]);

/// The guest's Ethernet address, until a frame of it shows another one.
pub const GUEST_MAC: EthernetAddress = EthernetAddress([0x02, 0x73, 0x75, 0x70, 0x00, 0x02]);

/// Whether this is one of the gateway's own addresses.
pub fn is_gateway(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4 == GATEWAY_V4,
        IpAddr::V6(v6) => v6 == GATEWAY_V6 || v6 == GATEWAY_LINK_LOCAL,
    }
}

/// The guest's address in the family of another one.
pub fn guest_for(other: IpAddr) -> IpAddr {
    match other {
        IpAddr::V4(_) => GUEST_V4.into(),
        IpAddr::V6(_) => GUEST_V6.into(),
    }
}
