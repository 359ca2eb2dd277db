//! What the gateway says itself: ARP and neighbour discovery for its own addresses and no other,
//! echo replies, refusals. Each answers one packet with at most one; none keeps anything.

use std::net::{IpAddr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv4DstUnreachable,
    Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol, IpRepr,
    NdiscNeighborFlags, NdiscRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
};

use super::address::{
    GATEWAY_LINK_LOCAL, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_V4, guest_for, is_gateway,
};
use super::link::Link;
use super::packet::{Packet, Segment};

/// Hops that an answer may take: it takes one.
const HOPS: u8 = 64;

/// As much of a refused packet as an ICMP message quotes.
const QUOTED: usize = 512;

/// Answers a question for one of the gateway's own addresses.
pub(super) fn arp(link: &mut Link, bytes: &[u8]) -> Option<()> {
    let packet = ArpPacket::new_checked(bytes).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr: GUEST_V4,
        target_protocol_addr: GATEWAY_V4,
        ..
    } = ArpRepr::parse(&packet).ok()?
    else {
        return None;
    };
    if !source_hardware_addr.is_unicast() {
        return None;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: GATEWAY_MAC,
        source_protocol_addr: GATEWAY_V4,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: GUEST_V4,
    };
    let length = reply.buffer_len();
    link.frame(
        source_hardware_addr,
        Some(EthernetProtocol::Arp),
        length,
        |buffer| {
            reply.emit(&mut ArpPacket::new_unchecked(buffer));
            Some(length)
        },
    );
    Some(())
}

/// Sends one packet that `fill` makes behind its IP header.
pub(super) fn send(
    link: &mut Link,
    from: IpAddr,
    to: IpAddr,
    protocol: IpProtocol,
    hop_limit: u8,
    most: usize,
    fill: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> bool {
    let mut repr = IpRepr::new(from.into(), to.into(), protocol, 0, hop_limit);
    let header = repr.header_len();
    link.packet(most.saturating_add(header), |buffer| {
        let (head, payload) = buffer.split_at_mut_checked(header)?;
        let length = fill(payload)?;
        repr.set_payload_len(length);
        repr.emit(head, &ChecksumCapabilities::default());
        length.checked_add(header)
    })
}

fn icmpv6(link: &mut Link, from: IpAddr, to: IpAddr, message: &Icmpv6Repr<'_>) {
    let (IpAddr::V6(source), IpAddr::V6(target)) = (from, to) else {
        return;
    };
    // RFC 4861: what came over more than one hop is no neighbour.
    let hops = if matches!(message, Icmpv6Repr::Ndisc(_)) {
        255
    } else {
        HOPS
    };
    let length = message.buffer_len();
    send(link, from, to, IpProtocol::Icmpv6, hops, length, |buffer| {
        message.emit(
            &source,
            &target,
            &mut Icmpv6Packet::new_unchecked(buffer),
            &ChecksumCapabilities::default(),
        );
        Some(length)
    });
}

fn icmpv4(link: &mut Link, from: IpAddr, to: IpAddr, message: &Icmpv4Repr<'_>) {
    let length = message.buffer_len();
    send(link, from, to, IpProtocol::Icmp, HOPS, length, |buffer| {
        message.emit(
            &mut Icmpv4Packet::new_unchecked(buffer),
            &ChecksumCapabilities::default(),
        );
        Some(length)
    });
}

/// Answers a neighbour solicitation for one of the gateway's own addresses. Some for any packet of
/// neighbour discovery that was answered or needs no answer.
pub(super) fn neighbour(link: &mut Link, packet: &Packet<'_>, from: EthernetAddress) -> Option<()> {
    let (IpAddr::V6(source), IpAddr::V6(target)) = (packet.from, packet.to) else {
        return None;
    };
    if packet.hop_limit != 255 {
        return None;
    }
    let message = Icmpv6Packet::new_checked(packet.payload).ok()?;
    let repr =
        Icmpv6Repr::parse(&source, &target, &message, &ChecksumCapabilities::default()).ok()?;
    let wanted = match repr {
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. }) => target_addr,
        // No router is announced: the guest's addresses are static.
        Icmpv6Repr::Ndisc(_) => return Some(()),
        _ => return None,
    };
    if wanted != GATEWAY_V6 && wanted != GATEWAY_LINK_LOCAL {
        return None;
    }
    // A guest that looks whether the address is free is told by all-nodes that it is not.
    let (to, mac, solicited) = if source.is_unspecified() {
        let mac = EthernetAddress([0x33, 0x33, 0, 0, 0, 1]);
        (
            std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
            mac,
            NdiscNeighborFlags::empty(),
        )
    } else {
        (source, from, NdiscNeighborFlags::SOLICITED)
    };
    let usual = std::mem::replace(&mut link.guest_mac, mac);
    icmpv6(
        link,
        wanted.into(),
        to.into(),
        &Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
            flags: solicited | NdiscNeighborFlags::OVERRIDE | NdiscNeighborFlags::ROUTER,
            target_addr: wanted,
            lladdr: Some(GATEWAY_MAC.into()),
        }),
    );
    link.guest_mac = usual;
    Some(())
}

