//! What a frame of the guest is. Everything that is not exactly understood is `None`: fragments,
//! extension headers of IPv6, VLAN tags, foreign senders. Nothing here keeps or changes anything.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet,
    TcpPacket, UdpPacket,
};

use super::address::{GATEWAY_MAC, GUEST_V4, GUEST_V6};

/// A frame's content.
pub(super) enum Content<'a> {
    Arp(&'a [u8]),
    Ip(Packet<'a>),
}

/// An IP packet that the guest sent from its own address.
#[derive(Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) protocol: IpProtocol,
    pub(super) hop_limit: u8,
    /// Header and payload, without what Ethernet padded.
    pub(super) whole: &'a [u8],
    pub(super) payload: &'a [u8],
}

/// Who sent a frame and what is in it.
pub(super) fn parse(bytes: &[u8]) -> Option<(EthernetAddress, Content<'_>)> {
    let frame = EthernetFrame::new_checked(bytes).ok()?;
    let (from, to) = (frame.src_addr(), frame.dst_addr());
    if !from.is_unicast() || !(to == GATEWAY_MAC || to.is_multicast() || to.is_broadcast()) {
        return None;
    }
    let payload = frame.payload();
    let content = match frame.ethertype() {
        EthernetProtocol::Arp => Content::Arp(payload),
        EthernetProtocol::Ipv4 => Content::Ip(ipv4(payload)?),
        EthernetProtocol::Ipv6 => Content::Ip(ipv6(payload)?),
        EthernetProtocol::Unknown(_) => return None,
    };
    Some((from, content))
}

/// An IP packet of the guest by itself.
pub(super) fn ip(bytes: &[u8]) -> Option<Packet<'_>> {
    match bytes.first()? >> 4 {
        4 => ipv4(bytes),
        6 => ipv6(bytes),
        _ => None,
    }
}

fn ipv4(bytes: &[u8]) -> Option<Packet<'_>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    // A header without room for itself would make smoltcp read behind it.
    if packet.version() != 4 || packet.header_len() < 20 || !packet.verify_checksum() {
        return None;
    }
    if packet.more_frags() || packet.frag_offset() != 0 || packet.src_addr() != GUEST_V4 {
        return None;
    }
    Some(Packet {
        from: packet.src_addr().into(),
        to: packet.dst_addr().into(),
        protocol: packet.next_header(),
        hop_limit: packet.hop_limit(),
        whole: bytes.get(..usize::from(packet.total_len()))?,
        payload: packet.payload(),
    })
}

fn ipv6(bytes: &[u8]) -> Option<Packet<'_>> {
    let packet = Ipv6Packet::new_checked(bytes).ok()?;
    if packet.version() != 6 {
        return None;
    }
    let from = packet.src_addr();
    let neighbour = packet.next_header() == IpProtocol::Icmpv6
        && (from.is_unspecified() || from.is_unicast_link_local());
    if from != GUEST_V6 && !neighbour {
        return None;
    }
    Some(Packet {
        from: from.into(),
        to: packet.dst_addr().into(),
        protocol: packet.next_header(),
        hop_limit: packet.hop_limit(),
        whole: bytes.get(..packet.total_len())?,
        payload: packet.payload(),
    })
}

/// What the stack has to know of a TCP segment to find its connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) guest_port: u16,
    pub(super) peer: SocketAddr,
    /// SYN without ACK and without RST or FIN.
    pub(super) opens: bool,
    pub(super) resets: bool,
    /// The sequence number behind its last byte.
    pub(super) end: u32,
    pub(super) acknowledges: Option<u32>,
}

