//! Where a disk's bytes are. A back-end is called by the device's worker only, one call at a time;
//! every call is whole: it did all of it, or it failed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::VolatileSlice;

/// See the module. Offsets and lengths are in bytes and inside the capacity.
pub trait BlockBackend: Send + 'static {
    /// The disk's size; asked once.
    fn capacity(&self) -> io::Result<u64>;

    /// Reads into all of `buffers`, starting at `offset`.
    fn read(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `buffers`, starting at `offset`.
    fn write(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Returns once everything written before is on stable storage.
    fn sync(&mut self) -> io::Result<()>;

    /// Makes the range read as zeroes and gives its space back.
    fn punch_hole(&mut self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes the range read as zeroes and keeps its space.
    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()>;
}

/// A disk in a file, or on a block device.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
}

impl FileBackend {
    /// A disk of the file's size, open for reading and writing.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    fn transfer(
        &self,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
        call: impl Fn(i32, &[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut vectors: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let mut rest: &mut [libc::iovec] = &mut vectors;
        let mut offset = offset;
        while !rest.is_empty() {
            let now = rest.len().min(MOST_VECTORS);
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let (batch, _) = rest.split_at(now);
            let done = match usize::try_from(call(self.file.as_raw_fd(), batch, at)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => done,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            };
            offset = offset.saturating_add(done as u64);
            rest = advance(rest, done);
        }
        Ok(())
    }
}

/// IOV_MAX of Linux.
const MOST_VECTORS: usize = 1024;

fn advance(vectors: &mut [libc::iovec], done: usize) -> &mut [libc::iovec] {
    let mut left = done;
    let mut whole = 0;
    for vector in vectors.iter_mut() {
        if left < vector.iov_len {
            vector.iov_base = vector.iov_base.wrapping_byte_add(left);
            vector.iov_len = vector.iov_len.saturating_sub(left);
            break;
        }
        left = left.saturating_sub(vector.iov_len);
        whole += 1;
    }
    vectors.get_mut(whole..).unwrap_or_default()
}

impl BlockBackend for FileBackend {
    fn capacity(&self) -> io::Result<u64> {
        use std::io::Seek as _;
        // The end's position is the size of a block device too, where metadata says zero.
        (&self.file).seek(io::SeekFrom::End(0))
    }

    fn read(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, |file, vectors, at| {
            let count = i32::try_from(vectors.len()).unwrap_or(0);
            // SAFETY: the vectors point into guest memory, which `buffers` keeps mapped and which
            // Rust never takes for memory of its own; `count` is their number.
            unsafe { libc::preadv(file, vectors.as_ptr(), count, at) }
        })
    }

    fn write(&mut self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, |file, vectors, at| {
            let count = i32::try_from(vectors.len()).unwrap_or(0);
            // SAFETY: as for reading; the kernel only reads the memory here.
            unsafe { libc::pwritev(file, vectors.as_ptr(), count, at) }
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch_hole(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            offset,
            length,
        )
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(
            FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            offset,
            length,
        )
    }
}

impl FileBackend {
    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let length = i64::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}
