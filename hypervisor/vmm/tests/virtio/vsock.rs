//! vsock against a mock guest that writes every packet by hand, kind or hostile: streams that are
//! opened, refused, reset, and packets that break the rules.

use std::io::{Read as _, Write as _};

use vmm::virtio::vsock::{AGENT_PORT, VsockEvent, VsockEvents, vsock};

use crate::guest::{
    CREDIT_REQUEST, CREDIT_UPDATE, Guest, Packet, Peer, REQUEST, RESPONSE, RST, RW, RX, RX_DATA,
    SHUTDOWN, TX, TX_DATA, WINDOW, read_exactly, refusal,
};
use crate::rig::Faults;

#[test]
fn the_guest_learns_its_cid() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.rig.device.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
}

#[test]
fn bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(7);
    ours.write_all(b"to the guest").unwrap();
    let (packet, data) = guest.receive();
    assert_eq!((packet.op, data.as_slice()), (RW, &b"to the guest"[..]));
    assert_eq!(
        (packet.buffer_size, packet.target_cid, packet.target_port),
        (WINDOW, 3, 80)
    );
    guest.send_data(peer, 12, b"to the host");
    assert_eq!(read_exactly(&mut ours, 11), b"to the host");
}

#[test]
fn a_refused_stream_is_reported_and_its_socket_closed() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = Guest::pair();
    guest.host.connect(1, 81, false, theirs);
    let request = guest.expect(REQUEST);
    guest.send(
        Peer {
            host_port: request.source_port,
            guest_port: 81,
        },
        RST,
    );
    assert!(refusal(guest.event(), 1).contains("port 81"));
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    assert!(guest.settle().is_empty(), "a reset is not answered");
}

#[test]
fn the_doorbell_is_reset_and_opens_what_waited_for_it() {
    let mut guest = Guest::new();
    let (_ours, theirs) = Guest::pair();
    guest.host.connect(1, AGENT_PORT, true, theirs);
    assert!(
        guest.settle().is_empty(),
        "nothing is asked before the agent rang"
    );
    guest.ring();
    assert_eq!(guest.event(), VsockEvent::AgentRang);
    let reset = guest.expect(RST);
    assert_eq!((reset.source_port, reset.target_port), (AGENT_PORT, 5555));
    guest.expect(REQUEST);
    let (_more, theirs) = Guest::pair();
    guest.host.connect(2, AGENT_PORT, true, theirs);
    guest.expect(REQUEST);
}

#[test]
fn a_guest_that_rings_for_ever_is_one_event() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        guest.ring();
        guest.expect(RST);
    }
    assert_eq!(guest.events.take(), [VsockEvent::AgentRang]);
    guest.no_event();
}

#[test]
fn connections_of_the_guest_are_reset() {
    let mut guest = Guest::new();
    for port in [1, 22, 1023, 1025, 70_000, u32::MAX] {
        guest.send(
            Peer {
                host_port: port,
                guest_port: 6000,
            },
            REQUEST,
        );
        let reset = guest.expect(RST);
        assert_eq!((reset.source_port, reset.target_port), (port, 6000));
    }
    guest.no_event();
}

#[test]
fn packets_that_belong_to_no_stream_are_reset_and_of_another_guest_dropped() {
    let mut guest = Guest::new();
    let (peer, _ours) = guest.open(1);
    let stray = Peer {
        guest_port: 81,
        ..peer
    };
    for op in [
        RESPONSE,
        SHUTDOWN,
        RW,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        0,
        8,
        u16::MAX,
    ] {
        guest.send(stray, op);
        assert_eq!(guest.expect(RST).target_port, 81);
    }
    guest.send_raw(
        Packet {
            source_cid: 4,
            ..guest.packet(peer, RST)
        },
        &[],
    );
    guest.send_raw(
        Packet {
            source_cid: 4,
            ..guest.packet(stray, REQUEST)
        },
        &[],
    );
    assert!(guest.settle().is_empty());
    let seqpacket = Packet {
        kind: 2,
        ..guest.packet(stray, REQUEST)
    };
    guest.send_raw(seqpacket, &[]);
    guest.expect(RST);
    let elsewhere = Packet {
        target_cid: 77,
        ..guest.packet(peer, REQUEST)
    };
    guest.send_raw(elsewhere, &[]);
    assert_eq!(
        guest.expect(RST).source_cid,
        77,
        "reset by whom it was meant for"
    );
    assert!(
        guest.settle().is_empty(),
        "the stream with these ports is unharmed"
    );
}

#[test]
fn short_packets_and_buffers_break_the_device() {
    let mut guest = Guest::new();
    guest.rig.chain(TX, 0, &[(TX_DATA, 43, false)]);
    guest.rig.offer(TX, 0);
    guest.rig.kick(TX);
    assert!(guest.rig.broken().contains("44-byte header"));

    let mut guest = Guest::new();
    let (peer, _ours) = guest.open(1);
    for length in [5, u32::MAX] {
        let packet = Packet {
            length,
            ..guest.packet(peer, RW)
        };
        guest.rig.put(TX_DATA, &packet.to_bytes());
    }
    guest
        .rig
        .chain(TX, 0, &[(TX_DATA, 44, false), (TX_DATA + 100, 4, false)]);
    guest.rig.offer(TX, 0);
    guest.rig.kick(TX);
    assert!(guest.rig.broken().contains("payload"));

    let mut guest = Guest::without_buffers();
    guest.rig.chain(RX, 0, &[(RX_DATA, 43, true)]);
    guest.rig.offer(RX, 0);
    guest.send(
        Peer {
            host_port: 1,
            guest_port: 1,
        },
        REQUEST,
    );
    assert!(guest.rig.broken().contains("room for a header"));
}

#[test]
fn a_payload_in_many_pieces_is_one_packet() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    let packet = Packet {
        length: 6,
        ..guest.packet(peer, RW)
    };
    let at = TX_DATA + 0x40_0000;
    guest.rig.put(at, &packet.to_bytes());
    guest.rig.put(at + 0x100, b"abcdefgh");
    let pieces = [
        (at, 40, false),
        (at + 40, 4, false),
        (at + 0x100, 1, false),
        (at + 0x101, 7, false),
    ];
    guest.rig.chain(TX, 200, &pieces);
    guest.rig.offer(TX, 200);
    guest.rig.kick(TX);
    guest.rig.used(TX);
    assert_eq!(
        read_exactly(&mut ours, 6),
        b"abcdef",
        "as long as the header says"
    );
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone() {
    let mut guest = Guest::new();
    guest.ring();
    guest.expect(RST);
    let state = guest.rig.device.save().unwrap();
    let memory = guest.rig.memory.clone();
    let (sender, _events) = VsockEvents::channel().unwrap();
    let (copy, host) = vsock(memory.clone(), 3, Faults::default().sink(), sender).unwrap();
    guest.rig.device.shut_down();
    copy.restore(&state).unwrap();
    guest.rig.device = copy;
    guest.rig.chain(2, 0, &[(TX_DATA, 4, true)]);
    guest.rig.put(TX_DATA, &[0xff; 4]);
    guest.rig.offer(2, 0);
    guest.rig.kick(2);
    assert_eq!(guest.rig.used(2), (0, 4));
    assert_eq!(guest.rig.bytes(TX_DATA, 4), [0; 4]);
    // It knows that the agent rang.
    let (_ours, theirs) = Guest::pair();
    host.connect(1, AGENT_PORT, true, theirs);
    guest.expect(REQUEST);
}
