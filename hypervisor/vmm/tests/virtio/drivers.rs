//! The devices under the `virtio-drivers` crate: a driver that nobody here wrote and that keeps the
//! rules, through its `Transport` and `Hal` over our registers and queues.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock};

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm::virtio::block::{FileBackend, block};
use vmm::virtio::net::net;
use vmm::virtio::rng::rng;
use vmm::virtio::vsock::{AGENT_PORT, VsockEvent, VsockEvents, vsock};
use vmm::virtio::{GuestMemory, VirtioMmio};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::rig::{Faults, wait_readable};

const PAGES: usize = 16 * 1024;

/// One memory for all drivers of this process: `Hal` has no self.
fn shared_memory() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGES * PAGE_SIZE)]).unwrap()
    })
}

fn pages() -> &'static Mutex<Vec<bool>> {
    static PAGES_IN_USE: OnceLock<Mutex<Vec<bool>>> = OnceLock::new();
    PAGES_IN_USE.get_or_init(|| {
        let mut in_use = vec![false; PAGES];
        in_use[0] = true;
        Mutex::new(in_use)
    })
}

fn allocate(count: usize) -> u64 {
    let mut in_use = pages().lock().unwrap();
    let start = in_use
        .windows(count)
        .position(|w| w.iter().all(|used| !used))
        .unwrap();
    in_use[start..start + count].fill(true);
    (start * PAGE_SIZE) as u64
}

fn free(address: u64, count: usize) {
    let start = address as usize / PAGE_SIZE;
    pages().lock().unwrap()[start..start + count].fill(false);
}

struct TestHal;

// SAFETY: pages come from a mapping that lives as long as the process, page-aligned, and are handed
// out once until they are given back.
unsafe impl Hal for TestHal {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let address = allocate(count);
        let zeroes = vec![0; count * PAGE_SIZE];
        shared_memory()
            .write_slice(&zeroes, GuestAddress(address))
            .unwrap();
        let pointer = shared_memory()
            .get_host_address(GuestAddress(address))
            .unwrap();
        (address, NonNull::new(pointer).unwrap())
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, count: usize) -> i32 {
        free(address, count);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        panic!("there is no PCI here")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let address = allocate(buffer.len().div_ceil(PAGE_SIZE));
        // SAFETY: the caller promises a valid buffer that nobody else touches meanwhile.
        let bytes = unsafe { buffer.as_ref() };
        shared_memory()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        address
    }

    unsafe fn unshare(address: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: as for sharing.
            let bytes = unsafe { buffer.as_mut() };
            shared_memory()
                .read_slice(bytes, GuestAddress(address))
                .unwrap();
        }
        free(address, buffer.len().div_ceil(PAGE_SIZE));
    }
}

struct Registers(VirtioMmio);

