//! What a driver asks of a disk, parsed into a value apart from its execution. The header is copied
//! into private memory once and only the copy is looked at; whatever comes out of here is inside the
//! disk and bounded.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use vm_memory::{Bytes as _, GuestAddress};

use super::SECTOR_SIZE;
use crate::virtio::GuestMemory;
use crate::virtio::fault::Broken;
use crate::virtio::ring::{Buffer, Chain, copy_in, part, total};

/// Most data segments of one request.
pub(super) const MOST_SEGMENTS: u32 = 126;
/// Most descriptors of one chain: the segments, the header and the status.
pub(super) const MOST_DESCRIPTORS: usize = 128;
/// Most bytes of one request: what a worker may spend on one before it looks up.
pub(super) const MOST_BYTES: u64 = 32 << 20;
/// Most ranges of one DISCARD or WRITE_ZEROES.
pub(super) const MOST_RANGES: u32 = 32;
/// Most sectors of one such range.
pub(super) const MOST_RANGE_SECTORS: u32 = 1 << 23;
/// What GET_ID answers, padded with zeroes to its 20 bytes.
pub(super) const ID: &[u8; 20] = b"supvm-root\0\0\0\0\0\0\0\0\0\0";

const HEADER_SIZE: usize = 16;
const RANGE_SIZE: usize = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Whether its space is to be given back.
    pub(super) unmap: bool,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { offset: u64, buffers: Vec<Buffer> },
    Write { offset: u64, buffers: Vec<Buffer> },
    Flush,
    GetId { buffers: Vec<Buffer> },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// A request that is answered, but not with success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Declined {
    #[error("request type {0} is not supported")]
    Unsupported(u32),
    #[error("flags {0:#x} of a range are not supported")]
    UnsupportedFlags(u32),
    #[error("{length} bytes at sector {sector} reach beyond the disk's {capacity} sectors")]
    BeyondEnd {
        sector: u64,
        length: u64,
        capacity: u64,
    },
    #[error("{0} bytes are not whole sectors")]
    Unaligned(u64),
    #[error("{0} bytes are more than one request may have")]
    TooLong(u64),
    #[error("{0} bytes are not a list of ranges of the announced length")]
    Ranges(u64),
    #[error("buffers run in the wrong direction for request type {0}")]
    Direction(u32),
}

/// A request and where its answer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    pub(super) operation: Result<Operation, Declined>,
}

/// Parses `chain`. An error means that there is nowhere to put an answer.
pub(super) fn parse(memory: &GuestMemory, chain: &Chain, sectors: u64) -> Result<Request, Broken> {
    let short = |missing| Broken::ShortChain {
        queue: chain.queue,
        head: chain.head,
        missing,
    };
    let mut header = [0; HEADER_SIZE];
    if !copy_in(memory, &chain.readable, &mut header) {
        return Err(short("the 16-byte header"));
    }
    // The last byte of the writable part, wherever the descriptors are cut.
    let writable = total(&chain.writable);
    let data = writable
        .checked_sub(1)
        .ok_or_else(|| short("the status byte"))?;
    let status = part(&chain.writable, data, 1);
    let status = status
        .first()
        .ok_or_else(|| short("the status byte"))?
        .address;
    let answer = part(&chain.writable, 0, data);
    let payload = part(
        &chain.readable,
        HEADER_SIZE as u64,
        total(&chain.readable).saturating_sub(HEADER_SIZE as u64),
    );
    Ok(Request {
        status,
        operation: operation(memory, &header, payload, answer, sectors),
    })
}

fn operation(
    memory: &GuestMemory,
    header: &[u8; HEADER_SIZE],
    payload: Vec<Buffer>,
    answer: Vec<Buffer>,
    sectors: u64,
) -> Result<Operation, Declined> {
    let (kind, sector) = (u32_at(header, 0), u64_at(header, 8));
    let wrong_way = match kind {
        IN | GET_ID => !payload.is_empty(),
        OUT | DISCARD | WRITE_ZEROES => !answer.is_empty(),
        _ => false,
    };
    if wrong_way {
        return Err(Declined::Direction(kind));
    }
    match kind {
        IN => Ok(Operation::Read {
            offset: place(sector, total(&answer), sectors)?,
            buffers: answer,
        }),
        OUT => Ok(Operation::Write {
            offset: place(sector, total(&payload), sectors)?,
            buffers: payload,
        }),
        FLUSH => Ok(Operation::Flush),
        GET_ID => Ok(Operation::GetId { buffers: answer }),
        DISCARD => Ok(Operation::Discard(ranges(memory, &payload, sectors, 0)?)),
        WRITE_ZEROES => Ok(Operation::WriteZeroes(ranges(
            memory, &payload, sectors, UNMAP,
        )?)),
        other => Err(Declined::Unsupported(other)),
    }
}

/// The byte offset of `sector`, if `length` bytes from there are on the disk.
fn place(sector: u64, length: u64, sectors: u64) -> Result<u64, Declined> {
    if !length.is_multiple_of(SECTOR_SIZE) {
        return Err(Declined::Unaligned(length));
    }
    if length > MOST_BYTES {
        return Err(Declined::TooLong(length));
    }
    within(sector, length / SECTOR_SIZE, sectors)
}

fn within(sector: u64, count: u64, sectors: u64) -> Result<u64, Declined> {
    let length = count.saturating_mul(SECTOR_SIZE);
    let beyond = Declined::BeyondEnd {
        sector,
        length,
        capacity: sectors,
    };
    let end = sector.checked_add(count).ok_or(beyond)?;
    if end > sectors {
        return Err(beyond);
    }
    sector.checked_mul(SECTOR_SIZE).ok_or(beyond)
}

fn ranges(
    memory: &GuestMemory,
    payload: &[Buffer],
    sectors: u64,
    known_flags: u32,
) -> Result<Vec<Range>, Declined> {
    let length = total(payload);
    let mut bytes = [0; RANGE_SIZE * MOST_RANGES as usize];
    let list = usize::try_from(length)
        .ok()
        .and_then(|length| bytes.get_mut(..length));
    let list = list.ok_or(Declined::Ranges(length))?;
    if list.is_empty() || !list.len().is_multiple_of(RANGE_SIZE) || !copy_in(memory, payload, list)
    {
        return Err(Declined::Ranges(length));
    }
    let (list, _) = list.as_chunks::<RANGE_SIZE>();
    list.iter()
        .map(|range| {
            let (sector, count, flags) = (u64_at(range, 0), u32_at(range, 8), u32_at(range, 12));
            if flags & !known_flags != 0 {
                return Err(Declined::UnsupportedFlags(flags));
            }
            let length = u64::from(count).saturating_mul(SECTOR_SIZE);
            if count > MOST_RANGE_SECTORS {
                return Err(Declined::TooLong(length));
            }
            let offset = within(sector, u64::from(count), sectors)?;
            Ok(Range {
                offset,
                length,
                unmap: flags & UNMAP != 0,
            })
        })
        .collect()
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut value = [0; 8];
    for (to, from) in value.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(value)
}

/// Writes the status byte.
pub(super) fn answer(memory: &GuestMemory, status: GuestAddress, value: u8) -> bool {
    memory.write_obj(value, status).is_ok()
}
