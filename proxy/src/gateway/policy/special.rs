//! Which addresses are the public internet's and which are something else. The table follows
//! IANA's IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and its successors, with
//! RFC 9637 and RFC 9602), and adds what those do not list: multicast, site-local addresses, the
//! metadata services of clouds, and our own networks. It decides nothing about rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What an address is, before any rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Part of the public internet.
    Public,
    /// Something that a rule for an address may open.
    Special,
    /// Closed, whatever the rules say.
    Never,
}

/// An address that carries another one is that other one: what would be connected to in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The address that rules are matched with.
    pub(super) address: IpAddr,
    /// What it is.
    pub(super) standing: Standing,
}

type V4 = (Ipv4Addr, u32);
type V6 = (Ipv6Addr, u32);

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u32) -> V4 {
    (Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, d: u16, prefix: u32) -> V6 {
    (Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), prefix)
}

/// Never opened.
const NEVER_V4: &[V4] = &[
    v4(0, 0, 0, 0, 32),         // unspecified
    v4(127, 0, 0, 0, 8),        // loopback
    v4(224, 0, 0, 0, 4),        // multicast
    v4(255, 255, 255, 255, 32), // limited broadcast
    v4(10, 213, 0, 0, 24),      // the gateways' own network
];

/// Closed unless a rule opens it.
const SPECIAL_V4: &[V4] = &[
    v4(0, 0, 0, 0, 8),        // "this network"
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // shared
    v4(169, 254, 0, 0, 16),   // link-local, with the metadata services at 169.254.169.254
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // IETF protocol assignments
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 88, 99, 0, 24),   // 6to4 relays (deprecated)
    v4(192, 168, 0, 0, 16),   // private
    v4(198, 18, 0, 0, 15),    // benchmarks
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(240, 0, 0, 0, 4),      // reserved
    v4(168, 63, 129, 16, 32), // Azure's metadata and DNS, at an address that looks public
];

/// Never opened. Several of these carry an IPv4 address where a tunnel or a translator would take
/// it out again, past every check here.
const NEVER_V6: &[V6] = &[
    v6(0, 0, 0, 0, 96),     // unspecified, loopback, IPv4-compatible (deprecated)
    v6(0xff00, 0, 0, 0, 8), // multicast
    v6(0xfd73, 0x7570, 0, 0, 64), // the gateways' own network
    v6(0x64, 0xff9b, 1, 0, 48), // NAT64 of local use: where the IPv4 address is, varies
    v6(0x2001, 0, 0, 0, 32), // Teredo
    v6(0x2002, 0, 0, 0, 16), // 6to4 (deprecated)
];

/// IPv4-translated (`::ffff:0:192.0.2.1`), never opened: the prefix does not fit [`v6`].
const TRANSLATED: V6 = (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96);

/// Closed unless a rule opens it.
const SPECIAL_V6: &[V6] = &[
    v6(0x2001, 0, 0, 0, 23), // IETF protocol assignments: benchmarks, ORCHID and others
    v6(0x2001, 0xdb8, 0, 0, 32), // documentation
    v6(0x3fff, 0, 0, 0, 20), // documentation
];

/// The only IPv6 addresses that are given out as global unicast addresses. Everything outside is
/// special: unique local (with fd00:ec2::254, a metadata service), link-local, site-local,
/// discard, segment routing, and what nobody has yet.
const GLOBAL_V6: V6 = v6(0x2000, 0, 0, 0, 3);

/// The well-known prefix of NAT64 (RFC 6052).
const NAT64: V6 = v6(0x64, 0xff9b, 0, 0, 96);

fn in_v4(address: Ipv4Addr, (network, prefix): V4) -> bool {
    let different = address.to_bits() ^ network.to_bits();
    different.leading_zeros() >= prefix
}

fn in_v6(address: Ipv6Addr, (network, prefix): V6) -> bool {
    let different = address.to_bits() ^ network.to_bits();
    different.leading_zeros() >= prefix
}

