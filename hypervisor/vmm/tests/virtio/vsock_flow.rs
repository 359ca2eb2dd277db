//! How much a vsock stream may carry at a time: credit in both directions, turns between streams,
//! limits.

use std::io::Write as _;

use vmm::virtio::vsock::MOST_CONNECTIONS;

use crate::guest::{
    CREDIT_REQUEST, CREDIT_UPDATE, Guest, Packet, Peer, REQUEST, RESPONSE, RST, RW, RX, RX_BUFFERS,
    SHUTDOWN, TX, TX_DATA, WINDOW, read_exactly, refusal,
};
use crate::rig::{NEEDS_RESET, STATUS};

#[test]
fn data_to_the_guest_never_exceeds_its_credit() {
    let mut guest = Guest::new();
    let (ours, theirs) = Guest::pair();
    guest.host.connect(1, 80, false, theirs);
    let request = guest.expect(REQUEST);
    let peer = Peer {
        host_port: request.source_port,
        guest_port: 80,
    };
    guest.send_raw(
        Packet {
            buffer_size: 1000,
            ..guest.packet(peer, RESPONSE)
        },
        &[],
    );
    (&ours).write_all(&[1; 5000]).unwrap();
    let mut got = 0;
    while got < 1000 {
        let (packet, data) = guest.receive();
        assert_eq!(packet.op, RW);
        got += data.len();
    }
    assert_eq!(got, 1000);
    guest.expect(CREDIT_REQUEST);
    assert!(
        guest.settle().is_empty(),
        "asked once, and nothing beyond the credit"
    );
    let more = Packet {
        buffer_size: 1000,
        forwarded: 400,
        ..guest.packet(peer, CREDIT_UPDATE)
    };
    guest.send_raw(more, &[]);
    assert_eq!(guest.receive().1.len(), 400);
}

