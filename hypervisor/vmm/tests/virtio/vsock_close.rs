//! The ends of vsock streams: half a close stays half, a side that vanished is told to the other, and
//! nobody waits for a device that is gone.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use vmm::virtio::vsock::AGENT_PORT;

use crate::guest::{
    Guest, Peer, REQUEST, RESPONSE, RST, RX, RX_BUFFERS, SHUTDOWN, TX, read_exactly, refusal,
};
use crate::rig::EVENT_IDX;

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
