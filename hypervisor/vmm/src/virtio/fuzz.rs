//! Devices in the hands of a fuzz target: without their threads and registers, one step at a time,
//! so that what an input does is the same each time. Built by cargo-fuzz only.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::GuestMemory;
use super::block::{BlockBackend, disk_without_thread};
use super::fault::{Broken, DeviceKind, FaultSink};
use super::interrupt::Interrupt;
use super::net::{NetHost, net_without_thread};
use super::ring::Ring;
use super::vsock::{VsockEvents, VsockHost, vsock_without_thread};
use super::worker::{Device, Rings};
use crate::model;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 16;
/// Queue n lies at n times this: descriptors, then the available ring, then the used one.
pub const QUEUE_STEP: u64 = 0x1000;
/// Where the available ring is in it.
pub const AVAILABLE: u64 = 0x400;
/// Where the used ring is in it.
pub const USED: u64 = 0x800;

/// A live device.
pub struct Hands {
    device: Box<dyn Device>,
    rings: Rings,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    epoll: Arc<Epoll>,
    broken: Option<Broken>,
    live: bool,
}

impl Hands {
    fn new(kind: DeviceKind, mut device: Box<dyn Device>, memory: GuestMemory) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        device.attach(&epoll)?;
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<Arc<[_]>>>()?;
        Ok(Self {
            device,
            rings: Rings::new(),
            memory,
            interrupt: Arc::new(Interrupt::new(kind, FaultSink::new(|_| {}))?),
            kicks,
            epoll,
            broken: None,
            live: false,
        })
    }

    /// A disk.
    pub fn disk(memory: GuestMemory, backend: Box<dyn BlockBackend>) -> io::Result<Self> {
        Self::new(DeviceKind::Block, disk_without_thread(backend)?, memory)
    }

    /// vsock for the guest with CID 3.
    pub fn vsock(memory: GuestMemory, events: VsockEvents) -> io::Result<(Self, VsockHost)> {
        let (device, host) = vsock_without_thread(3, events)?;
        Ok((Self::new(DeviceKind::Vsock, device, memory)?, host))
    }

    /// The network interface of the first machine model.
    pub fn net(memory: GuestMemory) -> io::Result<(Self, NetHost)> {
        let (device, host) = net_without_thread(model::GUEST_MAC, model::GUEST_MTU)?;
        Ok((Self::new(DeviceKind::Net, device, memory)?, host))
    }

    /// The driver resets the device and makes it live anew; `event_idx` is negotiated or not, all
    /// of the device's own features are.
    pub fn restart(&mut self, event_idx: bool) {
        self.restart_with(event_idx, u64::MAX);
    }

    /// As [`restart`](Self::restart), with those of the device's own features that are in `mask`.
    pub fn restart_with(&mut self, event_idx: bool, mask: u64) {
        if self.live {
            self.device.stop(true);
        }
        self.broken = None;
        self.live = true;
        self.rings = (0..self.kicks.len())
            .map(|index| {
                let base = QUEUE_STEP * index as u64;
                let mut queue = Queue::new(QUEUE_SIZE).ok()?;
                queue.try_set_desc_table_address(GuestAddress(base)).ok()?;
                queue
                    .try_set_avail_ring_address(GuestAddress(base + AVAILABLE))
                    .ok()?;
                queue
                    .try_set_used_ring_address(GuestAddress(base + USED))
                    .ok()?;
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
                Some(Ring::new(
                    index,
                    queue,
                    self.memory.clone(),
                    Arc::clone(&self.interrupt),
                    Arc::clone(&self.kicks),
                ))
            })
            .collect();
        self.run(|device, rings| {
            device.negotiated(device.features() & mask);
            device.start(rings)
        });
    }

    /// The driver kicks a queue.
    pub fn kick(&mut self, queue: usize) {
        if self.live && self.broken.is_none() {
            self.run(|device, rings| device.kicked(queue, rings));
        }
    }

    /// Whatever stirs by now among the device's own descriptors.
    pub fn stir(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let (token, set) = (event.data(), event.event_set());
            if self.live && self.broken.is_none() {
                self.run(|device, rings| device.stirred(token, set, rings));
            } else {
                self.run(|device, _| device.stirred(token, set, &mut Rings::new()));
            }
        }
    }

    /// Why it asks for a reset, if it does.
    pub fn broken(&self) -> Option<String> {
        self.broken.as_ref().map(ToString::to_string)
    }

    fn run(&mut self, work: impl FnOnce(&mut dyn Device, &mut Rings) -> Result<(), Broken>) {
        let result = work(self.device.as_mut(), &mut self.rings);
        let signalled = self.rings.iter_mut().flatten().try_for_each(Ring::signal);
        if let Err(broken) = result.and(signalled)
            && self.broken.is_none()
        {
            self.broken = Some(broken);
            self.device.broke();
        }
    }
}
