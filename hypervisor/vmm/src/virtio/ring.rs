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
use std::sync::atomic::{Ordering, fence};

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
    /// Answers that lie in the used ring and are not published yet.
    staged: u16,
    /// The next used entry when the driver was last told, or might have been.
    told: u16,
}

/// A buffer inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: GuestAddress,
    pub(super) length: u32,
}

/// A chain of buffers, copied out of the descriptor table once.
#[derive(Debug, Default)]
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
        let told = queue.next_used();
        Self {
            index,
            queue,
            memory,
            interrupt,
            kicks,
            staged: 0,
            told,
        }
    }

    /// Entries of the queue.
    pub(super) fn size(&self) -> u16 {
        self.queue.size()
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
        let mut chain = Chain::default();
        Ok(self.pop_into(limit, &mut chain)?.then_some(chain))
    }

    /// As [`pop`](Self::pop), into a chain whose memory is used again; false when there is none.
    pub(super) fn pop_into(&mut self, limit: usize, chain: &mut Chain) -> Result<bool, Broken> {
        let queue = self.index;
        let descriptors = {
            let memory = &self.memory;
            let mut available = self
                .queue
                .iter(memory)
                .map_err(|e| Broken::AvailableIndex {
                    queue,
                    reason: e.to_string(),
                })?;
            match available.next() {
                Some(descriptors) => descriptors,
                None => return Ok(false),
            }
        };
        chain.queue = queue;
        read_chain(descriptors, &self.memory, limit, chain)?;
        Ok(true)
    }

    /// Puts the last popped chain back.
    pub(super) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in it.
    pub(super) fn complete(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.stage(head, written)?;
        self.publish()
    }

    /// As [`complete`](Self::complete), but the driver sees it with the next
    /// [`publish`](Self::publish) only: what belongs together appears at once.
    pub(super) fn stage(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        const HEADER: u64 = 4;
        const ENTRY: u64 = 8;
        let place = self.queue.next_used().wrapping_add(self.staged);
        let Some(place) = place.checked_rem(self.queue.size()) else {
            return Err(self.broken(&"it has no entries"));
        };
        if head >= self.queue.size() {
            return Err(self.broken(&virtio_queue::Error::InvalidDescriptorIndex));
        }
        let entry = (u64::from(written) << 32 | u64::from(head)).to_le_bytes();
        let at = HEADER.saturating_add(ENTRY.saturating_mul(u64::from(place)));
        let address = self.queue.used_ring().saturating_add(at);
        self.memory
            .write_slice(&entry, GuestAddress(address))
            .map_err(|e| self.broken(&e))?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was staged.
    pub(super) fn publish(&mut self) -> Result<(), Broken> {
        const INDEX: u64 = 2;
        let staged = std::mem::take(&mut self.staged);
        if staged == 0 {
            return Ok(());
        }
        let next = self.queue.next_used().wrapping_add(staged);
        self.queue.set_next_used(next);
        let address = GuestAddress(self.queue.used_ring().saturating_add(INDEX));
        self.memory
            .store(next.to_le(), address, Ordering::Release)
            .map_err(|e| self.broken(&e))
    }

    /// Interrupts the driver if something was completed and it wants to hear of it.
    pub(super) fn signal(&mut self) -> Result<(), Broken> {
        let next = self.queue.next_used();
        let told = std::mem::replace(&mut self.told, next);
        let new = next.wrapping_sub(told);
        if new == 0 {
            return Ok(());
        }
        let wanted = if self.queue.event_idx_enabled() {
            // Whether the entry after which it wants to hear is among the new ones.
            let event = self.used_event()?;
            next.wrapping_sub(event).wrapping_sub(1) < new
        } else {
            true
        };
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// The used entry after which the driver wants an interrupt: behind the available ring.
    fn used_event(&self) -> Result<u16, Broken> {
        const HEADER: u64 = 4;
        const ENTRY: u64 = 2;
        let at = HEADER.saturating_add(ENTRY.saturating_mul(u64::from(self.queue.size())));
        let address = GuestAddress(self.queue.avail_ring().saturating_add(at));
        // The driver writes this, then looks at the used ring; here it is the other way round.
        fence(Ordering::SeqCst);
        self.memory
            .load(address, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|e| self.broken(&e))
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

    fn broken(&self, error: &dyn std::fmt::Display) -> Broken {
        Broken::Ring {
            queue: self.index,
            reason: error.to_string(),
        }
    }
}

fn read_chain(
    mut descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    limit: usize,
    chain: &mut Chain,
) -> Result<(), Broken> {
    let (queue, head) = (chain.queue, descriptors.head_index());
    chain.head = head;
    chain.readable.clear();
    chain.writable.clear();
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
        Ok(())
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
