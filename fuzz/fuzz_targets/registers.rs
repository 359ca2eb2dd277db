//! Accesses to a device's registers in any order and of any width, with memory that changes between
//! them, against the real device with its thread: nothing panics, nothing hangs, and a status that
//! was never granted is never read back.

#![no_main]

use fuzz::driver::{DATA, Driver, Input};
use libfuzzer_sys::fuzz_target;
use vmm::virtio::FaultSink;
use vmm::virtio::rng::rng;

const STATUS: u64 = 0x70;
/// What a driver writes to bring the device up, so that inputs get there soon.
const SET_UP: [(u64, u32); 14] = [
    (STATUS, 0),
    (STATUS, 1),
    (STATUS, 3),
    (0x24, 1),
    (0x20, 1),
    (STATUS, 11),
    (0x30, 0),
    (0x38, 16),
    (0x80, 0),
    (0x90, 0x400),
    (0xa0, 0x800),
    (0x44, 1),
    (STATUS, 15),
    (0x50, 0),
];

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut driver = Driver::new();
    let sink = FaultSink::new(|fault| assert!(!fault.reason.is_fatal(), "{fault}"));
    let device = rng(driver.memory.clone(), sink).expect("a device");
    while !input.is_empty() {
        match input.byte() % 8 {
            0 => {
                let upto = usize::from(input.byte()) % (SET_UP.len() + 1);
                for (offset, value) in &SET_UP[..upto] {
                    device.write(*offset, &value.to_le_bytes());
                }
            }
            1 | 2 => {
                let offset = u64::from(input.byte()) & !3;
                device.write(offset, &(input.number() as u32).to_le_bytes());
            }
            3 => {
                let (offset, value) = (input.number(), input.number().to_le_bytes());
                let width = usize::from(input.byte() % 9);
                device.write(offset, &value[..width]);
            }
            4 => {
                let offset = input.number();
                let mut data = [0xaa; 8];
                device.read(offset, &mut data[..usize::from(input.byte() % 9)]);
            }
            5 => {
                driver.odd_descriptor(0, &mut input);
                driver.offer(0, u16::from(input.byte()));
            }
            6 => {
                let length = u32::from(input.byte());
                driver.chain(0, u16::from(input.byte() % 16), &[(DATA, length, true)]);
            }
            _ => {
                device.write(0x50, &u32::from(input.byte() & 1).to_le_bytes());
                let mut status = [0; 4];
                device.read(STATUS, &mut status);
                let status = u32::from_le_bytes(status);
                assert!(status & !0xcf == 0, "status {status:#x}");
                // Live means that the features were accepted before.
                assert!(status & 4 == 0 || status & 8 != 0, "status {status:#x}");
            }
        }
    }
    device.shut_down();
});
