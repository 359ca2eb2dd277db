//! A driver of the network interface that breaks the rules, on either queue. The device asks for a
//! reset and says why, the channel stays in step, and after the reset both work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::net_rig::{Net, RX, TX, TX_DATA, frame};
use crate::rig::{DATA, EVENT_IDX, INDIRECT, NEXT, STATUS, WRITE};

/// What a driver does wrong on `queue`, where `flag` is the right direction, and what it is told.
type Wrong = (fn(&mut Net, queue: usize, flag: u16), &'static str);

const WRONG: &[Wrong] = &[
    (
        |net, queue, _| {
            net.rig
                .claim(queue, net.rig.queues[queue].next_available + 300)
        },
        "available index is impossible",
    ),
    (
        |net, queue, flag| {
            net.rig.descriptor(queue, 0, (DATA, 6, NEXT | flag, 1));
            net.rig.descriptor(queue, 1, (DATA, 6, NEXT | flag, 0));
            net.rig.offer(queue, 0);
        },
        // It is followed no further than the longest chain.
        "more than 64 descriptors",
    ),
    (
        |net, queue, flag| {
            net.rig.descriptor(queue, 0, (DATA, 100, NEXT | flag, 256));
            net.rig.offer(queue, 0);
        },
        "leaves its table",
    ),
    (
        |net, queue, _| net.rig.offer(queue, u16::MAX),
        "leaves its table",
    ),
    (
        |net, queue, flag| {
            let buffers = vec![(DATA, 16, flag == WRITE); 65];
            net.rig.chain(queue, 0, &buffers);
            net.rig.offer(queue, 0);
        },
        "more than 64 descriptors",
    ),
    (
        |net, queue, flag| {
            for i in 0..1000 {
                net.rig
                    .descriptor_at(TX_DATA, i, (DATA, 16, NEXT | flag, i + 1));
            }
            net.rig.descriptor(queue, 0, (TX_DATA, 16_000, INDIRECT, 0));
            net.rig.offer(queue, 0);
        },
        "more than 64 descriptors",
    ),
    (
        |net, queue, flag| {
            net.rig
                .descriptor_at(TX_DATA, 0, (DATA, 16, INDIRECT | flag, 1));
            net.rig.descriptor(queue, 0, (TX_DATA, 32, INDIRECT, 0));
            net.rig.offer(queue, 0);
        },
        "loops, leaves its table",
    ),
    (
        |net, queue, _| {
            net.rig
                .chain(queue, 0, &[(DATA, 100, true), (DATA, 100, false)]);
            net.rig.offer(queue, 0);
        },
        "readable buffer after a writable one",
    ),
    (
        |net, queue, flag| {
            net.rig.chain(queue, 0, &[(DATA, u32::MAX, flag == WRITE)]);
            net.rig.offer(queue, 0);
        },
        "outside guest memory",
    ),
    (
        |net, queue, flag| {
            net.rig
                .chain(queue, 0, &[(u64::MAX - 4, 100, flag == WRITE)]);
            net.rig.offer(queue, 0);
        },
        "outside guest memory",
    ),
    (
        |net, queue, flag| {
            net.rig.chain(
                queue,
                0,
                &[(DATA, 11, flag == WRITE), (DATA, 0, flag == WRITE)],
            );
            net.rig.offer(queue, 0);
        },
        "12-byte header",
    ),
    (
        |net, queue, flag| {
            // All of it in the wrong direction.
            net.rig.chain(queue, 0, &[(DATA, 100, flag != WRITE)]);
            net.rig.offer(queue, 0);
        },
        "12-byte header",
    ),
];

#[test]
fn every_broken_rule_breaks_the_device_until_its_reset() {
    for (number, (wrong, reason)) in WRONG.iter().enumerate() {
        for (queue, flag) in [(TX, 0), (RX, WRITE)] {
            let mut net = Net::new();
            net.deliver(&frame(1, 100));
            wrong(&mut net, queue, flag);
            net.rig.kick(queue);
            let said = net.rig.broken();
            assert!(said.contains(reason), "{number}: {said}");
            assert!(said.contains(&format!("queue {queue}")), "{said}");
            net.start_again();
            // The frame that waited is still there.
            net.post(0..1, 2000);
            assert_eq!(net.receive().1, frame(1, 100));
            net.is_healthy();
        }
    }
}

#[test]
fn empty_buffers_are_harmless_wherever_they_point() {
    let mut net = Net::new();
    net.rig.put(TX_DATA, &[0; 12]);
    net.rig.put(TX_DATA + 12, &frame(1, 60));
    let pieces = [
        (u64::MAX, 0, false),
        (TX_DATA, 12, false),
        (1 << 50, 0, false),
        (TX_DATA + 12, 60, false),
        (u64::MAX - 1, 0, false),
    ];
    net.rig.chain(TX, 100, &pieces);
    net.rig.offer(TX, 100);
    net.rig.kick(TX);
    net.rig.used(TX);
    assert_eq!(net.take(), frame(1, 60));
    net.rig.chain(
        RX,
        0,
        &[(u64::MAX, 0, true), (DATA, 200, true), (1 << 50, 0, true)],
    );
    net.rig.offer(RX, 0);
    net.rig.kick(RX);
    net.deliver(&frame(2, 60));
    assert_eq!(net.rig.used(RX), (0, 72));
    assert_eq!(net.rig.bytes(DATA + 12, 60), frame(2, 60));
}

#[test]
fn a_guest_that_changes_frames_while_they_are_sent_changes_only_their_content() {
    // The socket is full again and again, so that frames are cut and copied, too.
    let mut net = Net::new();
    let memory = net.rig.memory.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let flipper = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut value = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                value = value.wrapping_add(0x0101_0101_0101_0101);
                for at in (TX_DATA..TX_DATA + 0x4000).step_by(8) {
                    vm_memory::Bytes::write_obj(&memory, value, vm_memory::GuestAddress(at))
                        .unwrap();
                }
            }
        })
    };
    let length = |number: usize| 14 + number * 61 % 15_000;
    for round in 0..20 {
        for number in 0..100 {
            let bytes = 12 + length(number) as u32;
            net.rig.chain(TX, number as u16, &[(TX_DATA, bytes, false)]);
            net.rig.offer(TX, number as u16);
        }
        net.rig.kick(TX);
        for number in 0..100 {
            assert_eq!(net.take().len(), length(number), "round {round}");
        }
        for _ in 0..100 {
            net.rig.used(TX);
        }
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    net.is_healthy();
}

