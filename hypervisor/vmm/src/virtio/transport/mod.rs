//! virtio-mmio, version 2: registers, status machine and queue set-up of one device, called by vCPU
//! threads. It parses nothing but registers and does no I/O; on DRIVER_OK it hands the queues to the
//! device's worker and on reset it waits until the worker has given them back. What a driver may not
//! write is refused with a reason and changes nothing.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

mod queue;
mod registers;
mod snapshot;
mod state;
mod status;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::{virtio_config, virtio_ring};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::snapshot::RestoreError;
pub use self::state::{DeviceState, QueueState, VirtioMmioState};

use self::queue::{QueueSetup, Refused};
use self::registers::{CONFIG, MAGIC, Register, VENDOR, VERSION};
use self::status::{OutOfOrder, Status, Step};
use super::GuestMemory;
use super::fault::{DeviceKind, FaultSink};
use super::interrupt::Interrupt;
use super::limit::LogLimit;
use super::ring::Ring;
use super::worker::{Device, Worker};

const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
const INDIRECT: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Why a write was ignored.
#[derive(Debug, thiserror::Error)]
enum Ignored {
    #[error(transparent)]
    Order(#[from] OutOfOrder),
    #[error(transparent)]
    Queue(#[from] Refused),
    #[error(
        "the driver's features {driver:#x} are not among the offered {offered:#x}, or lack VERSION_1"
    )]
    Features { driver: u64, offered: u64 },
    #[error("{what} in status {status:#x}")]
    WrongTime { what: &'static str, status: u32 },
    #[error("queue {0} does not exist")]
    NoSuchQueue(u32),
}

struct Registers {
    status: Status,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

/// One device behind its registers.
pub struct VirtioMmio {
    kind: DeviceKind,
    features: u64,
    config: Vec<u8>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    worker: Worker,
    registers: Mutex<Registers>,
    refusals: LogLimit,
    last_refusal: Mutex<Option<String>>,
}

impl VirtioMmio {
    pub(super) fn new(
        kind: DeviceKind,
        memory: GuestMemory,
        device: Box<dyn Device>,
        faults: FaultSink,
    ) -> io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new(kind, faults)?);
        let queues: Vec<QueueSetup> = device
            .queue_sizes()
            .iter()
            .map(|max| QueueSetup::new(*max))
            .collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<Arc<[_]>>>()?;
        let features = device.features() | VERSION_1 | EVENT_IDX | INDIRECT;
        let config = device.config();
        let worker = Worker::spawn(kind, device, Arc::clone(&kicks), Arc::clone(&interrupt))?;
        Ok(Self {
            kind,
            features,
            config,
            memory,
            interrupt,
            kicks,
            worker,
            registers: Mutex::new(Registers {
                status: Status::default(),
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                queues,
            }),
            refusals: LogLimit::new(),
            last_refusal: Mutex::new(None),
        })
    }

    /// Which device is behind these registers.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// One event per queue; the machine lets KVM signal it when the driver writes the queue's index
    /// to offset 0x50.
    pub fn queue_notifiers(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The event behind the device's edge-triggered interrupt.
    pub fn interrupt(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// Why the device last asked for a reset or refused a write, for whoever looks into it.
    pub fn last_reason(&self) -> Option<String> {
        let broken = self.interrupt.last_reason().map(|r| r.to_string());
        broken.or_else(|| self.last_refusal())
    }

    /// Why the device last refused a write.
    pub fn last_refusal(&self) -> Option<String> {
        self.last_refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A vCPU reads at `offset`. What does not exist reads zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(from) = offset.checked_sub(CONFIG) {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            if let Some(config) = self.config.get(from..) {
                for (to, byte) in data.iter_mut().zip(config) {
                    *to = *byte;
                }
            }
            return;
        }
        let (Some(register), 4) = (Register::at(offset), data.len()) else {
            return;
        };
        data.copy_from_slice(&self.read_register(register).to_le_bytes());
    }

    /// A vCPU writes at `offset`. What does not exist or is not the driver's to write stays as it is.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let (Some(register), Ok(bytes)) = (Register::at(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        if let Err(ignored) = self.write_register(register, u32::from_le_bytes(bytes)) {
            self.refuse(&ignored);
        }
    }