/// An echo message in either direction.
#[derive(Clone, Copy)]
pub(super) struct Echo<'a> {
    pub(super) ident: u16,
    pub(super) sequence: u16,
    pub(super) data: &'a [u8],
}

/// The echo request that a packet is.
pub(super) fn echo_request<'a>(packet: &Packet<'a>) -> Option<Echo<'a>> {
    let sums = ChecksumCapabilities::default();
    match (packet.from, packet.to, packet.protocol) {
        (IpAddr::V4(_), IpAddr::V4(_), IpProtocol::Icmp) => {
            let message = Icmpv4Packet::new_checked(packet.payload).ok()?;
            match Icmpv4Repr::parse(&message, &sums).ok()? {
                Icmpv4Repr::EchoRequest {
                    ident,
                    seq_no,
                    data,
                } => Some(Echo {
                    ident,
                    sequence: seq_no,
                    data,
                }),
                _ => None,
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to), IpProtocol::Icmpv6) => {
            let message = Icmpv6Packet::new_checked(packet.payload).ok()?;
            match Icmpv6Repr::parse(&from, &to, &message, &sums).ok()? {
                Icmpv6Repr::EchoRequest {
                    ident,
                    seq_no,
                    data,
                } => Some(Echo {
                    ident,
                    sequence: seq_no,
                    data,
                }),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Sends an echo reply to the guest.
pub(super) fn echo_reply(link: &mut Link, from: IpAddr, to: IpAddr, echo: Echo<'_>) {
    let Echo {
        ident,
        sequence: seq_no,
        data,
    } = echo;
    match from {
        IpAddr::V4(_) => icmpv4(
            link,
            from,
            to,
            &Icmpv4Repr::EchoReply {
                ident,
                seq_no,
                data,
            },
        ),
        IpAddr::V6(_) => icmpv6(
            link,
            from,
            to,
            &Icmpv6Repr::EchoReply {
                ident,
                seq_no,
                data,
            },
        ),
    }
}

/// Refuses a TCP segment with a reset, as a host does on which nothing listens.
pub(super) fn reset(link: &mut Link, segment: &Segment) {
    if segment.resets {
        return;
    }
    let number = |bits: u32| TcpSeqNumber(i32::from_ne_bytes(bits.to_ne_bytes()));
    let (seq_number, ack_number) = match segment.acknowledges {
        Some(acknowledged) => (number(acknowledged), None),
        None => (number(0), Some(number(segment.end))),
    };
    let repr = TcpRepr {
        src_port: segment.peer.port(),
        dst_port: segment.guest_port,
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let sums = link.checksums();
    let (from, to) = (segment.peer.ip(), guest_for(segment.peer.ip()));
    let length = repr.buffer_len();
    send(link, from, to, IpProtocol::Tcp, HOPS, length, |buffer| {
        repr.emit(
            &mut TcpPacket::new_unchecked(buffer),
            &from.into(),
            &to.into(),
            &sums,
        );
        Some(length)
    });
}

/// Why something cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    Host,
    Network,
    Port,
    /// The rules refuse it.
    Prohibited,
}

/// Says that a packet of the guest cannot reach its destination.
pub(super) fn unreachable(link: &mut Link, packet: &Packet<'_>, why: Unreachable) {
    let to = packet.from;
    // The gateway speaks for the destination's port and for itself about everything else.
    let own = why == Unreachable::Port;
    let data_of = |header: usize| {
        let rest = packet.whole.get(header..).unwrap_or_default();
        rest.get(..QUOTED).unwrap_or(rest)
    };
    match (packet.from, packet.to) {
        (IpAddr::V4(from), IpAddr::V4(destination)) => {
            let reason = match why {
                Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
                Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let header = smoltcp::wire::Ipv4Repr {
                src_addr: from,
                dst_addr: destination,
                next_header: packet.protocol,
                payload_len: packet.payload.len(),
                hop_limit: packet.hop_limit,
            };
            let options = packet.whole.len().saturating_sub(packet.payload.len());
            let source = if own { destination } else { GATEWAY_V4 };
            icmpv4(
                link,
                source.into(),
                to,
                &Icmpv4Repr::DstUnreachable {
                    reason,
                    header,
                    data: data_of(options),
                },
            );
        }
        (IpAddr::V6(from), IpAddr::V6(destination)) => {
            let reason = match why {
                Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                Unreachable::Network => Icmpv6DstUnreachable::NoRoute,
                Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let header = smoltcp::wire::Ipv6Repr {
                src_addr: from,
                dst_addr: destination,
                next_header: packet.protocol,
                payload_len: packet.payload.len(),
                hop_limit: packet.hop_limit,
            };
            let source = if own { destination } else { GATEWAY_V6 };
            icmpv6(
                link,
                source.into(),
                to,
                &Icmpv6Repr::DstUnreachable {
                    reason,
                    header,
                    data: data_of(40),
                },
            );
        }
        _ => {}
    }
}

/// Says the same about a datagram that is gone already: its header is made again.
pub(super) fn datagram_unreachable(
    link: &mut Link,
    guest_port: u16,
    peer: SocketAddr,
    why: Unreachable,
) {
    let from = guest_for(peer.ip());
    let mut bytes = [0; 48];
    let repr = IpRepr::new(from.into(), peer.ip().into(), IpProtocol::Udp, 8, HOPS);
    let header = repr.header_len();
    let Some(whole) = bytes.get_mut(..header.saturating_add(8)) else {
        return;
    };
    let Some((head, payload)) = whole.split_at_mut_checked(header) else {
        return;
    };
    repr.emit(head, &ChecksumCapabilities::default());
    let mut udp = UdpPacket::new_unchecked(payload);
    udp.set_src_port(guest_port);
    udp.set_dst_port(peer.port());
    udp.set_len(8);
    udp.set_checksum(0);
    let Some(payload) = whole.get(header..) else {
        return;
    };
    let packet = Packet {
        from,
        to: peer.ip(),
        protocol: IpProtocol::Udp,
        hop_limit: HOPS,
        whole,
        payload,
    };
    unreachable(link, &packet, why);
}

/// Sends a datagram to the guest whose payload of at most `most` bytes `fill` puts in.
pub(super) fn datagram(
    link: &mut Link,
    peer: SocketAddr,
    guest_port: u16,
    most: usize,
    fill: impl FnOnce(&mut [u8]) -> Option<usize>,
) -> bool {
    let (from, to) = (peer.ip(), guest_for(peer.ip()));
    let most = most.saturating_add(8);
    send(link, from, to, IpProtocol::Udp, HOPS, most, |buffer| {
        let length = fill(buffer.get_mut(8..)?)?.checked_add(8)?;
        let mut udp = UdpPacket::new_unchecked(buffer.get_mut(..length)?);
        udp.set_src_port(peer.port());
        udp.set_dst_port(guest_port);
        udp.set_len(u16::try_from(length).ok()?);
        // Made on every channel: over IPv6 a receiver refuses a datagram that says it has none.
        udp.fill_checksum(&from.into(), &to.into());
        Some(length)
    })
}

/// Whether a packet to this address may be answered with an error at all: never to many.
pub(super) fn answerable(to: IpAddr) -> bool {
    is_gateway(to)
        || match to {
            IpAddr::V4(v4) => {
                !v4.is_multicast() && !v4.is_broadcast() && v4.octets() != [10, 213, 0, 255]
            }
            IpAddr::V6(v6) => !v6.is_multicast(),
        }
}
