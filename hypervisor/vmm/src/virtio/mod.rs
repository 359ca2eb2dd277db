//! The machine's virtio devices: one transport (virtio-mmio, version 2) and, behind it, a disk, a
//! source of randomness, vsock and a network interface. Everything a driver writes here is an
//! attacker's: it may break its own device, which then asks for a reset and says why; it must never
//! panic, block a vCPU for longer than the I/O already in flight, or grow host memory without bound.
//!
//! A device is driven through three layers. [`transport`] holds the registers and the status
//! machine and runs on vCPU threads. [`worker`] is the device's own thread: it takes the queues over
//! when the driver says DRIVER_OK and gives them back on reset. Behind it, a device knows queues and
//! semantics only.

pub mod block;
mod fault;
#[cfg(fuzzing)]
pub mod fuzz;
mod interrupt;
mod limit;
pub mod net;
mod ring;
pub mod rng;
pub mod transport;
pub mod vsock;
mod worker;

pub use fault::{Broken, DeviceFault, DeviceKind, FaultSink};
pub use transport::{RestoreError, VirtioMmio, VirtioMmioState};

/// The memory that a guest and its devices share.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
