//! A driver that breaks the rules of the rings. Each ends in a device that asks for a reset and says
//! why, with nothing written and nobody else harmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm::virtio::rng::rng;

use crate::block::file_disk;
use crate::rig::{DATA, Faults, INDIRECT, NEXT, Rig, WRITE, memory};

fn live() -> Rig {
    let memory = memory();
    Rig::live(
        rng(memory.clone(), Faults::default().sink()).unwrap(),
        memory,
        &[8],
    )
}

fn breaks(mut rig: Rig, head: u16, reason: &str) {
    rig.offer(0, head);
    rig.kick(0);
    assert!(rig.broken().contains(reason), "{}", rig.reason());
    assert!(rig.used_now(0).is_none());
}

#[test]
fn an_impossible_available_index_breaks_the_device() {
    for index in [9, 1000, u16::MAX] {
        let rig = live();
        rig.claim(0, index);
        rig.kick(0);
        assert!(
            rig.broken().contains("available index is impossible"),
            "{}",
            rig.reason()
        );
    }
}

#[test]
fn the_machine_hears_of_a_device_that_its_driver_broke_but_not_without_end() {
    let (memory, faults) = (memory(), Faults::default());
    let device = rng(memory.clone(), faults.sink()).unwrap();
    let mut rig = Rig::new(device, memory);
    for round in 0..30 {
        rig.bring_up(&[8], u64::MAX);
        rig.claim(0, 1000);
        rig.kick(0);
        rig.broken();
        if round == 0 {
            let heard = faults.heard();
            assert_eq!(heard.len(), 1);
            assert!(heard[0].to_string().contains("impossible"), "{heard:?}");
        }
    }
    assert_eq!(faults.heard().len(), 10);
    assert!(faults.all().is_empty(), "the machine goes on");
}

#[test]
fn a_looping_chain_breaks_the_device() {
    let rig = live();
    rig.descriptor(0, 0, (DATA, 16, NEXT | WRITE, 1));
    rig.descriptor(0, 1, (DATA, 16, NEXT | WRITE, 0));
    breaks(rig, 0, "loops");
    let rig = live();
    rig.descriptor(0, 3, (DATA, 16, NEXT | WRITE, 3));
    breaks(rig, 3, "loops");
}

#[test]
fn a_chain_that_leaves_its_table_breaks_the_device() {
    let rig = live();
    rig.descriptor(0, 0, (DATA, 16, NEXT | WRITE, 8));
    breaks(rig, 0, "leaves its table");
    breaks(live(), 8, "leaves its table");
    breaks(live(), u16::MAX, "leaves its table");
}

#[test]
fn overlapping_chains_are_served_as_what_they_say() {
    let mut rig = live();
    rig.descriptor(0, 0, (DATA, 16, NEXT | WRITE, 2));
    rig.descriptor(0, 1, (DATA, 16, NEXT | WRITE, 2));
    rig.descriptor(0, 2, (DATA + 16, 16, WRITE, 0));
    for head in [0, 1, 0, 2] {
        rig.offer(0, head);
    }
    rig.kick(0);
    assert_eq!(
        (0..4).map(|_| rig.used(0)).collect::<Vec<_>>(),
        [(0, 32), (1, 32), (0, 32), (2, 16)]
    );
}

#[test]
fn an_overlong_chain_breaks_the_device() {
    let (rig, _) = file_disk(&Faults::default());
    let buffers = vec![(DATA, 16, false); 200];
    rig.chain(0, 0, &buffers);
    breaks(rig, 0, "more than 128 descriptors");
}

#[test]
fn an_overlong_indirect_table_breaks_the_device() {
    let (rig, _) = file_disk(&Faults::default());
    for i in 0..1000 {
        rig.descriptor_at(DATA, i, (DATA, 16, NEXT, i + 1));
    }
    rig.descriptor(0, 0, (DATA, 16_000, INDIRECT, 0));
    breaks(rig, 0, "more than 128 descriptors");
}

