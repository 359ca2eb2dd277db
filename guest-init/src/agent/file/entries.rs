//! The names in a directory, read from the kernel through a buffer of fixed size. Unlike the
//! standard library's iterator it works on an open descriptor, so that nobody can exchange the
//! directory under a path meanwhile.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstatat};

/// Bytes of entries that the kernel gives at once.
const BUFFER: usize = 16 << 10;
/// Where a name begins within an entry, and where the entry's length and type are.
const NAME: usize = 19;
const LENGTH: usize = 16;
const TYPE: usize = 18;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Entries {
    directory: OwnedFd,
    buffer: Box<[u8]>,
    filled: usize,
    at: usize,
}

/// One name.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    /// The name alone; never `.` or `..`.
    pub(crate) name: &'a OsStr,
    /// The kernel's `DT_` number; `DT_UNKNOWN` when the file system does not say.
    pub(crate) kind: u8,
}

impl Entries {
    /// Opens `name` in `parent`, which must not be a symbolic link.
    pub(crate) fn open_in(parent: BorrowedFd<'_>, name: &OsStr) -> Result<Self, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(parent, name, flags, Mode::empty()).map(Self::new)
    }

    /// Opens a directory by its path, following links.
    pub(crate) fn open(path: &std::path::Path) -> Result<Self, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open(path, flags, Mode::empty()).map(Self::new)
    }

    /// Reads from an open directory.
    pub(crate) fn new(directory: OwnedFd) -> Self {
        Self {
            directory,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            filled: 0,
            at: 0,
        }
    }

    /// Begins anew.
    pub(crate) fn rewind(&mut self) -> Result<(), Errno> {
        (self.filled, self.at) = (0, 0);
        nix::unistd::lseek(&self.directory, 0, nix::unistd::Whence::SeekSet).map(drop)
    }

    /// The next name; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry<'_>>, Errno> {
        let (name, kind, next) = loop {
            if self.at >= self.filled {
                self.filled = self.fill()?;
                self.at = 0;
                if self.filled == 0 {
                    return Ok(None);
                }
            }
            let entry = self.buffer.get(self.at..self.filled).unwrap_or_default();
            let (name, kind, length) = parse(entry).ok_or(Errno::EIO)?;
            let start = self.at.saturating_add(name.start);
            let end = self.at.saturating_add(name.end);
            self.at = self.at.saturating_add(length);
            let bytes = self.buffer.get(start..end).unwrap_or_default();
            if bytes != b"." && bytes != b".." {
                break (start, kind, end);
            }
        };
        Ok(Some(Entry {
            name: OsStr::from_bytes(self.buffer.get(name..next).unwrap_or_default()),
            kind,
        }))
    }

    /// The next name as one of the caller's own.
    pub(crate) fn next_owned(&mut self) -> Result<Option<(OsString, u8)>, Errno> {
        let next = self.next()?;
        Ok(next.map(|entry| (entry.name.to_owned(), entry.kind)))
    }

    /// The next name that is a number, as processes have in /proc.
    pub(crate) fn next_number(&mut self) -> Result<Option<u32>, Errno> {
        while let Some(entry) = self.next()? {
            let number = entry.name.to_str().and_then(|name| name.parse().ok());
            if number.is_some() {
                return Ok(number);
            }
        }
        Ok(None)
    }

    fn fill(&mut self) -> Result<usize, Errno> {
        // SAFETY: the kernel writes at most as many bytes as the buffer has, which lives across
        // the call.
        let count = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                self.directory.as_raw_fd(),
                self.buffer.as_mut_ptr(),
                self.buffer.len(),
            )
        };
        match Errno::result(count) {
            Ok(count) => usize::try_from(count).map_err(|_| Errno::EIO),
            // A directory that was removed while it is open has no entries.
            Err(Errno::ENOENT) => Ok(0),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Entries {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Name, type and length of the first entry in `bytes`.
fn parse(bytes: &[u8]) -> Option<(std::ops::Range<usize>, u8, usize)> {
    let length = usize::from(u16::from_ne_bytes(*bytes.get(LENGTH..)?.first_chunk()?));
    let kind = *bytes.get(TYPE)?;
    let name = bytes.get(NAME..length)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    Some((NAME..NAME.saturating_add(end), kind, length))
}

/// Looks at `name` in a directory, never at what a link points to.
pub(crate) fn look(directory: BorrowedFd<'_>, name: &OsStr) -> Result<FileStat, Errno> {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_comes_once_also_when_they_do_not_fit_the_buffer() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..3000 {
            std::fs::write(directory.path().join(format!("file-{number:05}")), b"").unwrap();
        }
        let mut entries = Entries::open(directory.path()).unwrap();
        for _ in 0..2 {
            let mut names = std::collections::HashSet::new();
            while let Some((name, kind)) = entries.next_owned().unwrap() {
                assert_eq!(kind, libc::DT_REG);
                assert!(names.insert(name));
            }
            assert_eq!(names.len(), 3000);
            entries.rewind().unwrap();
        }
    }

    #[test]
    fn a_link_is_never_taken_for_the_directory_it_points_to() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("real")).unwrap();
        let parent = Entries::open(directory.path()).unwrap();
        let open = |name: &str| Entries::open_in(parent.as_fd(), OsStr::new(name));
        assert_eq!(open("link").err(), Some(Errno::ENOTDIR));
        assert!(open("real").is_ok());
    }

    #[test]
    fn bytes_that_are_no_entry_are_no_entry() {
        assert!(parse(&[0; 10]).is_none());
        assert!(parse(&[0; 40]).is_none());
        assert!(parse(&[0xff; 40]).is_none());
    }
}
