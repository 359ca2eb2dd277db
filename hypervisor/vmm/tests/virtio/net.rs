//! The network interface: frames between a mock driver and the other end of a frame channel, in both
//! directions, with too few buffers, with a full channel, and with a channel that breaks or is
//! replaced.

use std::io::{ErrorKind, Read as _, Write as _};

use vmm::virtio::net::net as make;

use crate::net_rig::*;
use crate::rig::{EVENT_IDX, INDIRECT, NEXT};

#[test]
fn the_driver_learns_address_link_and_packet_size() {
    let net = Net::new();
    let mut config = [0; 12];
    net.rig.device.read(0x100, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 1, 0, 0xf0, 0xff]);
    let offered = net.rig.features();
    let bits: Vec<u32> = (0..64).filter(|bit| offered >> bit & 1 == 1).collect();
    assert_eq!(bits, [0, 1, 3, 5, 15, 16, 28, 29, 32]);
}

#[test]
fn frames_of_every_size_go_both_ways_unchanged() {
    let mut net = Net::new();
    for (number, length) in [14, 15, 60, 1514, 9000, 65_534, MOST]
        .into_iter()
        .enumerate()
    {
        let frame = frame(number, length);
        net.send(&frame);
        net.rig.used(TX);
        assert_eq!(net.take(), frame);

        net.post(0..1, 12 + MOST as u32);
        net.deliver(&frame);
        let (header, received, _) = net.receive();
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(received, frame);
    }
    net.is_healthy();
}

#[test]
fn a_thousand_frames_arrive_in_order() {
    let mut net = Net::new();
    let length = |number: usize| 14 + number * 37 % 1500;
    net.post(0..256, 1600);
    let mut ours = net.ours.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        for number in 0..1000 {
            ours.write_all(&on_wire(&frame(number, length(number))))
                .unwrap();
        }
    });
    for number in 0..1000 {
        let (_, received, heads) = net.receive();
        assert_eq!(received, frame(number, length(number)));
        net.post(heads[0]..heads[0] + 1, 1600);
    }
    writer.join().unwrap();

    let mut ours = net.ours.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        for number in 0..1000 {
            assert_eq!(take(&mut ours), frame(number, length(number)));
        }
    });
    for batch in 0..10 {
        for number in batch * 100..batch * 100 + 100 {
            net.queue(&frame(number, length(number)));
        }
        net.rig.kick(TX);
        for _ in 0..100 {
            net.rig.used(TX);
        }
    }
    reader.join().unwrap();
}

#[test]
fn a_frame_in_many_pieces_is_one_frame() {
    let mut net = Net::new();
    let frame = frame(1, 100);
    let at = TX_DATA + SLOT * 200;
    net.rig.put(at, &[0; 12]);
    net.rig.put(at + 12, &frame);
    let pieces = [
        (at, 5, false),
        (at + 5, 8, false),
        (at + 13, 0, false),
        (at + 13, 1, false),
        (at + 14, 98, false),
    ];
    net.rig.chain(TX, 200, &pieces);
    net.rig.offer(TX, 200);
    net.rig.kick(TX);
    assert_eq!(net.rig.used(TX), (200, 0));
    assert_eq!(net.take(), frame);

    // The same through an indirect table.
    let table = TX_DATA + SLOT * 201;
    net.rig.descriptor_at(table, 0, (at, 12, NEXT, 1));
    net.rig.descriptor_at(table, 1, (at + 12, 100, 0, 0));
    net.rig.descriptor(TX, 201, (table, 32, INDIRECT, 0));
    net.rig.offer(TX, 201);
    net.rig.kick(TX);
    assert_eq!(net.rig.used(TX), (201, 0));
    assert_eq!(net.take(), frame);
}

#[test]
fn a_long_frame_is_spread_over_small_buffers_that_appear_at_once() {
    let mut net = Net::new();
    net.post(0..256, 300);
    for round in 0..20 {
        let frame = frame(round, 65_000);
        net.deliver(&frame);
        // Looks without rest, as a driver that polls does.
        let mut heads = Vec::new();
        eventually(|| {
            while let Some((head, length)) = net.rig.used_now(RX) {
                heads.push((head, length));
            }
            !heads.is_empty()
        });
        assert_eq!(heads.len(), 217);
        let mut bytes = Vec::new();
        for (head, length) in &heads {
            bytes.extend(
                net.rig
                    .bytes(RX_DATA + SLOT * u64::from(*head), *length as usize),
            );
        }
        assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 217, 0]);
        assert!(bytes[12..] == frame);
        for (head, _) in heads {
            net.post(head..head + 1, 300);
        }
    }
    net.is_healthy();
}

