//! virtio-rng: randomness from the host's kernel. The driver offers buffers, the device fills them.

mod device;
mod state;

use std::io;

pub use self::state::RngState;

use self::device::RngDevice;
use super::fault::{DeviceKind, FaultSink};
use super::{GuestMemory, VirtioMmio};

/// A source of randomness.
pub fn rng(memory: GuestMemory, faults: FaultSink) -> io::Result<VirtioMmio> {
    VirtioMmio::new(DeviceKind::Rng, memory, Box::new(RngDevice::new()), faults)
}
