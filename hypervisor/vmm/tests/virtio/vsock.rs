//! vsock against a mock guest that writes every packet by hand, kind or hostile.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm::virtio::vsock::{AGENT_PORT, MOST_CONNECTIONS, VsockEvent, VsockEvents, vsock};

use crate::guest::{
    CREDIT_REQUEST, CREDIT_UPDATE, Guest, Packet, Peer, REQUEST, RESPONSE, RST, RW, RX, RX_BUFFERS,
    RX_DATA, SHUTDOWN, TX, TX_DATA, WINDOW,
};
use crate::rig::{EVENT_IDX, Faults, NEEDS_RESET, STATUS};

fn read_exactly(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn refusal(event: VsockEvent, expected: u64) -> String {
    match event {
        VsockEvent::NotConnected { ticket, message } if ticket == expected => message,
        other => panic!("{other:?}"),
    }
}

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
fn a_reset_is_never_answered_with_a_reset() {
    let mut guest = Guest::new();
    for port in [9999, 1024, 1 << 16] {
        guest.send(
            Peer {
                host_port: port,
                guest_port: 80,
            },
            RST,
        );
    }
    assert!(guest.settle().is_empty());
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
fn a_half_close_of_the_guest_leaves_the_host_writing() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    guest.send_data(peer, 0, b"last");
    guest.shut_down(peer, 2);
    let mut all = Vec::new();
    ours.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    ours.write_all(b"still here").unwrap();
    assert_eq!(guest.receive().1, b"still here");
}

#[test]
fn a_half_close_of_the_host_leaves_the_guest_writing() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    ours.write_all(b"last").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"last");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    guest.send_data(peer, 4, b"still here");
    assert_eq!(read_exactly(&mut ours, 10), b"still here");
    guest.shut_down(peer, 3);
    guest.expect(RST);
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_guest_that_stops_receiving_makes_the_hosts_writes_fail() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    guest.shut_down(peer, 1);
    assert!(guest.settle().is_empty());
    let error = ours.write_all(b"nobody").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    guest.send_data(peer, 0, b"one way");
    assert_eq!(read_exactly(&mut ours, 7), b"one way");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    let mut sent = Vec::new();
    for i in 0..4_u8 {
        let data = vec![i; 64 * 1024];
        guest.send_data(peer, 0, &data);
        sent.extend(data);
    }
    guest.shut_down(peer, 3);
    while guest.receive().0.op != RST {}
    let mut all = Vec::new();
    ours.read_to_end(&mut all).unwrap();
    assert!(all == sent, "{} of {}", all.len(), sent.len());
}

#[test]
fn a_host_that_vanished_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (peer, mut ours) = guest.open(1);
    ours.write_all(b"bye").unwrap();
    drop(ours);
    assert_eq!(guest.receive().1, b"bye");
    let flags = loop {
        let (packet, _) = guest.receive();
        assert_eq!(packet.op, SHUTDOWN);
        if packet.flags == 3 {
            break packet.flags;
        }
    };
    assert_eq!(flags, 3);
    guest.send_data(peer, 3, b"too late");
    guest.send(peer, RST);
    assert!(guest.settle().is_empty());
}

#[test]
fn a_host_that_vanished_before_the_guest_answered_is_withdrawn() {
    let mut guest = Guest::new();
    let (ours, theirs) = Guest::pair();
    guest.host.connect(5, 80, false, theirs);
    let request = guest.expect(REQUEST);
    drop(ours);
    assert_eq!(guest.expect(RST).source_port, request.source_port);
    assert!(refusal(guest.event(), 5).contains("host's side was closed"));
    // The guest's answer crosses it.
    guest.send(
        Peer {
            host_port: request.source_port,
            guest_port: 80,
        },
        RESPONSE,
    );
    guest.expect(RST);
}

#[test]
fn a_host_that_vanished_while_it_waited_for_the_agent_is_forgotten() {
    let mut guest = Guest::new();
    let (ours, theirs) = Guest::pair();
    guest.host.connect(5, AGENT_PORT, true, theirs);
    drop(ours);
    refusal(guest.event(), 5);
    guest.ring();
    guest.expect(RST);
    assert!(guest.settle().is_empty());
}

#[test]
fn a_host_that_half_closed_early_is_still_connected() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = Guest::pair();
    ours.write_all(b"early").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    guest.host.connect(5, 80, false, theirs);
    let request = guest.expect(REQUEST);
    let peer = Peer {
        host_port: request.source_port,
        guest_port: 80,
    };
    guest.send(peer, RESPONSE);
    assert_eq!(guest.receive().1, b"early");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    guest.send_data(peer, 0, b"answer");
    assert_eq!(read_exactly(&mut ours, 6), b"answer");
}

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
fn a_reset_of_the_device_closes_its_streams_and_keeps_what_still_waits() {
    let mut guest = Guest::new();
    let (_, mut open) = guest.open(1);
    let (_asked, theirs) = Guest::pair();
    guest.host.connect(2, 80, false, theirs);
    guest.expect(REQUEST);
    let (_waiting, theirs) = Guest::pair();
    guest.host.connect(3, AGENT_PORT, true, theirs);
    guest.settle();
    guest.rig.bring_up(&[256, 256, 16], !EVENT_IDX);
    assert_eq!(open.read(&mut [0; 1]).unwrap(), 0);
    assert!(refusal(guest.event(), 2).contains("reset"));
    guest.next_tx = 0;
    for i in 0..RX_BUFFERS {
        guest.post(i);
    }
    guest.ring();
    guest.expect(RST);
    guest.expect(REQUEST);
}

#[test]
fn a_broken_device_closes_everything_at_once() {
    let mut guest = Guest::new();
    let (_, mut open) = guest.open(1);
    let (_waiting, theirs) = Guest::pair();
    guest.host.connect(3, AGENT_PORT, true, theirs);
    guest.settle();
    guest.rig.claim(TX, 5000);
    guest.rig.kick(TX);
    assert!(guest.rig.broken().contains("available index"));
    assert_eq!(open.read(&mut [0; 1]).unwrap(), 0);
    assert!(refusal(guest.event(), 3).contains("broke"));
    assert!(guest.faults.all().is_empty());
    // Nor does anybody wait for what cannot come.
    let (_late, theirs) = Guest::pair();
    guest.host.connect(4, 80, false, theirs);
    assert!(refusal(guest.event(), 4).contains("broke"));
    // A guest that mends its device can be reached again.
    guest.rig.bring_up(&[256, 256, 16], !EVENT_IDX);
    let (_again, theirs) = Guest::pair();
    guest.host.connect(5, 80, false, theirs);
    guest.post(0);
    guest.rig.kick(RX);
    guest.expect(REQUEST);
}

#[test]
fn the_end_of_the_machine_answers_everyone() {
    let mut guest = Guest::new();
    let (_waiting, theirs) = Guest::pair();
    guest.host.connect(3, AGENT_PORT, true, theirs);
    guest.settle();
    guest.rig.device.shut_down();
    refusal(guest.event(), 3);
    let (_late, theirs) = Guest::pair();
    guest.host.connect(4, 80, false, theirs);
    refusal(guest.event(), 4);
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
