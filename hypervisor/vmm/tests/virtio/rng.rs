//! The source of randomness.

use vmm::virtio::rng::rng;

use crate::rig::{DATA, Faults, Rig, memory};

fn live() -> Rig {
    let memory = memory();
    Rig::live(
        rng(memory.clone(), Faults::default().sink()).unwrap(),
        memory,
        &[64],
    )
}

#[test]
fn buffers_are_filled_and_no_two_alike() {
    let mut rig = live();
    let mut seen = Vec::new();
    for i in 0..3_u64 {
        rig.chain(0, 0, &[(DATA, 100, true), (DATA + 0x1000, 28, true)]);
        rig.offer(0, 0);
        rig.kick(0);
        assert_eq!(rig.used(0), (0, 128), "round {i}");
        let mut bytes = rig.bytes(DATA, 100);
        bytes.extend(rig.bytes(DATA + 0x1000, 28));
        assert!(!seen.contains(&bytes));
        assert!(bytes.iter().any(|b| *b != 0));
        seen.push(bytes);
    }
}

#[test]
fn a_giant_buffer_gets_a_short_answer_and_nothing_beyond_it() {
    let mut rig = live();
    rig.chain(0, 0, &[(DATA, 32 << 20, true)]);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 4096));
    assert!(rig.bytes(DATA + 4096, 4096).iter().all(|b| *b == 0));
}

#[test]
fn nothing_is_written_where_the_driver_did_not_ask_for_it() {
    let mut rig = live();
    rig.chain(0, 0, &[(DATA, 64, false)]);
    rig.offer(0, 0);
    rig.kick(0);
    assert_eq!(rig.used(0), (0, 0));
    assert!(rig.bytes(DATA, 64).iter().all(|b| *b == 0));
}