impl Registers {
    fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    fn set_address(&self, offset: u64, address: u64) {
        self.set(offset, address as u32);
        self.set(offset + 4, (address >> 32) as u32);
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        DeviceType::try_from(self.get(8)).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(low) | u64::from(self.get(0x10)) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.set(0x30, u32::from(queue));
        self.get(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.set(0x50, u32::from(queue));
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.get(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.set(0x70, status.bits());
        assert_eq!(self.get(0x70), status.bits(), "{:?}", self.0.last_reason());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, driver: u64, device: u64) {
        self.set(0x30, u32::from(queue));
        self.set(0x38, size);
        self.set_address(0x80, table);
        self.set_address(0x90, driver);
        self.set_address(0xa0, device);
        self.set(0x44, 1);
        assert_eq!(self.get(0x44), 1, "{:?}", self.0.last_reason());
    }

    fn queue_unset(&mut self, queue: u16) {
        self.set(0x30, u32::from(queue));
        self.set(0x44, 0);
        assert_eq!(self.get(0x44), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.set(0x30, u32::from(queue));
        self.get(0x44) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.get(0x60);
        self.set(0x64, status);
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.get(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut bytes = vec![0; size_of::<T>()];
        self.0.read(0x100 + offset as u64, &mut bytes);
        Ok(T::read_from_bytes(&bytes).unwrap())
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.0.write(0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

#[test]
fn a_foreign_driver_reads_writes_and_flushes_the_disk() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    let backend = Box::new(FileBackend::new(file));
    let device = block(shared_memory().clone(), backend, Faults::default().sink()).unwrap();
    let mut disk = VirtIOBlk::<TestHal, _>::new(Registers(device)).unwrap();
    assert_eq!(disk.capacity(), 8192);
    assert!(!disk.readonly());
    for block in [0, 1, 4000, 8192 - 128] {
        let data: Vec<u8> = (0..128 * 512).map(|i| (i + block) as u8).collect();
        disk.write_blocks(block, &data).unwrap();
        disk.flush().unwrap();
        let mut back = vec![0; data.len()];
        disk.read_blocks(block, &mut back).unwrap();
        assert!(back == data, "block {block}");
    }
    disk.read_blocks(8192, &mut [0; 512]).unwrap_err();
    let mut id = [0; 20];
    let length = disk.device_id(&mut id).unwrap();
    assert_eq!(&id[..length], b"supvm-root");
}

#[test]
fn a_foreign_driver_gets_randomness() {
    let device = rng(shared_memory().clone(), Faults::default().sink()).unwrap();
    let mut rng = VirtIORng::<TestHal, _>::new(Registers(device)).unwrap();
    let (mut one, mut two) = ([0; 64], [0; 64]);
    assert_eq!(rng.request_entropy(&mut one).unwrap(), 64);
    assert_eq!(rng.request_entropy(&mut two).unwrap(), 64);
    assert_ne!(one, two);
}

#[test]
fn a_foreign_driver_echoes_megabytes_over_vsock_and_rings_the_bell() {
    const BYTES: usize = 8 << 20;
    let (sender, events) = VsockEvents::channel().unwrap();
    let memory = shared_memory().clone();
    let (device, host) = vsock(memory, 3, Faults::default().sink(), sender).unwrap();
    let driver = VirtIOSocket::<TestHal, _, 4096>::new(Registers(device)).unwrap();
    let mut guest = VsockConnectionManager::new_with_capacity(driver, 256 * 1024);
    assert_eq!(guest.guest_cid(), 3);
    guest.listen(AGENT_PORT);

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    host.connect(1, AGENT_PORT, true, theirs);
    guest
        .connect(
            VsockAddr {
                cid: 2,
                port: AGENT_PORT,
            },
            999,
        )
        .unwrap();
    assert!(wait_readable(events.event()));
    assert_eq!(events.take(), [VsockEvent::AgentRang]);

    let writer = std::thread::spawn({
        let mut ours = ours.try_clone().unwrap();
        move || {
            let data: Vec<u8> = (0..BYTES).map(|i| (i % 253) as u8).collect();
            ours.write_all(&data).unwrap();
        }
    });
    let reader = std::thread::spawn(move || {
        let mut data = vec![0; BYTES];
        ours.read_exact(&mut data).unwrap();
        assert!((0..BYTES).all(|i| data[i] == (i % 253) as u8));
        ours
    });

    let mut peer = None;
    let mut pending = Vec::new();
    let mut echoed = 0;
    let mut untold = 0;
    while echoed < BYTES {
        let event = guest.poll().unwrap();
        if let Some(event) = event {
            match event.event_type {
                VsockEventType::ConnectionRequest => peer = Some(event.source),
                VsockEventType::Disconnected { .. } => {
                    assert_eq!(event.destination.port, 999, "only the bell is reset");
                }
                _ => {}
            }
        }
        let Some(peer) = peer else { continue };
        if pending.is_empty() {
            let mut bytes = vec![0; 16 * 1024];
            let count = guest.recv(peer, AGENT_PORT, &mut bytes).unwrap();
            bytes.truncate(count);
            pending = bytes;
            untold += count;
            if untold > 64 * 1024 {
                guest.update_credit(peer, AGENT_PORT).unwrap();
                untold = 0;
            }
        }
        // A refusal means that the host's window is full: its credit comes with an event.
        if !pending.is_empty() && guest.send(peer, AGENT_PORT, &pending).is_ok() {
            echoed += pending.len();
            pending.clear();
        }
    }
    writer.join().unwrap();
    let ours = reader.join().unwrap();
    assert!(events.take().contains(&VsockEvent::Connected { ticket: 1 }));
    drop(ours);
    loop {
        let event = guest.wait_for_event().unwrap();
        if matches!(event.event_type, VsockEventType::Disconnected { .. })
            && event.destination.port == AGENT_PORT
        {
            break;
        }
    }
}

#[test]
fn a_foreign_driver_sends_frames_and_gets_them_back() {
    const MAC: [u8; 6] = [2, 0x73, 0x75, 0x70, 0, 2];
    let (device, host) = net(
        shared_memory().clone(),
        MAC,
        65_520,
        Faults::default().sink(),
    )
    .unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    host.attach(theirs);
    let mut driver = VirtIONetRaw::<TestHal, _, 16>::new(Registers(device)).unwrap();
    assert_eq!(driver.mac_address(), MAC);
    // Whoever is first: a frame sent before the channel is there is lost.
    ours.set_nonblocking(true).unwrap();
    while ours.read(&mut [0; 64]).is_err() {
        driver.send(&[0xff; 60]).unwrap();
    }
    ours.set_nonblocking(false).unwrap();
    let lengths = [14, 60, 1514, 9000, 40_000, 65_550];
    let echo = std::thread::spawn(move || {
        for expected in lengths {
            let mut length = [0; 4];
            ours.read_exact(&mut length).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(length) as usize];
            ours.read_exact(&mut frame).unwrap();
            assert_eq!(frame.len(), expected);
            ours.write_all(&length).unwrap();
            ours.write_all(&frame).unwrap();
        }
        ours
    });
    for length in lengths {
        let frame: Vec<u8> = (0..length).map(|i| (i % 249) as u8).collect();
        driver.send(&frame).unwrap();
        let mut buffer = vec![0; 66_000];
        let (header, received) = driver.receive_wait(&mut buffer).unwrap();
        assert_eq!((header, received), (12, length));
        assert!(buffer[12..12 + length] == frame);
    }
    echo.join().unwrap();
}