#[test]
fn nested_empty_and_broken_indirect_tables_break_the_device() {
    for (length, flags) in [(32, INDIRECT), (0, 0), (17, 0), (16, NEXT)] {
        let rig = live();
        rig.descriptor_at(DATA, 0, (DATA + 0x1000, 16, flags | WRITE, 1));
        rig.descriptor(0, 0, (DATA, length, INDIRECT, 0));
        breaks(rig, 0, "loops, leaves its table");
    }
    let rig = live();
    rig.descriptor(0, 0, (u64::MAX - 100, 16, INDIRECT, 0));
    breaks(rig, 0, "cannot be read");
}

#[test]
fn a_readable_buffer_after_a_writable_one_breaks_the_device() {
    let rig = live();
    rig.chain(0, 0, &[(DATA, 16, true), (DATA, 16, false)]);
    breaks(rig, 0, "readable buffer after a writable one");
}

#[test]
fn zero_length_buffers_are_harmless_wherever_they_point() {
    let mut rig = live();
    rig.chain(
        0,
        0,
        &[(u64::MAX, 0, true), (DATA, 8, true), (1 << 50, 0, true)],
    );
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 8));
}

#[test]
fn giant_buffers_break_the_device() {
    let rig = live();
    rig.chain(0, 0, &[(DATA, u32::MAX, true)]);
    breaks(rig, 0, "outside guest memory");
    let rig = live();
    rig.chain(0, 0, &[(u64::MAX - 4, 16, true)]);
    breaks(rig, 0, "outside guest memory");
}

#[test]
fn a_header_that_changes_while_it_is_used_is_used_as_first_read() {
    // Another vCPU flips the request between a read of sector 0 and one far beyond the end. Whatever
    // was read first counts as a whole: it succeeds, or it is declined; the device never breaks and
    // never reads past the disk.
    let (mut rig, _) = file_disk(&Faults::default());
    let (header, body, answer) = (DATA, DATA + 0x1000, DATA + 0x100);
    let memory = rig.memory.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let flipper = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut sector = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                sector = !sector;
                vm_memory::Bytes::write_obj(&memory, sector, vm_memory::GuestAddress(header + 8))
                    .unwrap();
            }
        })
    };
    rig.put(header, &[0; 16]);
    rig.chain(
        0,
        0,
        &[(header, 16, false), (body, 512, true), (answer, 1, true)],
    );
    for _ in 0..2000 {
        rig.offer(0, 0);
        rig.kick(0);
        let (_, written) = rig.used(0);
        let status = rig.bytes(answer, 1)[0];
        assert!(
            matches!((status, written), (0, 513) | (1, 1)),
            "{status} {written}"
        );
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
}

#[test]
fn an_event_storm_on_one_queue_does_not_starve_a_reset() {
    // One thread kicks for ever and makes everything available again; the reset still comes through.
    let mut rig = live();
    for head in 0..8 {
        rig.chain(0, head, &[(DATA, 4096, true)]);
    }
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let device = &rig.device;
        let memory = rig.memory.clone();
        let queue = rig.queues[0];
        let stop_storm = Arc::clone(&stop);
        scope.spawn(move || {
            let mut index = 0_u16;
            while !stop_storm.load(Ordering::Relaxed) {
                use vm_memory::Bytes as _;
                let used: u16 = memory
                    .load(vm_memory::GuestAddress(queue.used + 2), Ordering::Acquire)
                    .unwrap();
                index = index.max(used.wrapping_add(8));
                let at = vm_memory::GuestAddress(queue.available + 2);
                memory
                    .store(used.wrapping_add(8), at, Ordering::Release)
                    .unwrap();
                device.write(0x50, &0_u32.to_le_bytes());
            }
        });
        for _ in 0..20 {
            device.write(crate::rig::STATUS, &0_u32.to_le_bytes());
            let mut status = [0xff; 4];
            device.read(crate::rig::STATUS, &mut status);
            assert_eq!(status, [0; 4]);
        }
        stop.store(true, Ordering::Relaxed);
    });
    rig.bring_up(&[8], !crate::rig::EVENT_IDX);
    rig.chain(0, 0, &[(DATA, 16, true)]);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 16));
}
