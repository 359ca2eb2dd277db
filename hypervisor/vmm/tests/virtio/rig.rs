//! A mock driver: guest memory, and a driver's hands on registers, descriptor tables and rings. It
//! checks nothing, so that a test can break any rule. Waits end with the device's interrupt, or fail
//! the test after a deadline that no healthy run comes near.

use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm::virtio::{DeviceFault, FaultSink, GuestMemory, VirtioMmio};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const MEMORY_SIZE: u64 = 64 << 20;
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const NEEDS_RESET: u32 = 0x40;

pub(crate) const STATUS: u64 = 0x70;
const GIVE_UP_AFTER_MS: i32 = 20_000;

pub(crate) fn memory() -> GuestMemory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)]).unwrap()
}

#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<Vec<DeviceFault>>>);

impl Faults {
    pub(crate) fn sink(&self) -> FaultSink {
        let list = Arc::clone(&self.0);
        FaultSink::new(move |fault| list.lock().unwrap().push(fault))
    }

    /// Those that end the machine.
    pub(crate) fn all(&self) -> Vec<DeviceFault> {
        let mut faults = self.heard();
        faults.retain(|fault| fault.reason.is_fatal());
        faults
    }

    pub(crate) fn heard(&self) -> Vec<DeviceFault> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) next_available: u16,
    pub(crate) next_used: u16,
}

pub(crate) struct Rig {
    pub(crate) memory: GuestMemory,
    pub(crate) device: VirtioMmio,
    pub(crate) queues: Vec<Queue>,
}

/// Waits until `event` is readable; false after the deadline.
pub(crate) fn wait_readable(event: &EventFd) -> bool {
    let mut poll = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut poll, 1, GIVE_UP_AFTER_MS) };
    if ready == 1 {
        event.read().unwrap();
    }
    ready == 1
}

impl Rig {
    /// A device that is live, with queues of these sizes and without EVENT_IDX.
    pub(crate) fn live(device: VirtioMmio, memory: GuestMemory, sizes: &[u16]) -> Self {
        let mut rig = Self::new(device, memory);
        rig.bring_up(sizes, !EVENT_IDX);
        rig
    }

    pub(crate) fn new(device: VirtioMmio, memory: GuestMemory) -> Self {
        Self {
            memory,
            device,
            queues: Vec::new(),
        }
    }

    pub(crate) fn bring_up(&mut self, sizes: &[u16], feature_mask: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        let features = self.features() & feature_mask;
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(STATUS, 11);
        assert_eq!(self.get(STATUS), 11, "features accepted");
        self.queues.clear();
        for (index, size) in sizes.iter().enumerate() {
            self.set_up_queue(index as u32, *size);
        }
        self.set(STATUS, 15);
        assert_eq!(self.get(STATUS), 15);
    }

    pub(crate) fn set_up_queue(&mut self, index: u32, size: u16) {
        let base = 0x1_0000 * (u64::from(index) + 1);
        let queue = Queue {
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
            next_available: 0,
            next_used: 0,
        };
        self.memory
            .write_slice(&vec![0; 0x1_0000], GuestAddress(base))
            .unwrap();
        self.set(0x30, index);
        self.set(0x38, u32::from(size));
        for (offset, address) in [
            (0x80, queue.descriptors),
            (0x90, queue.available),
            (0xa0, queue.used),
        ] {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        assert_eq!(self.get(0x44), 1, "queue {index} accepted");
        self.queues.push(queue);
    }

    pub(crate) fn features(&self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(low) | u64::from(self.get(0x10)) << 32
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn reason(&self) -> String {
        self.device.last_reason().unwrap_or_default()
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub(crate) fn descriptor_at(
        &self,
        table: u64,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let at = table + 16 * u64::from(index);
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// One descriptor: address, length, flags, next.
    pub(crate) fn descriptor(&self, queue: usize, index: u16, value: (u64, u32, u16, u16)) {
        self.descriptor_at(self.queues[queue].descriptors, index, value);
    }

    /// A chain from descriptor `head` on: (address, length, written by the device).
    pub(crate) fn chain(&self, queue: usize, head: u16, buffers: &[(u64, u32, bool)]) {
        for (i, (address, length, write)) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if *write { WRITE } else { 0 };
            let index = head + i as u16;
            self.descriptor(queue, index, (*address, *length, flags, index + 1));
        }
    }

    /// Makes a chain available.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.available + 4 + 2 * u64::from(q.next_available % q.size);
        q.next_available = q.next_available.wrapping_add(1);
        let (index_at, index) = (q.available + 2, q.next_available);
        self.put(slot, &head.to_le_bytes());
        self.set_available_index(index_at, index);
    }

    fn set_available_index(&self, at: u64, index: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory
            .store(
                index.to_le(),
                GuestAddress(at),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Claims that so many chains are available.
    pub(crate) fn claim(&self, queue: usize, index: u16) {
        self.set_available_index(self.queues[queue].available + 2, index);
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.device.write(0x50, &(queue as u32).to_le_bytes());
    }

    pub(crate) fn used_now(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = &mut self.queues[queue];
        let index: u16 = self
            .memory
            .load(
                GuestAddress(q.used + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        if index == q.next_used {
            return None;
        }
        let at = q.used + 4 + 8 * u64::from(q.next_used % q.size);
        q.next_used = q.next_used.wrapping_add(1);
        let bytes = self.bytes(at, 8);
        let head = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[4..].try_into().unwrap());
        Some((head as u16, length))
    }

    /// The next completed chain: its head and how much was written.
    pub(crate) fn used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.used_now(queue) {
                return used;
            }
            self.wait_for_interrupt();
        }
    }

    fn wait_for_interrupt(&self) {
        assert!(
            wait_readable(self.device.interrupt()),
            "the device answers; {}",
            self.reason()
        );
        self.set(0x64, self.get(0x60));
    }

    /// Waits until the device asks for a reset, and gives its reason.
    pub(crate) fn broken(&self) -> String {
        while self.get(STATUS) & NEEDS_RESET == 0 {
            assert!(
                wait_readable(self.device.interrupt()),
                "the device asks for a reset"
            );
        }
        self.reason()
    }
}
