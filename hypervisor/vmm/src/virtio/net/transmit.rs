//! Frames of the guest on their way to the channel: many chains become one send, straight out of
//! guest memory. Which chains are done depends on how many bytes the socket took: of a frame that it
//! took in part the rest is copied, and those after it go back into the queue.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use protocol::host::MAX_ETHERNET_FRAME;
use vm_memory::{Address as _, Bytes as _, Permissions};

use super::channel::{LEAST_FRAME, PREFIX, Unsent};
use super::device::{HEADER, TX};
use crate::virtio::GuestMemory;
use crate::virtio::fault::Broken;
use crate::virtio::ring::{Buffer, Chain, Ring, total};

/// Most descriptors of one chain: Linux uses 19 at most.
pub(super) const MOST_DESCRIPTORS: usize = 64;
/// Frames of one batch.
const MOST_FRAMES: usize = 64;
/// Bytes of one batch, after which no frame is added: about what a socket takes at once.
const ENOUGH_BYTES: usize = 192 << 10;
/// Pieces of one batch.
const MOST_VECTORS: usize = 512;

struct Frame {
    head: u16,
    /// The bytes behind the header; 0 when it is none that can be sent.
    length: usize,
    /// Where its buffers begin.
    buffers: usize,
}

/// Chains that were taken out of the queue and not answered yet. Its memory is used again and again.
pub(super) struct Batch {
    frames: Vec<Frame>,
    buffers: Vec<Buffer>,
    prefixes: Vec<[u8; PREFIX]>,
    bytes: usize,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// Frames that were answered.
    pub(super) frames: usize,
    /// Those among them that no channel can carry.
    pub(super) malformed: usize,
    /// Whether some went back into the queue.
    pub(super) is_blocked: bool,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            frames: Vec::with_capacity(MOST_FRAMES),
            buffers: Vec::with_capacity(MOST_VECTORS),
            prefixes: Vec::with_capacity(MOST_FRAMES),
            bytes: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.buffers.clear();
        self.prefixes.clear();
        self.bytes = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The bytes that are to be sent.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn has_room(&self) -> bool {
        // One piece for each buffer, one for each prefix, and room for a longest chain.
        let pieces = self
            .buffers
            .len()
            .saturating_add(self.frames.len())
            .saturating_add(MOST_DESCRIPTORS);
        self.frames.len() < MOST_FRAMES && self.bytes < ENOUGH_BYTES && pieces < MOST_VECTORS
    }

    /// Adds a chain.
    pub(super) fn add(&mut self, chain: &Chain) -> Result<(), Broken> {
        let length =
            total(&chain.readable)
                .checked_sub(HEADER as u64)
                .ok_or(Broken::ShortChain {
                    queue: TX,
                    head: chain.head,
                    missing: "the 12-byte header",
                })?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let mut frame = Frame {
            head: chain.head,
            length: 0,
            buffers: self.buffers.len(),
        };
        if (LEAST_FRAME..=MAX_ETHERNET_FRAME).contains(&length) {
            frame.length = length;
            // The header is not looked at: whatever it asks for, nothing of it is done here.
            let mut skip = HEADER as u32;
            for buffer in &chain.readable {
                let now = skip.min(buffer.length);
                skip = skip.saturating_sub(now);
                let length = buffer.length.saturating_sub(now);
                if length > 0 {
                    let address = buffer.address.unchecked_add(u64::from(now));
                    self.buffers.push(Buffer { address, length });
                }
            }
            self.bytes = self.bytes.saturating_add(PREFIX).saturating_add(length);
        }
        let prefix = u32::try_from(frame.length).unwrap_or(0);
        self.prefixes.push(prefix.to_be_bytes());
        self.frames.push(frame);
        Ok(())
    }

    fn buffers_of(&self, frame: usize) -> &[Buffer] {
        let start = self.frames.get(frame).map_or(0, |frame| frame.buffers);
        let next = self.frames.get(frame.saturating_add(1));
        let end = next.map_or(self.buffers.len(), |next| next.buffers);
        self.buffers.get(start..end).unwrap_or_default()
    }