    /// Ends the device: the I/O in flight is finished, what was written is made durable, the thread
    /// is gone when this returns. Later accesses do nothing.
    pub fn shut_down(&self) {
        self.worker.finish();
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, register: Register) -> u32 {
        let registers = self.lock();
        let selected = usize::try_from(registers.queue_select)
            .ok()
            .and_then(|index| registers.queues.get(index));
        match register {
            Register::Magic => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => self.kind.id(),
            Register::VendorId => VENDOR,
            Register::DeviceFeatures => half(self.features, registers.device_features_select),
            Register::QueueSizeMax => selected.map_or(0, |queue| u32::from(queue.max_size())),
            Register::QueueReady => selected.map_or(0, |queue| u32::from(queue.is_ready())),
            Register::InterruptStatus => self.interrupt.status(),
            Register::Status => {
                let needs_reset = if self.interrupt.needs_reset() {
                    Status::NEEDS_RESET
                } else {
                    0
                };
                registers.status.bits() | needs_reset
            }
            // No shared memory: a region that does not exist has a length of all ones.
            Register::SharedMemoryLength | Register::SharedMemoryBase => u32::MAX,
            // The configuration never changes.
            Register::ConfigGeneration => 0,
            // The rest is written only.
            Register::DeviceFeaturesSelect
            | Register::DriverFeatures
            | Register::DriverFeaturesSelect
            | Register::QueueSelect
            | Register::QueueSize
            | Register::QueueNotify
            | Register::InterruptAcknowledge
            | Register::QueueDescriptorsLow
            | Register::QueueDescriptorsHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh => 0,
        }
    }

    fn write_register(&self, register: Register, value: u32) -> Result<(), Ignored> {
        let mut registers = self.lock();
        match register {
            Register::DeviceFeaturesSelect => registers.device_features_select = value,
            Register::DriverFeaturesSelect => registers.driver_features_select = value,
            Register::DriverFeatures => {
                if !registers.status.may_negotiate() {
                    return Err(wrong_time("features written", &registers));
                }
                let select = registers.driver_features_select;
                set_half(&mut registers.driver_features, select, value);
            }
            Register::QueueSelect => registers.queue_select = value,
            Register::QueueSize => self.set_up(&mut registers)?.set_size(value)?,
            Register::QueueDescriptorsLow => {
                self.set_up(&mut registers)?.set_descriptors(0, value)?
            }
            Register::QueueDescriptorsHigh => {
                self.set_up(&mut registers)?.set_descriptors(1, value)?
            }
            Register::QueueDriverLow => self.set_up(&mut registers)?.set_driver(0, value)?,
            Register::QueueDriverHigh => self.set_up(&mut registers)?.set_driver(1, value)?,
            Register::QueueDeviceLow => self.set_up(&mut registers)?.set_device(0, value)?,
            Register::QueueDeviceHigh => self.set_up(&mut registers)?.set_device(1, value)?,
            Register::QueueReady if value & 1 == 1 => {
                self.set_up(&mut registers)?.make_ready(&self.memory)?;
            }
            Register::QueueReady => self.take_queue_back(&mut registers)?,
            Register::QueueNotify => {
                // KVM signals the event itself; this is for whoever gets here without it.
                drop(registers);
                let kick = usize::try_from(value)
                    .ok()
                    .and_then(|index| self.kicks.get(index));
                // A full counter means that a wake-up is already waiting.
                let _ = kick.ok_or(Ignored::NoSuchQueue(value))?.write(1);
            }
            Register::InterruptAcknowledge => self.interrupt.acknowledge(value),
            Register::Status => self.write_status(&mut registers, value)?,
            // The rest is read only.
            _ => {}
        }
        Ok(())
    }