#[test]
fn a_buffer_in_pieces_is_filled_piece_by_piece() {
    let mut net = Net::new();
    let at = RX_DATA;
    net.rig.put(at, &[0xee; 0x400]);
    net.rig.chain(
        RX,
        0,
        &[
            (at, 3, true),
            (at + 0x100, 20, true),
            (at + 0x200, 100, true),
        ],
    );
    net.rig.offer(RX, 0);
    net.rig.kick(RX);
    let frame = frame(1, 50);
    net.deliver(&frame);
    assert_eq!(net.rig.used(RX), (0, 62));
    assert_eq!(net.rig.bytes(at, 4), [0, 0, 0, 0xee]);
    assert_eq!(net.rig.bytes(at + 0x100, 9), [0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(net.rig.bytes(at + 0x109, 11), frame[..11]);
    assert_eq!(net.rig.bytes(at + 0x114, 1), [0xee]);
    assert_eq!(net.rig.bytes(at + 0x200, 39), frame[11..]);
    assert_eq!(net.rig.bytes(at + 0x227, 1), [0xee]);
}

#[test]
fn a_driver_that_cannot_merge_gets_what_fits_and_the_rest_is_dropped() {
    let mut net = Net::with(!EVENT_IDX & !MERGE);
    net.post(0..8, 1526);
    for (number, length) in [(0, 1514), (1, 1515), (2, MOST), (3, 64)] {
        net.deliver(&frame(number, length));
    }
    assert_eq!(net.receive().1, frame(0, 1514));
    assert_eq!(net.receive().1, frame(3, 64));
    net.is_healthy();
}

#[test]
fn a_frame_that_all_buffers_of_a_queue_cannot_hold_is_dropped() {
    let mut net = Net::new();
    net.post(0..256, 100);
    net.deliver(&frame(0, 30_000));
    net.deliver(&frame(1, 25_588));
    let (_, received, heads) = net.receive();
    assert_eq!(heads.len(), 256);
    assert!(received == frame(1, 25_588));
}

#[test]
fn frames_wait_in_the_channel_for_a_guest_without_buffers() {
    const FRAMES: usize = 300;
    let mut net = Net::new();
    let all: Vec<u8> = (0..FRAMES).flat_map(|n| on_wire(&frame(n, 9000))).collect();
    let (mut written, mut refused) = (0, 0);
    net.ours.set_nonblocking(true).unwrap();
    while refused < 200 {
        match net.ours.write(&all[written..]) {
            Ok(count) => (written, refused) = (written + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refused += 1;
                net.rig.device.save().unwrap();
            }
        }
    }
    net.ours.set_nonblocking(false).unwrap();
    assert!(
        written < all.len(),
        "nobody keeps megabytes for a guest that takes nothing"
    );
    let mut ours = net.ours.try_clone().unwrap();
    let writer = std::thread::spawn(move || ours.write_all(&all[written..]).unwrap());
    // Two buffers are not enough for one of them, a third is.
    net.post(0..2, 4000);
    net.post(2..4, 4000);
    for number in 0..FRAMES {
        let (_, received, heads) = net.receive();
        assert!(received == frame(number, 9000), "frame {number}");
        assert_eq!(heads.len(), 3);
        for head in heads {
            net.post(head..head + 1, 4000);
        }
    }
    writer.join().unwrap();
    net.is_healthy();
}

#[test]
fn a_full_channel_stops_the_queue_and_nothing_is_lost() {
    let mut net = Net::new();
    for number in 0..200 {
        net.queue(&frame(number, 20_000));
    }
    net.rig.kick(TX);
    // It stops: most are neither sent nor answered, however often it is kicked.
    let mut answered = 0;
    for _ in 0..100 {
        while net.rig.used_now(TX).is_some() {
            answered += 1;
        }
        net.rig.kick(TX);
        // Answered by the worker, after whatever it did.
        net.rig.device.save().unwrap();
    }
    assert!((5..150).contains(&answered), "{answered} frames answered");
    for number in 0..200 {
        assert!(net.take() == frame(number, 20_000), "frame {number}");
    }
    for _ in answered..200 {
        net.rig.used(TX);
    }
    net.is_healthy();
}

#[test]
fn a_guest_without_a_channel_sends_into_the_void_and_goes_on() {
    let mut net = Net::unconnected(!EVENT_IDX);
    for number in 0..1000 {
        net.send(&frame(number, 1000));
        net.rig.used(TX);
    }
    net.connect();
    net.is_healthy();
    // Nobody is on the other end any more.
    net.ours = pair().0;
    for number in 0..1000 {
        net.send(&frame(number, 1000));
        net.rig.used(TX);
    }
    net.connect();
    net.is_healthy();
}

#[test]
fn a_frame_cut_by_a_new_channel_is_forgotten() {
    let mut net = Net::new();
    net.post(0..8, 2000);
    let cut = on_wire(&frame(1, 1000));
    net.ours.write_all(&cut[..500]).unwrap();
    net.connect();
    net.deliver(&frame(2, 1000));
    assert_eq!(net.receive().1, frame(2, 1000));
}

#[test]
fn a_new_channel_begins_with_a_whole_frame() {
    let mut net = Net::new();
    for number in 0..200 {
        net.queue(&frame(number, 20_000));
    }
    net.rig.kick(TX);
    net.rig.used(TX);
    net.rig.device.save().unwrap();
    let (ours, theirs) = pair();
    net.host.attach(theirs);
    let mut before = std::mem::replace(&mut net.ours, ours);
    let first = net.take();
    let first = (1..200)
        .find(|number| first == frame(*number, 20_000))
        .expect("a frame of ours, whole");
    for number in first + 1..200 {
        assert!(net.take() == frame(number, 20_000), "frame {number}");
    }
    // What the old one took is in order, up to a cut.
    let mut old = Vec::new();
    before.read_to_end(&mut old).unwrap();
    let sent: Vec<u8> = (0..first)
        .flat_map(|n| on_wire(&frame(n, 20_000)))
        .collect();
    assert!(sent.starts_with(&old));
    assert!(
        old.len() + 20_004 > sent.len(),
        "at most the cut frame is lost"
    );
}

#[test]
fn a_driver_that_resets_in_mid_frame_leaves_the_channel_in_step() {
    let mut net = Net::new();
    for number in 0..200 {
        net.queue(&frame(number, 20_000));
    }
    net.rig.kick(TX);
    net.rig.used(TX);
    net.start_again();
    net.send(&frame(5000, 333));
    let mut expected = 0;
    loop {
        let taken = net.take();
        if taken == frame(5000, 333) {
            break;
        }
        assert!(taken == frame(expected, 20_000), "frame {expected}");
        expected += 1;
    }
    assert!((1..200).contains(&expected));
    net.rig.used(TX);
    net.is_healthy();
}

#[test]
fn a_channel_that_lies_is_closed_and_the_next_one_works() {
    let mut net = Net::new();
    let giant = (MOST as u32 + 1).to_be_bytes();
    for lie in [
        &[0, 0, 0, 0][..],
        &[0, 0, 0, 13],
        &giant,
        &[0xff; 4],
        &on_wire(&frame(0, 100))[..50],
        &[0, 0],
        &[],
    ] {
        net.post(0..1, 2000);
        net.deliver(&frame(1, 64));
        net.ours.write_all(lie).unwrap();
        if lie.len() != 4 {
            net.ours.shutdown(std::net::Shutdown::Write).unwrap();
        }
        assert_eq!(net.receive().1, frame(1, 64), "what came before it counts");
        match net.ours.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{lie:?}: {other:?}"),
        }
        net.connect();
        net.is_healthy();
    }
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let mut net = Net::with(u64::MAX);
    net.post(0..16, 2000);
    // `connect` sent some; whatever they signalled is over once the worker answers.
    let next = net.rig.queues[TX].next_used;
    let used_event = |net: &Net, queue: usize, value: u16| {
        let at = net.rig.queues[queue].available + 4 + 2 * 256;
        net.rig.put(at, &value.to_le_bytes());
    };
    let quiet = |net: &Net| {
        net.rig.device.save().unwrap();
        net.rig.device.interrupt().read().is_err()
    };
    quiet(&net);
    // Told only after the fifth frame from now on.
    used_event(&net, TX, next.wrapping_add(4));
    for number in 0..4 {
        net.send(&frame(number, 100));
        net.take();
        assert!(quiet(&net), "frame {number}");
    }
    net.send(&frame(4, 100));
    net.take();
    assert!(!quiet(&net));
    // And on the way in.
    used_event(&net, RX, 2);
    for number in 0..3 {
        net.deliver(&frame(number, 100));
        net.used(RX);
        assert_eq!(quiet(&net), number < 2, "frame {number}");
    }
}

/// The available entry after which the device wants to be kicked.
fn avail_event(net: &Net, queue: usize) -> u16 {
    let at = net.rig.queues[queue].used + 4 + 8 * 256;
    let bytes = net.rig.bytes(at, 2);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

#[test]
fn a_queue_that_used_up_its_turn_is_looked_at_again() {
    // Without a channel, whose own events would wake it, too.
    let mut net = Net::unconnected(u64::MAX);
    for number in 0..256 {
        net.queue(&frame(number, 60));
    }
    net.rig.kick(TX);
    for _ in 0..256 {
        net.used(TX);
    }
    eventually(|| avail_event(&net, TX) == net.rig.queues[TX].next_available);
}

#[test]
fn the_device_asks_for_kicks_only_when_it_has_nothing_to_do() {
    let mut net = Net::with(u64::MAX);
    net.rig.device.save().unwrap();
    let next = net.rig.queues[TX].next_available;
    assert_eq!(avail_event(&net, TX), next, "it wants to hear of the next");
    // The channel is full: whatever comes now is found when it takes more.
    for number in 0..100 {
        net.queue(&frame(number, 20_000));
    }
    net.rig.kick(TX);
    net.rig.device.save().unwrap();
    let asked = avail_event(&net, TX);
    assert_ne!(asked, net.rig.queues[TX].next_available);
    for number in 0..100 {
        assert!(net.take() == frame(number, 20_000), "frame {number}");
    }
    eventually(|| avail_event(&net, TX) == net.rig.queues[TX].next_available);
    net.send(&frame(100, 60));
    assert_eq!(net.take(), frame(100, 60));
    // On the way in it wants to hear of buffers when a frame waits for more of them.
    net.post(0..2, 100);
    net.deliver(&frame(0, 250));
    eventually(|| avail_event(&net, RX) == 2);
    net.post(2..3, 100);
    assert_eq!(net.receive().1, frame(0, 250));
}

/// UDP from 10.213.0.1:53 to 10.213.0.2:1234 with a checksum that nobody made.
fn datagram() -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0, 0, 31, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend([
        10, 213, 0, 1, 10, 213, 0, 2, 0, 53, 4, 210, 0, 11, 0x11, 0x11,
    ]);
    frame.extend(b"hi!");
    frame
}

#[test]
fn the_guest_is_told_where_a_checksum_is_to_be_filled_in() {
    let mut net = Net::new();
    net.post(0..2, 2000);
    net.deliver(&datagram());
    let (header, received, _) = net.receive();
    assert_eq!(header, [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0]);
    let mut expected = datagram();
    expected[40..42].copy_from_slice(&[0x15, 0xc9]);
    assert_eq!(received, expected);
    // A ping has a checksum of its own, which its sender made.
    let mut ping = datagram();
    ping[23] = 1;
    net.deliver(&ping);
    let (header, received, _) = net.receive();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(received, ping);
}

#[test]
fn a_driver_that_takes_no_partial_checksums_gets_whole_ones() {
    let mut net = Net::with(!EVENT_IDX & !GUEST_CSUM);
    net.post(0..1, 2000);
    net.deliver(&datagram());
    let (header, received, _) = net.receive();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    // 15c9 + 0035 + 04d2 + 000b + 6869 + 2100 = a444, and the complement of that.
    assert_eq!(received[40..42], [0x5b, 0xbb]);
}

#[test]
fn frames_that_no_channel_can_carry_are_dropped_alone() {
    let mut net = Net::new();
    net.queue(&frame(1, 60));
    for length in [12, 13, 12 + 13, 12 + MOST as u32 + 1, 32 << 20, 40 << 20] {
        let slot = net.tx % 256;
        net.tx += 1;
        net.rig.chain(TX, slot, &[(TX_DATA, length, false)]);
        net.rig.offer(TX, slot);
    }
    net.queue(&frame(2, 60));
    net.rig.kick(TX);
    for _ in 0..8 {
        net.rig.used(TX);
    }
    assert_eq!(net.take(), frame(1, 60));
    assert_eq!(net.take(), frame(2, 60));
    net.is_healthy();
}

#[test]
fn a_saved_device_goes_on_and_a_restored_one_waits_for_its_channel() {
    let mut net = Net::with(u64::MAX);
    net.post(0..4, 500);
    net.rig.device.save().unwrap();
    net.is_healthy();
    let state = net.rig.device.save().unwrap();
    net.rig.device.shut_down();
    let (copy, host) = make(net.rig.memory.clone(), MAC, 65_520, net.faults.sink()).unwrap();
    copy.restore(&state).unwrap();
    net.rig.device = copy;
    net.host = host;
    net.connect();
    // Its driver merges, as before.
    net.deliver(&frame(3, 1000));
    let (_, received, heads) = net.receive();
    assert_eq!((received, heads.len()), (frame(3, 1000), 3));
    net.is_healthy();
}
