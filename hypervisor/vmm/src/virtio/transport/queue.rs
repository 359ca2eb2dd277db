//! A queue while its driver sets it up: size and three addresses, checked when the driver says the
//! queue is ready. Afterwards they cannot change until the queue is taken back.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::{QueueState, set_half};
use crate::virtio::GuestMemory;

const DESCRIPTOR_SIZE: u64 = 16;
const AVAILABLE_ENTRY_SIZE: u64 = 2;
const USED_ENTRY_SIZE: u64 = 8;
/// Flags and index before the entries, the event index after them.
const RING_OVERHEAD: u64 = 6;

/// A queue that cannot be set up like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("queue size {size} is not a power of two between 1 and {max}")]
    Size { size: u32, max: u16 },
    #[error("the queue is already set up; only a reset or QueueReady 0 takes it back")]
    AlreadyReady,
    #[error("the {area} at {address:#x} is not aligned to {alignment} bytes")]
    Misaligned {
        area: &'static str,
        address: u64,
        alignment: u64,
    },
    #[error("the {area} of {length} bytes at {address:#x} is outside guest memory")]
    OutsideMemory {
        area: &'static str,
        address: u64,
        length: u64,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct QueueSetup {
    max_size: u16,
    state: QueueState,
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            state: QueueState {
                size: max_size,
                ..QueueState::default()
            },
        }
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.state.ready
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<(), Refused> {
        self.must_not_be_ready()?;
        let refused = Refused::Size {
            size,
            max: self.max_size,
        };
        if !size.is_power_of_two() || size > u32::from(self.max_size) {
            return Err(refused);
        }
        self.state.size = u16::try_from(size).map_err(|_| refused)?;
        Ok(())
    }

    pub(super) fn set_descriptors(&mut self, half: u32, value: u32) -> Result<(), Refused> {
        self.must_not_be_ready()?;
        set_half(&mut self.state.descriptors, half, value);
        Ok(())
    }

    pub(super) fn set_driver(&mut self, half: u32, value: u32) -> Result<(), Refused> {
        self.must_not_be_ready()?;
        set_half(&mut self.state.driver, half, value);
        Ok(())
    }

    pub(super) fn set_device(&mut self, half: u32, value: u32) -> Result<(), Refused> {
        self.must_not_be_ready()?;
        set_half(&mut self.state.device, half, value);
        Ok(())
    }

    pub(super) fn make_ready(&mut self, memory: &GuestMemory) -> Result<(), Refused> {
        self.must_not_be_ready()?;
        self.check(memory)?;
        self.state.ready = true;
        Ok(())
    }

    /// The next available entry to take and the next used entry to write.
    pub(super) fn set_progress(&mut self, (next_available, next_used): (u16, u16)) {
        self.state.next_available = next_available;
        self.state.next_used = next_used;
    }

    pub(super) fn save(&self) -> QueueState {
        self.state
    }

    pub(super) fn restore(
        &self,
        state: &QueueState,
        memory: &GuestMemory,
    ) -> Result<Self, Refused> {
        let mut setup = Self::new(self.max_size);
        setup.set_size(u32::from(state.size))?;
        setup.state = *state;
        if state.ready {
            setup.check(memory)?;
        }
        Ok(setup)
    }

    /// The queue to work on; None unless it is ready.
    pub(super) fn build(&self, event_idx: bool) -> Option<Queue> {
        let state = &self.state;
        if !state.ready {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(state.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(state.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(state.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(state.device))
            .ok()?;
        queue.set_next_avail(state.next_available);
        queue.set_next_used(state.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }

    fn must_not_be_ready(&self) -> Result<(), Refused> {
        if self.state.ready {
            Err(Refused::AlreadyReady)
        } else {
            Ok(())
        }
    }

    fn check(&self, memory: &GuestMemory) -> Result<(), Refused> {
        let entries = u64::from(self.state.size);
        let areas = [
            (
                "descriptor table",
                self.state.descriptors,
                16,
                DESCRIPTOR_SIZE,
                0,
            ),
            (
                "available ring",
                self.state.driver,
                2,
                AVAILABLE_ENTRY_SIZE,
                RING_OVERHEAD,
            ),
            (
                "used ring",
                self.state.device,
                4,
                USED_ENTRY_SIZE,
                RING_OVERHEAD,
            ),
        ];
        for (area, address, alignment, entry, overhead) in areas {
            if address & alignment_mask(alignment) != 0 {
                return Err(Refused::Misaligned {
                    area,
                    address,
                    alignment,
                });
            }
            let length = entries.saturating_mul(entry).saturating_add(overhead);
            let inside = usize::try_from(length)
                .is_ok_and(|length| memory.check_range(GuestAddress(address), length));
            // virtio-queue takes a ring at address zero for one that was never set.
            if !inside || address == 0 {
                return Err(Refused::OutsideMemory {
                    area,
                    address,
                    length,
                });
            }
        }
        Ok(())
    }
}

const fn alignment_mask(alignment: u64) -> u64 {
    alignment.saturating_sub(1)
}