    /// Calls `send` with all that is to be sent.
    pub(super) fn with_vectors<T>(
        &mut self,
        memory: &GuestMemory,
        send: impl FnOnce(&[libc::iovec], usize) -> T,
    ) -> T {
        let mut vectors = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; MOST_VECTORS];
        let mut count = 0;
        for number in 0..self.frames.len() {
            let Some((frame, prefix)) = self.frames.get(number).zip(self.prefixes.get(number))
            else {
                break;
            };
            if frame.length == 0 {
                continue;
            }
            let mut room = vectors.get_mut(count..).unwrap_or_default().iter_mut();
            let used = fill(&mut room, prefix, memory, self.buffers_of(number));
            match used {
                Some(used) => count = count.saturating_add(used),
                // In more pieces than there is room for: only where memory itself is in pieces.
                None => {
                    if let Some(frame) = self.frames.get_mut(number) {
                        let bytes = frame.length.saturating_add(PREFIX);
                        self.bytes = self.bytes.saturating_sub(bytes);
                        frame.length = 0;
                    }
                }
            }
        }
        send(vectors.get(..count).unwrap_or_default(), self.bytes)
    }

    /// Answers the chains of which `taken` bytes went out; the others go back into the queue.
    pub(super) fn settle(
        &mut self,
        ring: &mut Ring,
        taken: usize,
        unsent: &mut Unsent,
    ) -> Result<Settled, Broken> {
        let mut left = taken;
        let mut settled = Settled::default();
        for (number, frame) in self.frames.iter().enumerate() {
            let size = frame.length.saturating_add(PREFIX);
            if frame.length == 0 {
                settled.malformed = settled.malformed.saturating_add(1);
            } else if left == 0 {
                settled.is_blocked = true;
                break;
            } else if left >= size {
                left = left.saturating_sub(size);
            } else {
                let prefix = self.prefixes.get(number).copied().unwrap_or_default();
                let rest = unsent.room(size.saturating_sub(left));
                copy_rest(ring.memory(), &prefix, self.buffers_of(number), left, rest)?;
                left = 0;
            }
            ring.stage(frame.head, 0)?;
            settled.frames = settled.frames.saturating_add(1);
        }
        for _ in settled.frames..self.frames.len() {
            ring.unpop();
        }
        self.clear();
        ring.publish()?;
        Ok(settled)
    }

    /// Answers all chains; none of them goes anywhere.
    pub(super) fn drop_all(&mut self, ring: &mut Ring) -> Result<usize, Broken> {
        for frame in &self.frames {
            ring.stage(frame.head, 0)?;
        }
        let count = self.frames.len();
        self.clear();
        ring.publish()?;
        Ok(count)
    }
}

/// How many vectors it took; None when there are too few.
fn fill<'v>(
    vectors: &mut impl Iterator<Item = &'v mut libc::iovec>,
    prefix: &[u8; PREFIX],
    memory: &GuestMemory,
    buffers: &[Buffer],
) -> Option<usize> {
    let mut count = 1_usize;
    *vectors.next()? = libc::iovec {
        iov_base: prefix.as_ptr().cast_mut().cast(),
        iov_len: PREFIX,
    };
    for buffer in buffers {
        let length = usize::try_from(buffer.length).ok()?;
        let slices =
            vm_memory::GuestMemory::get_slices(memory, buffer.address, length, Permissions::Read);
        for slice in slices.ok()? {
            // Guest memory is mapped as a whole and for good: the pointer outlives its guard.
            let guard = slice.ok()?.ptr_guard();
            *vectors.next()? = libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: guard.len(),
            };
            count = count.saturating_add(1);
        }
    }
    Some(count)
}

/// Copies a frame's bytes from `skip` on, its prefix included.
fn copy_rest(
    memory: &GuestMemory,
    prefix: &[u8; PREFIX],
    buffers: &[Buffer],
    skip: usize,
    rest: &mut [u8],
) -> Result<(), Broken> {
    let (in_prefix, mut skip) = (skip.min(PREFIX), skip.saturating_sub(PREFIX) as u64);
    let prefix = prefix.get(in_prefix..).unwrap_or_default();
    let Some((first, mut rest)) = rest.split_at_mut_checked(prefix.len()) else {
        return Ok(());
    };
    first.copy_from_slice(prefix);
    for buffer in buffers {
        let now = skip.min(u64::from(buffer.length));
        skip = skip.saturating_sub(now);
        let there = u64::from(buffer.length).saturating_sub(now);
        let length = rest.len().min(usize::try_from(there).unwrap_or(0));
        let Some((piece, later)) = rest.split_at_mut_checked(length) else {
            break;
        };
        if !piece.is_empty() {
            let address = buffer.address.unchecked_add(now);
            memory
                .read_slice(piece, address)
                .map_err(|error| Broken::Ring {
                    queue: TX,
                    reason: error.to_string(),
                })?;
        }
        rest = later;
    }
    Ok(())
}
