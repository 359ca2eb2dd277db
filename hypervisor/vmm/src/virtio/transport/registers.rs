//! The register map of virtio-mmio, version 2 (virtio 1.2, 4.2.2). An offset that is not listed here
//! does not exist: it reads zero and takes no writes.

/// A 32-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Magic,
    Version,
    DeviceId,
    VendorId,
    DeviceFeatures,
    DeviceFeaturesSelect,
    DriverFeatures,
    DriverFeaturesSelect,
    QueueSelect,
    QueueSizeMax,
    QueueSize,
    QueueReady,
    QueueNotify,
    InterruptStatus,
    InterruptAcknowledge,
    Status,
    QueueDescriptorsLow,
    QueueDescriptorsHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
    SharedMemoryLength,
    SharedMemoryBase,
    ConfigGeneration,
}

/// Where the device's own configuration starts.
pub(super) const CONFIG: u64 = 0x100;
/// "virt".
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The version without legacy.
pub(super) const VERSION: u32 = 2;
/// "supv".
pub(super) const VENDOR: u32 = 0x7670_7573;

impl Register {
    pub(super) fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x000 => Self::Magic,
            0x004 => Self::Version,
            0x008 => Self::DeviceId,
            0x00c => Self::VendorId,
            0x010 => Self::DeviceFeatures,
            0x014 => Self::DeviceFeaturesSelect,
            0x020 => Self::DriverFeatures,
            0x024 => Self::DriverFeaturesSelect,
            0x030 => Self::QueueSelect,
            0x034 => Self::QueueSizeMax,
            0x038 => Self::QueueSize,
            0x044 => Self::QueueReady,
            0x050 => Self::QueueNotify,
            0x060 => Self::InterruptStatus,
            0x064 => Self::InterruptAcknowledge,
            0x070 => Self::Status,
            0x080 => Self::QueueDescriptorsLow,
            0x084 => Self::QueueDescriptorsHigh,
            0x090 => Self::QueueDriverLow,
            0x094 => Self::QueueDriverHigh,
            0x0a0 => Self::QueueDeviceLow,
            0x0a4 => Self::QueueDeviceHigh,
            0x0b0 | 0x0b4 => Self::SharedMemoryLength,
            0x0b8 | 0x0bc => Self::SharedMemoryBase,
            0x0fc => Self::ConfigGeneration,
            _ => return None,
        })
    }
}