pub(super) fn segment(packet: &Packet<'_>) -> Option<Segment> {
    let tcp = TcpPacket::new_checked(packet.payload).ok()?;
    if tcp.src_port() == 0 || tcp.dst_port() == 0 {
        return None;
    }
    // Sequence numbers are a ring of 32 bits.
    let sequence = u32::from_ne_bytes(tcp.seq_number().0.to_ne_bytes());
    let end = sequence.wrapping_add(u32::try_from(tcp.segment_len()).ok()?);
    Some(Segment {
        guest_port: tcp.src_port(),
        peer: SocketAddr::new(packet.to, tcp.dst_port()),
        opens: tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin(),
        resets: tcp.rst(),
        end,
        acknowledges: tcp
            .ack()
            .then(|| u32::from_ne_bytes(tcp.ack_number().0.to_ne_bytes())),
    })
}

/// A UDP datagram.
pub(super) struct Datagram<'a> {
    pub(super) guest_port: u16,
    pub(super) peer: SocketAddr,
    pub(super) payload: &'a [u8],
}

pub(super) fn datagram<'a>(packet: &Packet<'a>, check: bool) -> Option<Datagram<'a>> {
    let udp = UdpPacket::new_checked(packet.payload).ok()?;
    // A source port of zero would say that no answer is wanted; nothing sends that.
    if udp.src_port() == 0 || udp.dst_port() == 0 {
        return None;
    }
    if check && !udp.verify_checksum(&packet.from.into(), &packet.to.into()) {
        return None;
    }
    Some(Datagram {
        guest_port: udp.src_port(),
        peer: SocketAddr::new(packet.to, udp.dst_port()),
        payload: udp.payload(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Ipv4Address, Ipv4Repr};

    use super::*;

    fn frame(change: impl FnOnce(&mut Ipv4Packet<&mut [u8]>)) -> Vec<u8> {
        let mut bytes = vec![0; 14 + 28];
        let mut ethernet = EthernetFrame::new_unchecked(&mut bytes[..]);
        ethernet.set_src_addr(super::super::address::GUEST_MAC);
        ethernet.set_dst_addr(GATEWAY_MAC);
        ethernet.set_ethertype(EthernetProtocol::Ipv4);
        let repr = Ipv4Repr {
            src_addr: GUEST_V4,
            dst_addr: Ipv4Address::new(192, 0, 2, 1),
            next_header: IpProtocol::Udp,
            payload_len: 8,
            hop_limit: 64,
        };
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
        repr.emit(&mut packet, &ChecksumCapabilities::default());
        change(&mut packet);
        packet.fill_checksum();
        bytes
    }

    #[test]
    fn only_whole_packets_from_the_guests_address_pass() {
        assert!(parse(&frame(|_| ())).is_some());
        assert!(parse(&frame(|p| p.set_more_frags(true))).is_none());
        assert!(parse(&frame(|p| p.set_frag_offset(8))).is_none());
        assert!(parse(&frame(|p| p.set_version(6))).is_none());
        assert!(parse(&frame(|p| p.set_src_addr(Ipv4Address::new(10, 213, 0, 3)))).is_none());
        let mut wrong_sum = frame(|_| ());
        wrong_sum[24] ^= 1;
        assert!(parse(&wrong_sum).is_none());
        let mut other_station = frame(|_| ());
        other_station[5] ^= 4;
        assert!(parse(&other_station).is_none());
        let padded = [frame(|_| ()), vec![1; 20]].concat();
        let Some((_, Content::Ip(packet))) = parse(&padded) else {
            panic!("padding");
        };
        assert_eq!((packet.whole.len(), packet.payload.len()), (28, 8));
    }

    proptest! {
        #[test]
        fn no_bytes_hurt(bytes in prop::collection::vec(any::<u8>(), 0..200), start in 0_usize..3) {
            // Most random frames are not even IP: some get a head that is.
            let mut bytes = bytes;
            let head = frame(|_| ());
            let keep = [0, 24, 34][start].min(bytes.len());
            bytes[..keep].copy_from_slice(&head[..keep]);
            if let Some((_, Content::Ip(packet))) = parse(&bytes) {
                segment(&packet);
                datagram(&packet, true);
            }
        }
    }
}
