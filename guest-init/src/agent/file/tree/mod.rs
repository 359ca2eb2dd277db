//! Directory trees as tar archives: POSIX ustar with pax records, as every tar of the last twenty
//! years reads and writes them. Streams both ways through buffers of fixed size. An archive may
//! come from anybody: nothing in it leads outside the tree, and no length in it is memory.

mod grow;
mod header;
mod pack;
mod pax;
mod unpack;

pub(super) use pack::serve as pack;
pub(super) use unpack::serve as unpack;

#[cfg(fuzzing)]
pub(crate) use unpack::fuzz;

/// Bytes that everything in an archive is rounded up to.
const BLOCK: usize = 512;
/// Levels of directories in one archive.
const MAX_DEPTH: usize = 256;
/// Stretches of data in one file with holes.
const MAX_STRETCHES: usize = 32_768;

/// How many bytes of padding follow so many bytes.
fn padding(length: u64) -> usize {
    let over = usize::try_from(length % 512).unwrap_or(0);
    match over {
        0 => 0,
        over => BLOCK.saturating_sub(over),
    }
}

/// What an entry is, by its letter in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    name: Vec<u8>,
    /// What a link points to.
    link: Vec<u8>,
    mode: u32,
    uid: u64,
    gid: u64,
    /// Bytes that follow in the archive.
    size: u64,
    mtime_s: i64,
    mtime_ns: u32,
    major: u64,
    minor: u64,
}
