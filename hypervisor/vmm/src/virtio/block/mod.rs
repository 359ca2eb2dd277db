//! virtio-block: one disk. What the driver flushed is on stable storage before it hears so; what it
//! discards or zeroes gives its space back to the host.

mod backend;
mod device;
mod request;
mod state;

use std::io;

pub use self::backend::{BlockBackend, FileBackend};
pub use self::state::BlockState;

use self::device::BlockDevice;
use super::fault::{DeviceKind, FaultSink};
use super::{GuestMemory, VirtioMmio};

/// The size of a sector, the unit of every address on the disk.
pub const SECTOR_SIZE: u64 = 512;

/// A disk. Bytes of the back-end after its last whole sector are out of the driver's reach.
pub fn block(
    memory: GuestMemory,
    backend: Box<dyn BlockBackend>,
    faults: FaultSink,
) -> io::Result<VirtioMmio> {
    let device = BlockDevice::new(backend)?;
    VirtioMmio::new(DeviceKind::Block, memory, Box::new(device), faults)
}

/// The device alone, for a fuzz target.
#[cfg(fuzzing)]
pub(super) fn disk_without_thread(
    backend: Box<dyn BlockBackend>,
) -> io::Result<Box<dyn super::worker::Device>> {
    Ok(Box::new(BlockDevice::new(backend)?))
}
