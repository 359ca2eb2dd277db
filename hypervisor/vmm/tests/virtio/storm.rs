//! Random registers, random rings: whatever a guest writes, nothing panics, nothing hangs, and the
//! machine hears of no fault.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vmm::virtio::block::{FileBackend, block};
use vmm::virtio::net::net;
use vmm::virtio::rng::rng;
use vmm::virtio::vsock::{VsockEvents, vsock};
use vmm::virtio::{GuestMemory, VirtioMmio};

use crate::rig::{DATA, EVENT_IDX, Faults, Rig, STATUS, memory};

fn devices(memory: &GuestMemory, faults: &Faults) -> Vec<(VirtioMmio, Vec<u16>)> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let (sender, _events) = VsockEvents::channel().unwrap();
    let backend = Box::new(FileBackend::new(file));
    let (vsock, _host) = vsock(memory.clone(), 3, faults.sink(), sender).unwrap();
    let (net, channel) = net(memory.clone(), [2; 6], 65_520, faults.sink()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    channel.attach(theirs);
    // Frames wait for whatever buffers there are, and one that never comes as a whole.
    (&ours)
        .write_all(
            &[
                &[0, 0, 0, 60][..],
                &[8; 60],
                &[0, 0, 5, 220],
                &[8; 1500],
                &[0, 0, 0, 99],
            ]
            .concat(),
        )
        .unwrap();
    vec![
        (net, vec![16, 16]),
        (rng(memory.clone(), faults.sink()).unwrap(), vec![16]),
        (
            block(memory.clone(), backend, faults.sink()).unwrap(),
            vec![16],
        ),
        (vsock, vec![16, 16, 16]),
    ]
}

/// Registers that do something, more often than nonsense.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => prop::sample::select(vec![
            0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
        ]),
        1 => 0..0x200_u64,
        1 => any::<u64>(),
    ]
}

fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 0x40, 0x80, 0x1_0000, 0x1_4000, 0x1_8000]),
        1 => any::<u32>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => DATA..DATA + 0x1000,
        2 => 0..crate::rig::MEMORY_SIZE + 0x1000,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => prop::sample::select(vec![0, 1, 11, 12, 15, 16, 17, 43, 44, 45, 512, 513, 4096]),
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    (address(), length(), 0..8_u16, 0..18_u16)
}

fn proves_alive(device: &VirtioMmio, faults: &Faults) {
    // A reset is answered by the device's thread: it is neither dead nor stuck.
    device.write(STATUS, &0_u32.to_le_bytes());
    let mut status = [0xff; 4];
    device.read(STATUS, &mut status);
    assert_eq!(status, [0; 4]);
    assert!(device.save().is_some());
    assert_eq!(faults.all(), []);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_registers_never_panic_or_hang(
        writes in prop::collection::vec((offset(), value(), 0..9_usize), 1..300)
    ) {
        let (memory, faults) = (memory(), Faults::default());
        for (device, _) in devices(&memory, &faults) {
            for (offset, value, width) in &writes {
                let bytes: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(*width).collect();
                // Most accesses have the right width.
                if *width < 6 {
                    device.write(*offset, &value.to_le_bytes());
                } else {
                    device.write(*offset, &bytes);
                }
                device.read(*offset, &mut vec![0; *width]);
            }
            proves_alive(&device, &faults);
        }
    }

    #[test]
    fn random_rings_never_panic_or_hang(
        tables in prop::collection::vec(prop::collection::vec(descriptor(), 16), 3),
        heads in prop::collection::vec(0..17_u16, 1..16),
        indirect in prop::collection::vec(descriptor(), 16),
        bytes in prop::collection::vec(any::<u8>(), 0x200),
        plausible in any::<bool>(),
        index in prop_oneof![3 => Just(None), 1 => any::<u16>().prop_map(Some)],
    ) {
        let (memory, faults) = (memory(), Faults::default());
        for (device, sizes) in devices(&memory, &faults) {
            let mut rig = Rig::new(device, memory.clone());
            rig.bring_up(&sizes, !EVENT_IDX);
            for (i, value) in (0..).zip(&indirect) {
                rig.descriptor_at(DATA + 0x800, i, *value);
            }
            rig.put(DATA, &bytes);
            if plausible {
                // A header that gets past the first checks: a vsock packet of ours, or a disk write.
                rig.put(DATA, &3_u64.to_le_bytes());
                rig.put(DATA + 8, &2_u64.to_le_bytes());
                rig.put(DATA + 28, &[1, 0, bytes[30] % 9, 0]);
            }
            for (queue, table) in tables.iter().enumerate().take(sizes.len()) {
                for (i, value) in (0..).zip(table) {
                    rig.descriptor(queue, i, *value);
                }
                for head in &heads {
                    rig.offer(queue, *head);
                }
                if let Some(index) = index {
                    rig.claim(queue, index);
                }
                rig.kick(queue);
            }
            proves_alive(&rig.device, &faults);
        }
    }
}
