//! Copies of disk images. A copy shares its blocks with the template where the file system can
//! (reflink); elsewhere it is written out, holes and zeroes left out.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::StoreError;

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// By reference.
    Shared,
    /// By content.
    Written,
}

/// Copies the image at `from` to the new file `to`, sharing its blocks if possible. Nothing is
/// synced.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<Copied, StoreError> {
    let source = File::open(from).map_err(StoreError::io("open", from))?;
    let target = create(to)?;
    // SAFETY: FICLONE takes a descriptor's number; both files are open and nothing else is passed.
    let cloned = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE as _, source.as_raw_fd()) };
    if cloned == 0 {
        return Ok(Copied::Shared);
    }
    let cause = io::Error::last_os_error();
    match cause.raw_os_error() {
        // Not supported here, another file system, or not a pair that can share.
        Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL | libc::ENOTTY | libc::ENOSYS) => {
            copy_sparsely(&source, &target).map_err(StoreError::io("copy a disk to", to))?;
            Ok(Copied::Written)
        }
        _ => Err(StoreError::io("copy a disk to", to)(cause)),
    }
}

/// Copies by content only, for sources on another file system.
pub(crate) fn copy_written(from: &Path, to: &Path) -> Result<(), StoreError> {
    let source = File::open(from).map_err(StoreError::io("open", from))?;
    copy_sparsely(&source, &create(to)?).map_err(StoreError::io("copy a disk to", to))
}

fn create(path: &Path) -> Result<File, StoreError> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(StoreError::io("make", path))
}

/// Writes only chunks that hold something; the rest stays a hole. Where the source knows its own
/// holes they are not even read.
fn copy_sparsely(source: &File, target: &File) -> io::Result<()> {
    const CHUNK: usize = 64 << 10;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while let Some((start, end)) = next_data(source, offset, length)? {
        let mut at = start;
        while at < end {
            let wanted = usize::try_from(end.saturating_sub(at)).map_or(CHUNK, |n| n.min(CHUNK));
            let chunk = buffer.get_mut(..wanted).unwrap_or_default();
            let read = source.read_at(chunk, at)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let chunk = chunk.get(..read).unwrap_or_default();
            if chunk.iter().any(|byte| *byte != 0) {
                target.write_all_at(chunk, at)?;
            }
            at = at.saturating_add(read as u64);
        }
        offset = end;
    }
    Ok(())
}

/// The next stretch of data at or after `offset`; none when only a hole is left.
fn next_data(file: &File, offset: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    if offset >= length {
        return Ok(None);
    }
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match lseek(file, at, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(nix::Error::ENXIO) => Ok(None),
            Err(nix::Error::EINVAL) => Err(io::ErrorKind::Unsupported.into()),
            Err(error) => Err(io::Error::from(error)),
        }
    };
    match seek(offset, Whence::SeekData) {
        Ok(None) => Ok(None),
        Ok(Some(start)) => {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(length);
            Ok(Some((start, end.min(length))))
        }
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(Some((offset, length))),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_without_reflink_is_equal_and_keeps_holes_and_drops_zeroes() {
        // tmpfs cannot share blocks.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let from = directory.path().join("a");
        let to = directory.path().join("b");
        let file = File::create(&from).unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(&vec![0; 1 << 20], 4 << 20).unwrap();
        file.write_all_at(b"tail", (16 << 20) - 4).unwrap();
        assert_eq!(copy(&from, &to).unwrap(), Copied::Written);
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        let blocks = std::fs::metadata(&to).unwrap().blocks() * 512;
        assert!(blocks <= 256 << 10, "{blocks} bytes taken");
    }
}
