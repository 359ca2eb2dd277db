//! Executes parsed requests one after the other on the back-end and answers each when it is done.
//! It decides nothing about validity (that is the parser's) and knows no files (that is the
//! back-end's).
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::io;

use virtio_bindings::bindings::virtio_blk;

use super::backend::BlockBackend;
use super::request::{
    Declined, ID, MOST_DESCRIPTORS, MOST_RANGE_SECTORS, MOST_RANGES, MOST_SEGMENTS, Operation,
    Range, Request, answer, parse,
};
use super::{BlockState, SECTOR_SIZE};
use crate::virtio::GuestMemory;
use crate::virtio::fault::Broken;
use crate::virtio::limit::LogLimit;
use crate::virtio::ring::{Buffer, copy_out, part, slices, total};
use crate::virtio::transport::DeviceState;
use crate::virtio::worker::{Device, Rings};

const QUEUE_SIZES: &[u16] = &[256];
/// Requests per wake-up.
const BUDGET: u32 = 64;
/// Bytes per wake-up.
const BYTE_BUDGET: u64 = 8 << 20;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

pub(super) struct BlockDevice {
    backend: Box<dyn BlockBackend>,
    sectors: u64,
    declined: LogLimit,
    failed: LogLimit,
}

impl BlockDevice {
    pub(super) fn new(backend: Box<dyn BlockBackend>) -> io::Result<Self> {
        let sectors = backend.capacity()? / SECTOR_SIZE;
        Ok(Self {
            backend,
            sectors,
            declined: LogLimit::new(),
            failed: LogLimit::new(),
        })
    }

    /// The status, and the bytes written for the driver.
    fn execute(&mut self, memory: &GuestMemory, request: &Request) -> (u8, u64) {
        let operation = match &request.operation {
            Ok(operation) => operation,
            Err(declined) => return (self.decline(declined), 0),
        };
        let result = match operation {
            Operation::Read { offset, buffers } => self.read(memory, buffers, *offset),
            Operation::Write { offset, buffers } => self.write(memory, buffers, *offset),
            Operation::Flush => self.backend.sync().map(|()| 0),
            Operation::GetId { buffers } => {
                let buffers = part(buffers, 0, ID.len() as u64);
                let id = ID
                    .get(..usize::try_from(total(&buffers)).unwrap_or(0))
                    .unwrap_or_default();
                if copy_out(memory, &buffers, id) {
                    Ok(id.len() as u64)
                } else {
                    Err(io::ErrorKind::InvalidInput.into())
                }
            }
            Operation::Discard(ranges) => ranges
                .iter()
                .try_for_each(|range| self.backend.punch_hole(range.offset, range.length))
                .map(|()| 0),
            Operation::WriteZeroes(ranges) => ranges
                .iter()
                .try_for_each(|range| self.zero(range))
                .map(|()| 0),
        };
        match result {
            Ok(written) => (OK, written),
            Err(error) => {
                let trims = matches!(operation, Operation::Discard(_) | Operation::WriteZeroes(_));
                // Not every file system can: then the driver writes its zeroes itself.
                if trims && error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                    return (UNSUPPORTED, 0);
                }
                if let Some(suppressed) = self.failed.allow() {
                    let operation = operation.name();
                    tracing::error!(operation, %error, suppressed, "disk request failed");
                }
                (IO_ERROR, 0)
            }
        }
    }

    fn decline(&self, declined: &Declined) -> u8 {
        if let Some(suppressed) = self.declined.allow() {
            tracing::warn!(reason = %declined, suppressed, "disk request declined");
        }
        match declined {
            Declined::Unsupported(_) | Declined::UnsupportedFlags(_) => UNSUPPORTED,
            _ => IO_ERROR,
        }
    }

    fn read(&mut self, memory: &GuestMemory, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        let slices = slices(memory, buffers).ok_or(io::ErrorKind::InvalidInput)?;
        self.backend.read(&slices, offset)?;
        Ok(total(buffers))
    }

    fn write(&mut self, memory: &GuestMemory, buffers: &[Buffer], offset: u64) -> io::Result<u64> {
        let slices = slices(memory, buffers).ok_or(io::ErrorKind::InvalidInput)?;
        self.backend.write(&slices, offset)?;
        Ok(0)
    }

    fn zero(&mut self, range: &Range) -> io::Result<()> {
        if range.unmap {
            self.backend.punch_hole(range.offset, range.length)
        } else {
            self.backend.zero(range.offset, range.length)
        }
    }
}

impl Operation {
    fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::GetId { .. } => "get id",
            Self::Discard(_) => "discard",
            Self::WriteZeroes(_) => "write zeroes",
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Read { buffers, .. } | Self::Write { buffers, .. } => total(buffers),
            _ => 0,
        }
    }
}

impl Device for BlockDevice {
    fn features(&self) -> u64 {
        [
            virtio_blk::VIRTIO_BLK_F_SEG_MAX,
            virtio_blk::VIRTIO_BLK_F_BLK_SIZE,
            virtio_blk::VIRTIO_BLK_F_FLUSH,
            virtio_blk::VIRTIO_BLK_F_DISCARD,
            virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES,
        ]
        .iter()
        .fold(0, |features, bit| features | 1_u64.wrapping_shl(*bit))
    }

    fn config(&self) -> Vec<u8> {
        let sector_size = u32::try_from(SECTOR_SIZE).unwrap_or(512);
        let mut config = Vec::with_capacity(60);
        config.extend(self.sectors.to_le_bytes());
        config.extend([0; 4]); // size_max
        config.extend(MOST_SEGMENTS.to_le_bytes());
        config.extend([0; 4]); // geometry
        config.extend(sector_size.to_le_bytes());
        config.extend([0; 8]); // topology
        config.extend([0; 4]); // writeback, num_queues
        config.extend(MOST_RANGE_SECTORS.to_le_bytes()); // discard
        config.extend(MOST_RANGES.to_le_bytes());
        config.extend(8_u32.to_le_bytes()); // discard alignment: a host page
        config.extend(MOST_RANGE_SECTORS.to_le_bytes()); // write zeroes
        config.extend(MOST_RANGES.to_le_bytes());
        config.extend([1, 0, 0, 0]); // write zeroes may unmap
        config
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn kicked(&mut self, queue: usize, rings: &mut Rings) -> Result<(), Broken> {
        let Some(ring) = rings.get_mut(queue).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        let mut bytes = 0_u64;
        for _ in 0..BUDGET {
            let chain = match ring.pop(MOST_DESCRIPTORS)? {
                Some(chain) => chain,
                None if ring.listen()? => {
                    ring.silence()?;
                    continue;
                }
                None => return Ok(()),
            };
            let request = parse(ring.memory(), &chain, self.sectors)?;
            bytes = bytes.saturating_add(request.operation.as_ref().map_or(0, Operation::bytes));
            let (status, written) = self.execute(ring.memory(), &request);
            if !answer(ring.memory(), request.status, status) {
                return Err(Broken::OutsideMemory {
                    queue,
                    address: request.status.0,
                    length: 1,
                });
            }
            let length = u32::try_from(written.saturating_add(1)).unwrap_or(1);
            ring.complete(chain.head, length)?;
            if bytes >= BYTE_BUDGET {
                break;
            }
        }
        ring.kick_again();
        Ok(())
    }

    fn finish(&mut self) {
        if let Err(error) = self.backend.sync() {
            tracing::error!(%error, "the disk could not be synced at the machine's end");
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {})
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Block(_))
    }
}
