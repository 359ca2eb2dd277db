//! What the targets of devices have in common: an input that is read piece by piece, and a driver's
//! hands on rings, which check nothing.

#![allow(dead_code)]

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::virtio::GuestMemory;
use vmm::virtio::fuzz::{AVAILABLE, QUEUE_SIZE, QUEUE_STEP, USED};

/// Bytes of guest memory.
pub const MEMORY: u64 = 1 << 20;
/// Where the buffers begin, behind the queues.
pub const DATA: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An input, read from the front; what is missing is zero.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(most.min(self.0.len()));
        self.0 = later;
        now
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// Mostly small, sometimes anything.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            0xff => u64::from(self.u32()) | u64::from(self.u32()) << 32,
            0xfe => u64::MAX - u64::from(self.byte()),
            0xfd => u64::from(self.u32()),
            small => u64::from(small),
        }
    }
}

/// The driver's side of a device's queues.
pub struct Driver {
    pub memory: GuestMemory,
    available: [u16; 3],
}

impl Driver {
    /// One over memory of zeros. Memory is made once for all inputs.
    pub fn new() -> Self {
        thread_local! {
            static ALL: GuestMemory =
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory");
        }
        let memory = ALL.with(Clone::clone);
        let mut driver = Self {
            memory,
            available: [0; 3],
        };
        driver.forget();
        driver.put(DATA, &[0; 0x2_0000]);
        driver
    }

    /// Begins all queues anew.
    pub fn forget(&mut self) {
        self.available = [0; 3];
        self.put(0, &[0; DATA as usize]);
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        // What does not fit is cut: it is the driver's own memory.
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("inside memory");
        bytes
    }

    pub fn u16_at(&self, address: u64) -> u16 {
        self.memory
            .read_obj(GuestAddress(address))
            .expect("inside memory")
    }

    fn descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let table = QUEUE_STEP * queue as u64;
        self.put(table + 16 * u64::from(index % QUEUE_SIZE), &bytes);
    }

    /// Any descriptor, mostly one that makes sense.
    pub fn odd_descriptor(&self, queue: usize, input: &mut Input<'_>) {
        let (index, flags) = (u16::from(input.byte()), u16::from(input.byte()));
        let address = match input.number() {
            small @ ..=0xff => DATA + small * 0x100,
            other => other,
        };
        let length = input.number() as u32;
        let next = u16::from(input.byte());
        // The low bits are what the ring knows; the rest goes high, where nobody looks.
        self.descriptor(
            queue,
            index,
            address,
            length,
            flags & 7 | flags << 8 & 0x8000,
            next,
        );
    }

    /// A chain that keeps the rules, from `head` on: (address, length, written by the device).
    pub fn chain(&mut self, queue: usize, head: u16, buffers: &[(u64, u32, bool)]) {
        for (place, (address, length, write)) in (0_u16..).zip(buffers) {
            let more = usize::from(place) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if *write { WRITE } else { 0 };
            let index = (head + place) % QUEUE_SIZE;
            self.descriptor(
                queue,
                index,
                *address,
                *length,
                flags,
                (index + 1) % QUEUE_SIZE,
            );
        }
        self.offer(queue, head % QUEUE_SIZE);
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = QUEUE_STEP * queue as u64 + AVAILABLE;
        let index = &mut self.available[queue];
        let slot = ring + 4 + 2 * u64::from(*index % QUEUE_SIZE);
        *index = index.wrapping_add(1);
        let index = *index;
        self.put(slot, &head.to_le_bytes());
        self.put(ring + 2, &index.to_le_bytes());
    }

    /// Claims that so many chains are available.
    pub fn claim(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        let ring = QUEUE_STEP * queue as u64 + AVAILABLE;
        self.put(ring + 2, &index.to_le_bytes());
    }

    /// How many chains were made available, modulo 2^16.
    pub fn offered(&self, queue: usize) -> u16 {
        self.available[queue]
    }

    /// How many chains came back.
    pub fn used(&self, queue: usize) -> u16 {
        self.u16_at(QUEUE_STEP * queue as u64 + USED + 2)
    }

    /// The head and the length of the chain that came back as number `index`.
    pub fn used_entry(&self, queue: usize, index: u16) -> (u32, u32) {
        let at = QUEUE_STEP * queue as u64 + USED + 4 + 8 * u64::from(index % QUEUE_SIZE);
        let bytes = self.get(at, 8);
        let word = |from: usize| {
            u32::from_le_bytes([
                bytes[from],
                bytes[from + 1],
                bytes[from + 2],
                bytes[from + 3],
            ])
        };
        (word(0), word(4))
    }
}