impl Target {
    /// What a packet to this address would reach. IPv4-mapped addresses and those of NAT64 are the
    /// IPv4 address in them.
    pub(super) fn of(address: IpAddr) -> Self {
        let inner = match address {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(v6) if in_v6(v6, NAT64) => {
                let [.., a, b, c, d] = v6.octets();
                Some(Ipv4Addr::new(a, b, c, d))
            }
            IpAddr::V6(v6) => v6.to_ipv4_mapped(),
        };
        match (inner, address) {
            (Some(v4), _) | (None, IpAddr::V4(v4)) => Self {
                address: v4.into(),
                standing: standing_v4(v4),
            },
            (None, IpAddr::V6(v6)) => Self {
                address,
                standing: standing_v6(v6),
            },
        }
    }
}

fn standing_v4(address: Ipv4Addr) -> Standing {
    if NEVER_V4.iter().any(|network| in_v4(address, *network)) {
        Standing::Never
    } else if SPECIAL_V4.iter().any(|network| in_v4(address, *network)) {
        Standing::Special
    } else {
        Standing::Public
    }
}

fn standing_v6(address: Ipv6Addr) -> Standing {
    if in_v6(address, TRANSLATED) || NEVER_V6.iter().any(|network| in_v6(address, *network)) {
        Standing::Never
    } else if !in_v6(address, GLOBAL_V6)
        || SPECIAL_V6.iter().any(|network| in_v6(address, *network))
    {
        Standing::Special
    } else {
        Standing::Public
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(text: &str) -> Standing {
        Target::of(text.parse().unwrap()).standing
    }

    #[test]
    fn the_registries_special_addresses_are_not_public() {
        for address in [
            "0.0.0.1",
            "0.255.255.255",
            "10.0.0.0",
            "10.212.255.255",
            "10.213.1.0",
            "10.255.255.255",
            "100.64.0.0",
            "100.100.100.200",
            "100.127.255.255",
            "169.254.0.0",
            "169.254.169.254",
            "172.16.0.0",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.0.170",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "192.168.255.255",
            "198.18.0.0",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "240.0.0.1",
            "255.255.255.254",
            "168.63.129.16",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::169.254.169.254",
            "100::1",
            "100:0:0:1::1",
            "2001:1::1",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:30::1",
            "2001:db8::1",
            "3fff::1",
            "3fff:fff:ffff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fd73:7570:0:1::1",
            "fdff:ffff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "feff::1",
            "4000::1",
            "1fff::1",
            "64:ff9a::1",
        ] {
            assert_eq!(standing(address), Standing::Special, "{address}");
        }
    }

    #[test]
    fn what_no_rule_may_open_is_known_in_every_form() {
        for address in [
            "0.0.0.0",
            "127.0.0.0",
            "127.0.0.1",
            "127.255.255.255",
            "224.0.0.1",
            "239.255.255.255",
            "255.255.255.255",
            "10.213.0.0",
            "10.213.0.1",
            "10.213.0.255",
            "::",
            "::1",
            "::2",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::ffff:10.213.0.1",
            "::ffff:0:127.0.0.1",
            "::ffff:0:8.8.8.8",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.213.0.1",
            "64:ff9b:1::1",
            "64:ff9b:1:ffff::8.8.8.8",
            "2001::1",
            "2001:0:ffff::1",
            "2002:7f00:1::1",
            "2002:808:808::1",
            "ff02::1",
            "ff0e::1",
            "fd73:7570::1",
            "fd73:7570::ffff:1",
        ] {
            assert_eq!(standing(address), Standing::Never, "{address}");
        }
    }

    #[test]
    fn the_neighbours_of_special_networks_are_public() {
        for address in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "191.255.255.255",
            "192.0.1.0",
            "192.0.3.0",
            "192.88.98.255",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "203.0.112.255",
            "203.0.114.0",
            "223.255.255.255",
            "168.63.129.17",
            "8.8.8.8",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2000::1",
            "2001:200::1",
            "2001:db7:ffff::1",
            "2001:db9::1",
            "2003::1",
            "2606:4700::1111",
            "3ffe::1",
            "3fff:1000::1",
        ] {
            assert_eq!(standing(address), Standing::Public, "{address}");
        }
    }
}
