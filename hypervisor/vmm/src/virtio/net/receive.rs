//! A frame from the channel on its way into the driver's buffers. With mergeable buffers it takes as
//! many chains as it needs, which the driver sees all at once; a frame for which there are not enough
//! yet waits, and its chains stay in the queue.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use vm_memory::{Address as _, Bytes as _};

use super::checksum::{Partial, make_partial, make_whole};
use super::device::{HEADER, RX};
use super::transmit::MOST_DESCRIPTORS;
use crate::virtio::fault::Broken;
use crate::virtio::ring::{Buffer, Chain, Ring, total};

const NEEDS_CHECKSUM: u8 = 1;

/// What the driver chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Driver {
    /// A frame may take several chains.
    pub(super) merges: bool,
    /// It takes partial checksums.
    pub(super) fills_in: bool,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Done,
    /// The driver has too few buffers now; it kicks when it adds some.
    Waits,
    /// It does not fit into all the buffers that the driver can offer.
    TooLong,
}

struct Taken {
    head: u16,
    /// Where its buffers end.
    end: usize,
}

/// Chains for one frame. Its memory is used again and again.
pub(super) struct Basket {
    chains: Vec<Taken>,
    buffers: Vec<Buffer>,
    capacity: u64,
}

impl Basket {
    pub(super) fn new() -> Self {
        Self {
            chains: Vec::new(),
            buffers: Vec::new(),
            capacity: 0,
        }
    }

    fn clear(&mut self) {
        self.chains.clear();
        self.buffers.clear();
        self.capacity = 0;
    }

    /// Hands `frame` to the driver.
    pub(super) fn deliver(
        &mut self,
        ring: &mut Ring,
        chain: &mut Chain,
        frame: &mut [u8],
        driver: Driver,
    ) -> Result<Delivery, Broken> {
        self.clear();
        let needed = HEADER.saturating_add(frame.len()) as u64;
        while self.capacity < needed {
            let most = if driver.merges {
                usize::from(ring.size())
            } else {
                1
            };
            if self.chains.len() >= most {
                return Ok(self.put_back(ring, Delivery::TooLong));
            }
            if !ring.pop_into(MOST_DESCRIPTORS, chain)? {
                if ring.listen()? {
                    ring.silence()?;
                    continue;
                }
                return Ok(self.put_back(ring, Delivery::Waits));
            }
            self.take(chain)?;
        }
        let partial = if driver.fills_in {
            make_partial(frame)
        } else {
            make_whole(frame);
            None
        };
        self.write(ring, &header(partial, self.chains.len()), frame)?;
        Ok(Delivery::Done)
    }

    fn put_back(&mut self, ring: &mut Ring, delivery: Delivery) -> Delivery {
        for _ in &self.chains {
            ring.unpop();
        }
        self.clear();
        delivery
    }

    fn take(&mut self, chain: &Chain) -> Result<(), Broken> {
        let capacity = total(&chain.writable);
        if capacity < HEADER as u64 {
            return Err(Broken::ShortChain {
                queue: RX,
                head: chain.head,
                missing: "room for the 12-byte header",
            });
        }
        self.buffers.extend(&chain.writable);
        self.chains.push(Taken {
            head: chain.head,
            end: self.buffers.len(),
        });
        self.capacity = self.capacity.saturating_add(capacity);
        Ok(())
    }

    fn write(&mut self, ring: &mut Ring, header: &[u8], frame: &[u8]) -> Result<(), Broken> {
        let (mut header, mut frame, mut start) = (header, frame, 0);
        for taken in &self.chains {
            let mut written = 0_usize;
            for buffer in self.buffers.get(start..taken.end).unwrap_or_default() {
                let mut at = 0_usize;
                for source in [&mut header, &mut frame] {
                    let there = usize::try_from(buffer.length)
                        .unwrap_or(0)
                        .saturating_sub(at);
                    let Some((now, later)) = source.split_at_checked(there.min(source.len()))
                    else {
                        break;
                    };
                    if now.is_empty() {
                        continue;
                    }
                    let address = buffer.address.unchecked_add(at as u64);
                    ring.memory()
                        .write_slice(now, address)
                        .map_err(|error| Broken::Ring {
                            queue: RX,
                            reason: error.to_string(),
                        })?;
                    at = at.saturating_add(now.len());
                    *source = later;
                }
                written = written.saturating_add(at);
            }
            start = taken.end;
            ring.stage(taken.head, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        self.clear();
        ring.publish()
    }
}

/// The header before a frame that lies in `chains` chains.
fn header(partial: Option<Partial>, chains: usize) -> [u8; HEADER] {
    let flags = if partial.is_some() { NEEDS_CHECKSUM } else { 0 };
    let Partial { start, offset } = partial.unwrap_or_default();
    let [start_low, start_high] = start.to_le_bytes();
    let [offset_low, offset_high] = offset.to_le_bytes();
    let [count_low, count_high] = u16::try_from(chains).unwrap_or(u16::MAX).to_le_bytes();
    // Flags, no segmentation (type, header length, size), checksum, number of chains.
    [
        flags,
        0,
        0,
        0,
        0,
        0,
        start_low,
        start_high,
        offset_low,
        offset_high,
        count_low,
        count_high,
    ]
}