#[test]
fn a_guest_that_sends_beyond_its_window_loses_the_stream_and_nothing_else() {
    let mut guest = Guest::new();
    let (peer, _ours) = guest.open(1);
    let (other, mut other_ours) = guest.open(2);
    // Nobody reads: the socket takes some, the window the rest, then it is full.
    let chunk = vec![1; 64 * 1024];
    let mut sent = 0;
    let reset = loop {
        guest.send_data(peer, 0, &chunk);
        sent += chunk.len();
        assert!(sent < 4 << 20, "somewhere it is full");
        if let Some((packet, _)) = guest.receive_now()
            && packet.op == RST
        {
            break packet;
        }
    };
    assert_eq!(reset.source_port, peer.host_port);
    guest.send_data(other, 0, b"unharmed");
    assert_eq!(read_exactly(&mut other_ours, 8), b"unharmed");
    assert_eq!(guest.rig.get(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_full_host_gives_no_credit_and_a_reading_one_gives_it_back() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    let (mut sent, mut told) = (0_u32, 0_u32);
    let chunk = vec![9; 32 * 1024];
    // Sends while it may; a request for credit brings the truth.
    loop {
        if sent - told + 32 * 1024 > WINDOW {
            guest.send(peer, CREDIT_REQUEST);
            let before = told;
            told = guest.expect(CREDIT_UPDATE).forwarded;
            if told == before {
                break;
            }
        } else {
            guest.send_data(peer, 0, &chunk);
            sent += 32 * 1024;
            while let Some((packet, _)) = guest.receive_now() {
                told = packet.forwarded;
            }
        }
    }
    assert!(sent >= WINDOW);
    let got = read_exactly(&mut ours, sent as usize);
    assert!(got.iter().all(|b| *b == 9));
    while told != sent {
        let (packet, _) = guest.receive();
        assert_eq!(packet.op, CREDIT_UPDATE);
        told = packet.forwarded;
        if sent - told < WINDOW / 4 {
            break;
        }
    }
    assert!(
        sent - told < WINDOW / 4,
        "the window is open again without being asked for"
    );
}

#[test]
fn one_busy_stream_does_not_starve_another() {
    let mut guest = Guest::new();
    let (busy_peer, busy) = guest.open(1);
    let (_, mut quiet) = guest.open(2);
    busy.set_nonblocking(true).unwrap();
    let mut busy_packets = 0;
    let mut forwarded = 0;
    let mut asked = false;
    loop {
        // The busy side is always full.
        while (&busy).write(&[0; 65536]).is_ok() {}
        if busy_packets == 20 && !asked {
            quiet.write_all(b"me").unwrap();
            asked = true;
        }
        let (packet, data) = guest.receive();
        if data == b"me" {
            break;
        }
        busy_packets += 1;
        assert!(
            busy_packets < 20 + 2 * usize::from(RX_BUFFERS),
            "the quiet one has its turn"
        );
        if packet.source_port == busy_peer.host_port {
            forwarded += data.len() as u32;
            let update = guest.packet(busy_peer, CREDIT_UPDATE);
            guest.send_raw(
                Packet {
                    forwarded,
                    ..update
                },
                &[],
            );
        }
    }
    assert!(asked);
}

#[test]
fn streams_are_limited_and_vanished_ones_make_room() {
    let mut guest = Guest::new();
    let mut kept = Vec::new();
    for ticket in 0..MOST_CONNECTIONS as u64 {
        kept.push(guest.open(ticket));
    }
    let ports: std::collections::HashSet<u32> =
        kept.iter().map(|(peer, _)| peer.host_port).collect();
    assert_eq!(
        ports.len(),
        MOST_CONNECTIONS,
        "no port is used twice at a time"
    );
    let (_ours, theirs) = Guest::pair();
    guest.host.connect(5000, 80, false, theirs);
    assert!(refusal(guest.event(), 5000).contains("too many open streams"));
    // The guest never answers the shutdown of this one; its place is needed.
    let (gone, ours) = kept.remove(3);
    drop(ours);
    assert_eq!(guest.expect(SHUTDOWN).source_port, gone.host_port);
    let mut seen = guest.settle();
    let (_ours, theirs) = Guest::pair();
    guest.host.connect(5001, 80, false, theirs);
    while !seen.iter().any(|p| p.op == REQUEST) {
        seen.push(guest.receive().0);
    }
    assert!(
        seen.iter()
            .any(|p| p.op == RST && p.source_port == gone.host_port)
    );
}

#[test]
fn a_guest_without_buffers_costs_no_memory_and_is_answered_later() {
    let mut guest = Guest::without_buffers();
    // Far more strays than are remembered: the rest waits in the guest's own queue.
    for i in 0..256_u16 {
        let slot = i % 256;
        let at = TX_DATA + 64 * u64::from(slot);
        let peer = Peer {
            host_port: 1,
            guest_port: u32::from(i),
        };
        guest.rig.put(at, &guest.packet(peer, REQUEST).to_bytes());
        guest.rig.chain(TX, slot, &[(at, 44, false)]);
    }
    let mut answered = 0;
    for round in 0..4 {
        for slot in 0..256 {
            guest.rig.offer(TX, slot);
        }
        guest.rig.kick(TX);
        if round == 0 {
            for _ in 0..256 {
                guest.rig.used(TX);
                answered += 1;
            }
        } else {
            break;
        }
    }
    assert_eq!(answered, 256);
    assert!(guest.rig.device.save().is_some());
    assert!(
        guest.rig.used_now(TX).is_none(),
        "the second 256 are not taken"
    );
    for i in 0..RX_BUFFERS {
        guest.post(i);
    }
    guest.rig.kick(RX);
    for _ in 0..512 {
        guest.expect(RST);
    }
}

#[test]
fn streams_with_data_take_turns() {
    let mut guest = Guest::without_buffers();
    guest.post(0);
    guest.post(1);
    guest.rig.kick(RX);
    let (_, mut busy) = guest.open(1);
    let (_, mut quiet) = guest.open(2);
    let stray = Peer {
        host_port: 9,
        guest_port: 9,
    };
    for _ in 0..2 {
        // Uses the buffers up.
        guest.send(stray, CREDIT_UPDATE);
        guest.rig.used(RX);
    }
    quiet.write_all(b"me").unwrap();
    busy.set_nonblocking(true).unwrap();
    while busy.write(&[0; 65536]).is_ok() {}
    // The answer comes after the device has seen both.
    guest.rig.device.save().unwrap();
    guest.post(0);
    guest.post(1);
    guest.rig.kick(RX);
    let lengths = [guest.rig.used(RX).1, guest.rig.used(RX).1];
    assert!(lengths.contains(&46), "{lengths:?}");
    assert!(lengths.iter().any(|l| *l > 46), "{lengths:?}");
}
