//! Frames of a guest, written by hand: sound ones, and such with a right beginning and damage behind it.

#![allow(dead_code, clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy::gateway::address::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpProtocol, IpRepr, Ipv4Packet, NdiscRepr,
    TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

pub(crate) fn ethernet(kind: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 14];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(GUEST_MAC);
    frame.set_dst_addr(GATEWAY_MAC);
    frame.set_ethertype(kind);
    bytes.extend(payload);
    bytes
}

pub(crate) fn ip(
    from: IpAddr,
    to: IpAddr,
    protocol: IpProtocol,
    hops: u8,
    payload: &[u8],
) -> Vec<u8> {
    let repr = IpRepr::new(from.into(), to.into(), protocol, payload.len(), hops);
    let mut bytes = vec![0; repr.header_len()];
    repr.emit(&mut bytes[..], &ChecksumCapabilities::default());
    bytes.extend(payload);
    let kind = if from.is_ipv4() {
        EthernetProtocol::Ipv4
    } else {
        EthernetProtocol::Ipv6
    };
    ethernet(kind, &bytes)
}

pub(crate) fn arp(target: Ipv4Addr) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: GUEST_MAC,
        source_protocol_addr: GUEST_V4,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    let mut frame = ethernet(EthernetProtocol::Arp, &bytes);
    frame[..6].fill(0xff);
    frame
}

pub(crate) fn solicit(target: Ipv6Addr) -> Vec<u8> {
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit {
        target_addr: target,
        lladdr: Some(GUEST_MAC.into()),
    });
    let [.., a, b, c] = target.octets();
    let to = Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(a),
        u16::from_be_bytes([b, c]),
    );
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &GUEST_V6,
        &to,
        &mut Icmpv6Packet::new_unchecked(&mut bytes[..]),
        &ChecksumCapabilities::default(),
    );
    let mut frame = ip(GUEST_V6.into(), to.into(), IpProtocol::Icmpv6, 255, &bytes);
    frame[..6].copy_from_slice(&[0x33, 0x33, 0xff, a, b, c]);
    frame
}

pub(crate) fn ping(data: &[u8]) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &mut Icmpv4Packet::new_unchecked(&mut bytes[..]),
        &ChecksumCapabilities::default(),
    );
    ip(
        GUEST_V4.into(),
        GATEWAY_V4.into(),
        IpProtocol::Icmp,
        64,
        &bytes,
    )
}

pub(crate) fn syn(port: u16, to: SocketAddr) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: port,
        dst_port: to.port(),
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(77),
        ack_number: None,
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &mut TcpPacket::new_unchecked(&mut bytes[..]),
        &GUEST_V4.into(),
        &to.ip().into(),
        &ChecksumCapabilities::default(),
    );
    ip(GUEST_V4.into(), to.ip(), IpProtocol::Tcp, 64, &bytes)
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Frames with a right beginning and damage behind it.
pub(crate) fn damaged(random: &mut Random, to: SocketAddr) -> Vec<u8> {
    let mut frame = match random.next() % 4 {
        0 => arp(GATEWAY_V4),
        1 => solicit(GATEWAY_V6),
        2 => ping(&[1; 100]),
        _ => syn((random.next() % 8 + 1) as u16, to),
    };
    for _ in 0..random.next() % 6 {
        let place = random.next() as usize % frame.len();
        frame[place] = random.next() as u8;
    }
    // A right sum lets the damage get further.
    if frame[12..14] == [8, 0] && frame.len() > 34 && frame[14] == 0x45 {
        Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
    }
    let keep = frame.len() - (random.next() % 2 * (random.next() % 20)) as usize;
    frame.truncate(keep.max(1));
    frame
}
