//! What a snapshot keeps of a virtio device: registers, queues and the device's own state, as plain
//! data. Nothing here is trusted when it comes back; `restore` checks it as it checks a driver.

use serde::{Deserialize, Serialize};

use crate::virtio::block::BlockState;
use crate::virtio::net::NetState;
use crate::virtio::rng::RngState;
use crate::virtio::vsock::VsockState;

/// A device's registers, queues and own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState {
    /// The driver's status bits.
    pub status: u32,
    /// Whether the device asks to be reset.
    pub needs_reset: bool,
    /// The interrupt status.
    pub interrupt_status: u32,
    /// The half of the device's features that is shown.
    pub device_features_select: u32,
    /// The half of the driver's features that is written.
    pub driver_features_select: u32,
    /// The driver's features.
    pub driver_features: u64,
    /// The selected queue.
    pub queue_select: u32,
    /// The queues, in order.
    pub queues: Vec<QueueState>,
    /// The device's own state.
    pub device: DeviceState,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// Whether the driver has handed it over.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
    /// The next available entry to take.
    pub next_available: u16,
    /// The next used entry to write.
    pub next_used: u16,
}

/// A device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// The disk's.
    Block(BlockState),
    /// The source of randomness's.
    Rng(RngState),
    /// The connections'.
    Vsock(VsockState),
    /// The network's.
    Net(NetState),
}
