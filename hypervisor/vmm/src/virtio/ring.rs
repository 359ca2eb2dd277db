//! A queue as a device sees it: chains come out whole and checked, answers go back in. Every rule of
//! the split ring that a driver can break is caught here, once for all devices, so that behind this
//! module a chain is a bounded list of buffers inside guest memory, readable ones first.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestMemoryBackend, Permissions, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use super::GuestMemory;
use super::fault::Broken;
use super::interrupt::Interrupt;

/// A live queue.
pub(super) struct Ring {
    index: usize,
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    used: bool,
}

/// A buffer inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: GuestAddress,
    pub(super) length: u32,
}

/// A chain of buffers, copied out of the descriptor table once.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) queue: usize,
    pub(super) head: u16,
    /// What the driver wrote for the device.
    pub(super) readable: Vec<Buffer>,
    /// What the device writes for the driver.
    pub(super) writable: Vec<Buffer>,
}

impl Ring {
    pub(super) fn new(
        index: usize,
        queue: Queue,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
        kicks: Arc<[EventFd]>,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            interrupt,
            kicks,
            used: false,
        }
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The next available entry to take and the next used entry to write.
    pub(super) fn progress(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Wakes the device's own thread for this queue again: the turn's budget was used up.
    pub(super) fn kick_again(&self) {
        // A full counter means that a wake-up is already waiting.
        let _ = self.kicks.get(self.index).map(|kick| kick.write(1));
    }

    /// The next chain of at most `limit` descriptors.
    pub(super) fn pop(&mut self, limit: usize) -> Result<Option<Chain>, Broken> {
        let queue = self.index;
        let head = {
            let memory = &self.memory;
            let mut available = self
                .queue
                .iter(memory)
                .map_err(|e| Broken::AvailableIndex {
                    queue,
                    reason: e.to_string(),
                })?;
            match available.next() {
                Some(chain) => chain,
                None => return Ok(None),
            }
        };
        read_chain(queue, head, &self.memory, limit).map(Some)
    }

    /// Puts the last popped chain back.
    pub(super) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in it.
    pub(super) fn complete(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.used = true;
        self.queue
            .add_used(&self.memory, head, written)
            .map_err(|e| self.broken(&e))
    }

    /// Interrupts the driver if something was completed and it wants to hear of it.
    pub(super) fn signal(&mut self) -> Result<(), Broken> {
        if !std::mem::take(&mut self.used) {
            return Ok(());
        }
        let wanted = self
            .queue
            .needs_notification(&self.memory)
            .map_err(|e| self.broken(&e))?;
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Asks the driver not to notify while the queue is being worked on.
    pub(super) fn silence(&mut self) -> Result<(), Broken> {
        self.queue
            .disable_notification(&self.memory)
            .map_err(|e| self.broken(&e))
    }

    /// Asks for notifications again; true when chains came in meanwhile.
    pub(super) fn listen(&mut self) -> Result<bool, Broken> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(|e| self.broken(&e))
    }

    fn broken(&self, error: &virtio_queue::Error) -> Broken {
        Broken::Ring {
            queue: self.index,
            reason: error.to_string(),
        }
    }
}

fn read_chain(
    queue: usize,
    mut descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    limit: usize,
) -> Result<Chain, Broken> {
    let head = descriptors.head_index();
    let mut chain = Chain {
        queue,
        head,
        readable: Vec::new(),
        writable: Vec::new(),
    };
    // The iterator ends without a word on anything it cannot follow; a chain that ended well ends
    // with a descriptor that has no successor.
    let mut ended = false;
    let mut seen = 0_usize;
    for descriptor in descriptors.by_ref() {
        seen = seen.saturating_add(1);
        if seen > limit {
            return Err(Broken::LongChain { queue, head, limit });
        }
        ended = !descriptor.has_next();
        let buffer = Buffer {
            address: descriptor.addr(),
            length: descriptor.len(),
        };
        if descriptor.is_write_only() {
            chain.writable.push(buffer);
        } else if chain.writable.is_empty() {
            chain.readable.push(buffer);
        } else {
            return Err(Broken::MixedChain { queue, head });
        }
        // A buffer of no bytes is taken wherever it points to: nothing is ever read from it.
        if buffer.length != 0 && !buffer.is_inside(memory) {
            return Err(Broken::OutsideMemory {
                queue,
                address: buffer.address.raw_value(),
                length: buffer.length,
            });
        }
    }
    if ended {
        Ok(chain)
    } else {
        Err(Broken::EndlessChain { queue, head })
    }
}

impl Buffer {
    fn is_inside(self, memory: &GuestMemory) -> bool {
        usize::try_from(self.length)
            .is_ok_and(|length| GuestMemoryBackend::check_range(memory, self.address, length))
    }
}

/// The bytes in all of `buffers`.
pub(super) fn total(buffers: &[Buffer]) -> u64 {
    buffers
        .iter()
        .map(|b| u64::from(b.length))
        .fold(0, u64::saturating_add)
}

/// The part of `buffers` from `skip` on, at most `length` bytes of it.
pub(super) fn part(buffers: &[Buffer], skip: u64, length: u64) -> Vec<Buffer> {
    let mut skip = skip;
    let mut left = length;
    let mut parts = Vec::new();
    for buffer in buffers {
        let size = u64::from(buffer.length);
        if skip >= size {
            skip = skip.saturating_sub(size);
            continue;
        }
        let take = size.saturating_sub(skip).min(left);
        if take == 0 {
            break;
        }
        let (Some(address), Ok(length)) = (buffer.address.checked_add(skip), u32::try_from(take))
        else {
            break;
        };
        parts.push(Buffer { address, length });
        left = left.saturating_sub(take);
        skip = 0;
    }
    parts
}

/// Copies the start of `buffers` into `bytes`; false when they hold fewer.
pub(super) fn copy_in(memory: &GuestMemory, buffers: &[Buffer], bytes: &mut [u8]) -> bool {
    let mut rest = bytes;
    for buffer in buffers {
        let take = rest
            .len()
            .min(usize::try_from(buffer.length).unwrap_or(usize::MAX));
        let Some((now, later)) = rest.split_at_mut_checked(take) else {
            return false;
        };
        if !now.is_empty() && memory.read_slice(now, buffer.address).is_err() {
            return false;
        }
        rest = later;
    }
    rest.is_empty()
}

/// Copies `bytes` to the start of `buffers`; false when they are too small.
pub(super) fn copy_out(memory: &GuestMemory, buffers: &[Buffer], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for buffer in buffers {
        let take = rest
            .len()
            .min(usize::try_from(buffer.length).unwrap_or(usize::MAX));
        let Some((now, later)) = rest.split_at_checked(take) else {
            return false;
        };
        if !now.is_empty() && memory.write_slice(now, buffer.address).is_err() {
            return false;
        }
        rest = later;
    }
    rest.is_empty()
}

/// `buffers` as the host sees them. A buffer across two regions of memory becomes two slices.
pub(super) fn slices<'m>(
    memory: &'m GuestMemory,
    buffers: &[Buffer],
) -> Option<Vec<VolatileSlice<'m>>> {
    let mut slices = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let length = usize::try_from(buffer.length).ok()?;
        if length == 0 {
            continue;
        }
        for slice in vm_memory::GuestMemory::get_slices(
            memory,
            buffer.address,
            length,
            Permissions::ReadWrite,
        )
        .ok()?
        {
            slices.push(slice.ok()?);
        }
    }
    Some(slices)
}