    fn write_status(&self, registers: &mut Registers, value: u32) -> Result<(), Ignored> {
        match registers.status.write(value)? {
            Step::Reset => self.reset(registers),
            Step::Set(status) => registers.status = status,
            Step::Features(status) => {
                let driver = registers.driver_features;
                if driver & !self.features != 0 || driver & VERSION_1 == 0 {
                    return Err(Ignored::Features {
                        driver,
                        offered: self.features,
                    });
                }
                registers.status = status;
            }
            Step::Live(status) => {
                registers.status = status;
                self.go_live(registers);
            }
            Step::Failed(status) => {
                if registers.status.is_live() {
                    self.pause(registers, true);
                }
                registers.status = status;
            }
        }
        Ok(())
    }

    fn reset(&self, registers: &mut Registers) {
        if registers.status.is_live() {
            self.pause(registers, true);
        }
        registers.status = Status::default();
        registers.device_features_select = 0;
        registers.driver_features_select = 0;
        registers.driver_features = 0;
        registers.queue_select = 0;
        registers.queues.iter_mut().for_each(QueueSetup::reset);
        self.interrupt.reset();
    }

    fn go_live(&self, registers: &mut Registers) {
        let event_idx = registers.driver_features & EVENT_IDX != 0;
        let rings = registers
            .queues
            .iter()
            .enumerate()
            .map(|(index, setup)| {
                let queue = setup.build(event_idx)?;
                Some(Ring::new(
                    index,
                    queue,
                    self.memory.clone(),
                    Arc::clone(&self.interrupt),
                    Arc::clone(&self.kicks),
                ))
            })
            .collect();
        self.worker.start(registers.driver_features, rings);
    }

    fn pause(&self, registers: &mut Registers, reset: bool) {
        let progress = self.worker.stop(reset);
        for (setup, progress) in registers.queues.iter_mut().zip(progress) {
            if let Some(progress) = progress {
                setup.set_progress(progress);
            }
        }
    }

    /// The driver may stop one queue of a live device; it may not start it again without a reset.
    fn take_queue_back(&self, registers: &mut Registers) -> Result<(), Ignored> {
        let live = registers.status.is_live();
        if live {
            self.pause(registers, false);
        }
        let result = selected(registers).map(QueueSetup::reset);
        if live {
            self.go_live(registers);
        }
        result
    }

    fn set_up<'r>(&self, registers: &'r mut Registers) -> Result<&'r mut QueueSetup, Ignored> {
        if !registers.status.may_set_up_queues() {
            return Err(wrong_time("queue set up", registers));
        }
        selected(registers)
    }

    fn refuse(&self, ignored: &Ignored) {
        if let Some(suppressed) = self.refusals.allow() {
            tracing::warn!(device = %self.kind, reason = %ignored, suppressed, "write refused");
        }
        *self
            .last_refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(ignored.to_string());
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioMmio")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

fn selected(registers: &mut Registers) -> Result<&mut QueueSetup, Ignored> {
    let select = registers.queue_select;
    usize::try_from(select)
        .ok()
        .and_then(|index| registers.queues.get_mut(index))
        .ok_or(Ignored::NoSuchQueue(select))
}

fn wrong_time(what: &'static str, registers: &Registers) -> Ignored {
    Ignored::WrongTime {
        what,
        status: registers.status.bits(),
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0),
        1 => u32::try_from(value >> 32).unwrap_or(0),
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    let (low, high) = (*value & u64::from(u32::MAX), *value >> 32);
    *value = match select {
        0 => (high << 32) | u64::from(half),
        1 => (u64::from(half) << 32) | low,
        // Features beyond 64 exist for nobody; a driver that sets one asks for what was not offered.
        _ if half != 0 => u64::MAX,
        _ => *value,
    };
}
