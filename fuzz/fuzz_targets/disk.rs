//! A driver that does with the disk's queue and with memory whatever it likes: nothing panics, and
//! what reaches the back-end is inside the disk and bounded.

#![no_main]

use std::io;

use fuzz::driver::{DATA, Driver, Input};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;
use vmm::virtio::block::{BlockBackend, SECTOR_SIZE};
use vmm::virtio::fuzz::Hands;

const SECTORS: u64 = 1000;
/// The disk's last bytes are no sector.
const CAPACITY: u64 = SECTORS * SECTOR_SIZE + 100;
const MOST: u64 = 32 << 20;

struct Checked {
    calls: u64,
}

impl Checked {
    fn range(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).expect("an end");
        assert!(end <= SECTORS * SECTOR_SIZE, "{length} bytes at {offset}");
        assert!(offset.is_multiple_of(SECTOR_SIZE) && length.is_multiple_of(SECTOR_SIZE));
        self.calls += 1;
        match self.calls % 8 {
            6 => Err(io::Error::from_raw_os_error(libc::EIO)),
            7 => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            _ => Ok(()),
        }
    }

    fn slices(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let length = buffers.iter().map(|slice| slice.len() as u64).sum();
        assert!(length <= MOST, "{length} bytes at once");
        self.range(offset, length)
    }
}

impl BlockBackend for Checked {
    fn capacity(&self) -> io::Result<u64> {
        Ok(CAPACITY)
    }

    fn read(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        for slice in buffers.iter().filter(|slice| !slice.is_empty()) {
            slice.copy_from(&[0x5a_u8][..]);
        }
        self.slices(buffers, offset)
    }

    fn write(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.slices(buffers, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.range(0, 0)
    }

    fn punch_hole(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.range(offset, length)
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.range(offset, length)
    }
}

/// A request as a well-meaning driver would make it, of any kind, place and size.
fn request(driver: &mut Driver, input: &mut Input<'_>) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 0, 1];
    let kind = match input.byte() {
        known @ ..=0xf0 => KINDS[usize::from(known % 8)],
        _ => input.u32(),
    };
    let head = u16::from(input.byte() % 16);
    let header = DATA + 0x40 * u64::from(head);
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(input.number().to_le_bytes());
    driver.put(header, &bytes);
    let to_device = matches!(kind, 1 | 11 | 13);
    let mut buffers = vec![(header, 16, false)];
    for number in 0..input.byte() % 6 {
        let at = DATA + 0x1000 * (1 + u64::from(number));
        if matches!(kind, 11 | 13) {
            // A range: sector, sectors, flags.
            let mut range = input.number().to_le_bytes().to_vec();
            range.extend((input.number() as u32).to_le_bytes());
            range.extend(u32::from(input.byte() & 3).to_le_bytes());
            driver.put(at, &range);
            buffers.push((at, 16, false));
        } else {
            let length = match input.byte() {
                sectors @ ..=0xf0 => u32::from(sectors % 9) * 512,
                _ => input.number() as u32,
            };
            buffers.push((at, length, !to_device));
        }
    }
    buffers.push((DATA + 0x8000 + u64::from(head), 1, true));
    driver.chain(0, head, &buffers);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut driver = Driver::new();
    let backend = Box::new(Checked { calls: 0 });
    let mut disk = Hands::disk(driver.memory.clone(), backend).expect("a disk");
    disk.restart(input.byte() & 1 == 1);
    while !input.is_empty() {
        match input.byte() % 8 {
            0 | 1 => request(&mut driver, &mut input),
            2 => driver.odd_descriptor(0, &mut input),
            3 => driver.offer(0, u16::from(input.byte())),
            4 => {
                let at = DATA + 16 * u64::from(input.byte());
                let length = usize::from(input.byte());
                driver.put(at, input.take(length));
            }
            5 => driver.claim(0, input.u16()),
            6 => {
                driver.forget();
                disk.restart(input.byte() & 1 == 1);
            }
            _ => disk.kick(0),
        }
    }
    disk.kick(0);
    disk.stir();
});
