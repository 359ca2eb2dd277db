//! How a device breaks: by its driver's fault, and then it asks to be reset, or so that the machine
//! cannot go on. The machine hears of both. Nothing here decides what the machine does then.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// The disk.
    Block,
    /// The source of randomness.
    Rng,
    /// Connections between host and guest.
    Vsock,
    /// The network.
    Net,
}

impl DeviceKind {
    /// The device id of the virtio specification.
    pub const fn id(self) -> u32 {
        match self {
            Self::Block => 2,
            Self::Rng => 4,
            Self::Vsock => 19,
            Self::Net => 1,
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "virtio-block",
            Self::Rng => "virtio-rng",
            Self::Vsock => "virtio-vsock",
            Self::Net => "virtio-net",
        })
    }
}

/// The rule a driver broke, or what went wrong beneath a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The available ring claims more entries than the queue has.
    #[error("queue {queue}: the available index is impossible: {reason}")]
    AvailableIndex {
        /// The queue.
        queue: usize,
        /// What the queue said.
        reason: String,
    },
    /// A chain does not end, leaves its table or names an index outside it.
    #[error(
        "queue {queue}: the chain at descriptor {head} loops, leaves its table or cannot be read"
    )]
    EndlessChain {
        /// The queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
    },
    /// A chain has more descriptors than this device takes.
    #[error("queue {queue}: the chain at descriptor {head} has more than {limit} descriptors")]
    LongChain {
        /// The queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// How many are taken.
        limit: usize,
    },
    /// A writable descriptor stands before a readable one.
    #[error(
        "queue {queue}: the chain at descriptor {head} has a readable buffer after a writable one"
    )]
    MixedChain {
        /// The queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer lies outside guest memory.
    #[error("queue {queue}: a buffer of {length} bytes at {address:#x} is outside guest memory")]
    OutsideMemory {
        /// The queue.
        queue: usize,
        /// The buffer's address.
        address: u64,
        /// Its length.
        length: u32,
    },
    /// A chain lacks a part that every request of this device has.
    #[error("queue {queue}: the chain at descriptor {head} is too short: {missing} is missing")]
    ShortChain {
        /// The queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// Which part.
        missing: &'static str,
    },
    /// The rings could not be read or written.
    #[error("queue {queue}: its rings cannot be used: {reason}")]
    Ring {
        /// The queue.
        queue: usize,
        /// Why.
        reason: String,
    },
    /// The device's thread panicked.
    #[error("the device's thread panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// A descriptor of the host failed.
    #[error("the host could not {what}: {reason}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl Broken {
    /// Whether the machine cannot go on: the device is dead, a reset does not bring it back.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Panicked { .. } | Self::Host { .. })
    }
}

/// A device that broke. When the reason [is fatal](Broken::is_fatal), its machine cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct DeviceFault {
    /// Which device.
    pub device: DeviceKind,
    /// Why.
    pub reason: Broken,
}

/// Where a machine hears of devices that broke. Called on a device's thread; must not block.
#[derive(Clone)]
pub struct FaultSink(Arc<dyn Fn(DeviceFault) + Send + Sync>);

impl FaultSink {
    /// A sink that calls `report`.
    pub fn new(report: impl Fn(DeviceFault) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }

    pub(super) fn report(&self, fault: DeviceFault) {
        (self.0)(fault);
    }
}

impl fmt::Debug for FaultSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultSink")
    }
}