#[test]
fn a_storm_of_frames_and_kicks_does_not_starve_a_reset() {
    let mut net = Net::new();
    for head in 0..256 {
        net.rig.chain(TX, head, &[(TX_DATA, 1000, false)]);
        net.rig.offer(TX, head);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut ours = net.other_end();
    std::thread::scope(|scope| {
        // A host that reads without rest, so that nothing else slows the storm.
        let reader = scope.spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while std::io::Read::read(&mut ours, &mut bytes).unwrap() > 0 {}
        });
        let device = &net.rig.device;
        let memory = net.rig.memory.clone();
        let queue = net.rig.queues[TX];
        let stop_storm = Arc::clone(&stop);
        scope.spawn(move || {
            use vm_memory::Bytes as _;
            while !stop_storm.load(Ordering::Relaxed) {
                let used: u16 = memory
                    .load(vm_memory::GuestAddress(queue.used + 2), Ordering::Acquire)
                    .unwrap();
                let at = vm_memory::GuestAddress(queue.available + 2);
                memory
                    .store(used.wrapping_add(256), at, Ordering::Release)
                    .unwrap();
                device.write(0x50, &1_u32.to_le_bytes());
            }
        });
        for _ in 0..20 {
            device.save().unwrap();
        }
        device.write(STATUS, &0_u32.to_le_bytes());
        let mut status = [0xff; 4];
        device.read(STATUS, &mut status);
        assert_eq!(status, [0; 4]);
        stop.store(true, Ordering::Relaxed);
        net.host
            .attach(std::os::unix::net::UnixStream::pair().unwrap().0);
        reader.join().unwrap();
    });
    net.rig.bring_up(&[256, 256], !EVENT_IDX);
    net.connect();
    net.is_healthy();
}
