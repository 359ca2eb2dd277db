//! Registers, status machine and queue set-up.

use vmm::virtio::rng::rng;

use crate::rig::{DATA, Faults, MEMORY_SIZE, NEEDS_RESET, Rig, STATUS, WRITE, memory};

fn device() -> Rig {
    let memory = memory();
    Rig::new(
        rng(memory.clone(), Faults::default().sink()).unwrap(),
        memory,
    )
}

#[test]
fn a_driver_finds_the_device_it_looks_for() {
    let rig = device();
    assert_eq!(rig.get(0), 0x7472_6976);
    assert_eq!(rig.get(4), 2);
    assert_eq!(rig.get(8), 4);
    assert_ne!(rig.features() & (1 << 32), 0, "VERSION_1");
}

#[test]
fn unknown_registers_and_wrong_widths_read_zero_and_take_nothing() {
    let rig = device();
    for offset in [0x1c, 0x40, 0x54, 0x68, 0xc0, 0x100, 0x1ff, 0x1000, u64::MAX] {
        rig.set(offset, u32::MAX);
        assert_eq!(rig.get(offset), 0, "{offset:#x}");
    }
    for length in [0, 1, 2, 3, 8, 16] {
        let mut bytes = vec![0xff; length];
        rig.device.read(0, &mut bytes);
        assert!(bytes.iter().all(|b| *b == 0));
        rig.device.write(STATUS, &vec![1; length]);
        assert_eq!(rig.get(STATUS), 0);
    }
    rig.device.read(1, &mut [0; 4]);
    assert_eq!(rig.get(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn a_status_out_of_order_is_refused_with_a_reason() {
    for (steps, bad) in [
        (&[][..], 4),
        (&[1], 9),
        (&[1, 3], 7),
        (&[1, 3], 15),
        (&[1, 3], 1),
    ] {
        let rig = device();
        for step in steps {
            rig.set(STATUS, *step);
        }
        let before = rig.get(STATUS);
        rig.set(STATUS, bad);
        assert_eq!(rig.get(STATUS), before, "{steps:?} then {bad:#x}");
        assert!(rig.reason().contains("status"), "{}", rig.reason());
    }
}

#[test]
fn features_that_were_not_offered_are_not_ok() {
    for (low, high) in [(1, 1), (0, 0), (0, 3)] {
        let rig = device();
        rig.set(STATUS, 1);
        rig.set(STATUS, 3);
        rig.set(0x24, 0);
        rig.set(0x20, low);
        rig.set(0x24, 1);
        rig.set(0x20, high);
        rig.set(STATUS, 11);
        assert_eq!(rig.get(STATUS), 3, "{low:#x} {high:#x}");
        assert!(rig.reason().contains("features"), "{}", rig.reason());
    }
}

#[test]
fn features_cannot_change_once_they_are_ok() {
    let mut rig = device();
    rig.bring_up(&[8], u64::MAX);
    rig.set(0x24, 0);
    rig.set(0x20, 0);
    assert!(
        rig.reason().contains("features written"),
        "{}",
        rig.reason()
    );
}

fn negotiated() -> Rig {
    let rig = device();
    rig.set(STATUS, 1);
    rig.set(STATUS, 3);
    rig.set(0x24, 1);
    rig.set(0x20, 1);
    rig.set(STATUS, 11);
    rig
}

#[test]
fn queue_sizes_that_are_no_power_of_two_or_too_large_are_refused() {
    for size in [0, 3, 63, 65, 128, 0x1_0000, u32::MAX] {
        let rig = negotiated();
        rig.set(0x38, size);
        assert!(
            rig.reason().contains("queue size"),
            "{size}: {}",
            rig.reason()
        );
    }
}

#[test]
fn a_queue_that_is_set_up_twice_keeps_its_first_set_up() {
    let mut rig = negotiated();
    rig.set_up_queue(0, 8);
    rig.set(0x80, 0x9_0000);
    assert!(rig.reason().contains("already set up"), "{}", rig.reason());
    rig.set(0x44, 1);
    rig.set(0x38, 16);
    rig.set(STATUS, 15);
    rig.chain(0, 0, &[(DATA, 16, true)]);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 16), "the first addresses are in use");
}

#[test]
fn queues_outside_memory_or_misaligned_are_not_made_ready() {
    let good = [0x1_0000, 0x1_4000, 0x1_8000];
    let end = MEMORY_SIZE;
    for (area, bad) in [
        (0, end),
        (0, end - 16),
        (0, !15),
        (0, 0x1_0008),
        (0, 0),
        (1, end),
        (1, end - 2),
        (1, 0x1_4001),
        (1, u64::MAX - 1),
        (2, end - 4),
        (2, 0x1_8002),
        (2, u64::MAX - 3),
    ] {
        let rig = negotiated();
        let mut addresses = good;
        addresses[area] = bad;
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(addresses) {
            rig.set(register, address as u32);
            rig.set(register + 4, (address >> 32) as u32);
        }
        rig.set(0x44, 1);
        assert_eq!(rig.get(0x44), 0, "area {area} at {bad:#x}");
        let reason = rig.reason();
        assert!(
            reason.contains("outside guest memory") || reason.contains("aligned"),
            "{reason}"
        );
    }
}

#[test]
fn queues_cannot_be_set_up_before_features_are_ok_or_after_the_device_is_live() {
    let rig = device();
    rig.set(0x38, 8);
    assert!(rig.reason().contains("queue set up"), "{}", rig.reason());
    let mut rig = device();
    rig.bring_up(&[], u64::MAX);
    rig.set(0x38, 8);
    rig.set(0x44, 1);
    assert_eq!(rig.get(0x44), 0);
    assert!(rig.reason().contains("queue set up"), "{}", rig.reason());
}

#[test]
fn a_queue_that_does_not_exist_is_refused() {
    let rig = negotiated();
    rig.set(0x30, 7);
    assert_eq!(rig.get(0x34), 0);
    rig.set(0x38, 8);
    assert!(rig.reason().contains("queue 7"), "{}", rig.reason());
    rig.kick(9);
    assert!(rig.reason().contains("queue 9"), "{}", rig.reason());
}

#[test]
fn a_queue_can_be_taken_back_alone() {
    let mut rig = device();
    rig.bring_up(&[8], u64::MAX);
    rig.set(0x30, 0);
    rig.set(0x44, 0);
    assert_eq!(rig.get(0x44), 0);
    rig.kick(0);
    assert_eq!(rig.get(STATUS), 15);
}

#[test]
fn a_reset_brings_a_broken_device_back() {
    let mut rig = device();
    rig.bring_up(&[8], !crate::rig::EVENT_IDX);
    rig.claim(0, 500);
    rig.kick(0);
    assert!(rig.broken().contains("available index"), "{}", rig.reason());
    assert_ne!(rig.get(0x60) & 2, 0, "the driver hears of it");
    rig.bring_up(&[8], !crate::rig::EVENT_IDX);
    assert_eq!(rig.get(STATUS) & NEEDS_RESET, 0);
    rig.chain(0, 0, &[(DATA, 16, true)]);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 16));
}

#[test]
fn a_failed_driver_stops_the_device_until_a_reset() {
    let mut rig = device();
    rig.bring_up(&[8], !crate::rig::EVENT_IDX);
    rig.set(STATUS, 0x8f);
    rig.descriptor(0, 0, (DATA, 16, WRITE, 0));
    rig.offer(0, 0);
    rig.kick(0);
    // Saving makes the worker answer after the kick, so nothing is in flight here.
    let state = rig.device.save().unwrap();
    assert_eq!(state.queues[0].next_available, 0);
    assert!(rig.used_now(0).is_none());
}

#[test]
fn a_live_device_goes_on_after_save_and_its_copy_goes_on_where_it_was() {
    let mut rig = device();
    rig.bring_up(&[8], !crate::rig::EVENT_IDX);
    for _ in 0..3 {
        rig.chain(0, 0, &[(DATA, 16, true)]);
        rig.offer(0, 0);
        rig.kick(0);
        rig.used(0);
    }
    let state = rig.device.save().unwrap();
    assert_eq!(
        (state.queues[0].next_available, state.queues[0].next_used),
        (3, 3)
    );
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 16), "the original goes on");

    rig.device.shut_down();
    // Back to the memory of the save: the fourth chain is offered and not yet done.
    rig.put(rig.queues[0].used + 2, &3_u16.to_le_bytes());
    rig.queues[0].next_used = 3;
    let copy = rng(rig.memory.clone(), Faults::default().sink()).unwrap();
    copy.restore(&state).unwrap();
    assert!(
        copy.restore(&state).is_err(),
        "only a fresh device is restored"
    );
    rig.device = copy;
    assert_eq!(rig.used(0), (0, 16));
}

#[test]
fn with_event_idx_the_driver_is_interrupted_where_it_asked_also_after_a_restore() {
    let mut rig = device();
    rig.bring_up(&[8], u64::MAX);
    let queue = rig.queues[0];
    let used_event = queue.available + 4 + 2 * 8;
    let round = |rig: &mut Rig| {
        rig.chain(0, 0, &[(DATA, 16, true)]);
        rig.offer(0, 0);
        rig.kick(0);
    };
    // Asks to hear of the third completion only.
    rig.put(used_event, &2_u16.to_le_bytes());
    round(&mut rig);
    round(&mut rig);
    // A save waits for the worker, which by then has done the two rounds and signalled nothing.
    while rig.device.save().unwrap().queues[0].next_used < 2 {}
    assert!(rig.device.interrupt().read().is_err(), "not yet");
    let state = rig.device.save().unwrap();
    rig.device.shut_down();
    rig.device = rng(rig.memory.clone(), Faults::default().sink()).unwrap();
    rig.device.restore(&state).unwrap();
    round(&mut rig);
    assert!(
        crate::rig::wait_readable(rig.device.interrupt()),
        "the third"
    );
    assert_eq!(rig.get(0x60), 1);
    // The device asks to be kicked for the entry that comes next.
    while rig.bytes(queue.used + 4 + 8 * 8, 2) != 3_u16.to_le_bytes() {
        std::thread::yield_now();
    }
}

#[test]
fn a_state_that_no_driver_could_have_made_is_not_restored() {
    let mut rig = device();
    rig.bring_up(&[8], u64::MAX);
    let good = rig.device.save().unwrap();
    let mut outside = good.clone();
    outside.queues[0].descriptors = MEMORY_SIZE;
    let mut size = good.clone();
    size.queues[0].size = 7;
    let mut count = good.clone();
    count.queues.clear();
    let mut status = good.clone();
    status.status = 5;
    let mut features = good;
    features.driver_features = u64::MAX;
    for state in [outside, size, count, status, features] {
        let fresh = rng(rig.memory.clone(), Faults::default().sink()).unwrap();
        assert!(fresh.restore(&state).is_err(), "{state:?}");
    }
}

#[test]
fn accesses_after_the_end_are_harmless() {
    let mut rig = device();
    rig.bring_up(&[8], u64::MAX);
    rig.device.shut_down();
    rig.device.shut_down();
    rig.kick(0);
    assert!(rig.device.save().is_none());
    rig.set(STATUS, 0);
    assert_eq!(rig.get(STATUS), 0);
}
