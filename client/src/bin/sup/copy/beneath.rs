//! Making files in a directory that they cannot leave. Every name is walked from the directory's own
//! descriptor, one part at a time and through no symbolic link, so that neither a name nor a link
//! that was made before leads out. A file gets its name in one step, in the place of what had it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use data_encoding::HEXLOWER;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, syncfs, unlinkat};

/// The deepest directory.
const MOST_PARTS: usize = 256;

/// Why a name is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NameError {
    #[error("it begins with a slash")]
    Absolute,
    #[error("it leads up with `..`")]
    Upwards,
    #[error("it has more than {MOST_PARTS} parts, or one that is too long")]
    TooLong,
    #[error("it has a zero byte")]
    Zero,
}

/// A name inside the directory; no part of it leads up. The directory itself has no part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inside(Vec<OsString>);

impl Inside {
    pub(super) fn parse(name: &[u8]) -> Result<Self, NameError> {
        if name.first() == Some(&b'/') {
            return Err(NameError::Absolute);
        }
        if name.contains(&0) {
            return Err(NameError::Zero);
        }
        let mut parts = Vec::new();
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(NameError::Upwards),
                part if part.len() > 255 || parts.len() >= MOST_PARTS => {
                    return Err(NameError::TooLong);
                }
                part => parts.push(OsString::from_vec(part.to_vec())),
            }
        }
        Ok(Self(parts))
    }

    /// The directory that it is in, and its own name; none of the directory itself.
    pub(super) fn split(&self) -> Option<(&[OsString], &OsStr)> {
        let (name, parents) = self.0.split_last()?;
        Some((parents, name))
    }

    pub(super) fn parts(&self) -> &[OsString] {
        &self.0
    }
}

/// Whether a link with this target, in a directory so deep, stays inside. It may go up at its
/// beginning only: what `..` means behind a name depends on other links.
pub(super) fn stays_inside(target: &[u8], depth: usize) -> bool {
    let mut up = 0_usize;
    let mut down = false;
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b".." if down => return false,
            b".." => up = up.saturating_add(1),
            b"" | b"." => {}
            _ => down = true,
        }
    }
    target.first() != Some(&b'/') && up <= depth
}

/// The directory that nothing leaves.
pub(super) struct Root {
    top: OwnedFd,
    /// The directory that was asked for last: an archive names a directory's files in a row.
    last: Option<(Vec<OsString>, OwnedFd)>,
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

impl Root {
    /// The path is the user's own and may be a link.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let top = std::fs::File::open(path)?;
        if !top.metadata()?.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        Ok(Self {
            top: top.into(),
            last: None,
        })
    }

    /// A directory inside. Those that are missing are made.
    pub(super) fn directory(&mut self, parts: &[OsString]) -> io::Result<BorrowedFd<'_>> {
        if parts.is_empty() {
            return Ok(self.top.as_fd());
        }
        let known = self.last.take().filter(|(known, _)| known == parts);
        let directory = match known {
            Some((_, directory)) => directory,
            None => self.walk(parts)?,
        };
        let last = self.last.insert((parts.to_vec(), directory));
        Ok(last.1.as_fd())
    }

    /// Waits until everything inside is on its disk. One call for the file system takes less than one
    /// for each of many files.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(syncfs(&self.top)?)
    }

    fn walk(&self, parts: &[OsString]) -> io::Result<OwnedFd> {
        let mut at = self.top.try_clone()?;
        for part in parts {
            let next = match openat(&at, part.as_os_str(), DIRECTORY, Mode::empty()) {
                Err(Errno::ENOENT) => {
                    mkdirat(&at, part.as_os_str(), Mode::S_IRWXU)?;
                    fchmod_new(&at, part)?
                }
                other => other?,
            };
            at = next;
        }
        Ok(at)
    }
}

/// A directory that was just made, as everyone's usually is.
fn fchmod_new(at: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let made = openat(at, name, DIRECTORY, Mode::empty())?;
    fchmod(&made, Mode::from_bits_truncate(0o755))?;
    Ok(made)
}

/// What is made under a name of its own and is gone if it does not get its real one.
pub(super) struct Pending<'d> {
    directory: BorrowedFd<'d>,
    temporary: OsString,
}

impl<'d> Pending<'d> {
    pub(super) fn file(directory: BorrowedFd<'d>) -> io::Result<(Self, std::fs::File)> {
        let pending = Self::name(directory)?;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(directory, pending.temporary.as_os_str(), flags, mode)?;
        Ok((pending, file.into()))
    }

    pub(super) fn symlink(directory: BorrowedFd<'d>, target: &[u8]) -> io::Result<Self> {
        let pending = Self::name(directory)?;
        symlinkat(
            OsStr::from_bytes(target),
            directory,
            pending.temporary.as_os_str(),
        )?;
        Ok(pending)
    }

    /// Another name of a regular file.
    pub(super) fn link(
        directory: BorrowedFd<'d>,
        from: BorrowedFd<'_>,
        name: &OsStr,
    ) -> io::Result<Self> {
        if !is(from, name, SFlag::S_IFREG)? {
            return Err(io::Error::other("its target is no regular file"));
        }
        let pending = Self::name(directory)?;
        linkat(
            from,
            name,
            directory,
            pending.temporary.as_os_str(),
            AtFlags::empty(),
        )?;
        Ok(pending)
    }

    fn name(directory: BorrowedFd<'d>) -> io::Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let temporary = format!(".sup-{}", HEXLOWER.encode(&random)).into();
        Ok(Self {
            directory,
            temporary,
        })
    }

    /// Takes the place of what has the name; a directory keeps it.
    pub(super) fn commit(self, name: &OsStr) -> io::Result<()> {
        let (from, to) = (self.directory, self.directory);
        Ok(renameat(from, self.temporary.as_os_str(), to, name)?)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        // Also after a rename, which does nothing between two names of one file.
        let name = self.temporary.as_os_str();
        let _ = unlinkat(self.directory, name, UnlinkatFlags::NoRemoveDir);
    }
}

/// Makes a directory, or takes one that exists, and opens it. Says whether it is new.
pub(super) fn make_directory(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<(OwnedFd, bool)> {
    let is_new = match mkdirat(parent, name, Mode::S_IRWXU) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        Err(errno) => return Err(errno.into()),
    };
    Ok((openat(parent, name, DIRECTORY, Mode::empty())?, is_new))
}

/// What a VM's file has for a mode, here: without the bits that mean more than access, and without
/// what our own umask keeps from others.
pub(super) fn local_mode(mode: u32) -> u32 {
    static UMASK: OnceLock<u32> = OnceLock::new();
    let umask = UMASK.get_or_init(|| {
        // Asking for it by umask(2) would change it for a moment (proc_pid_status(5)).
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
        umask
            .and_then(|digits| u32::from_str_radix(digits.trim(), 8).ok())
            .unwrap_or(0o022)
    });
    mode & 0o777 & !umask
}

fn is(directory: BorrowedFd<'_>, name: &OsStr, kind: SFlag) -> io::Result<bool> {
    let about = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(about.st_mode & SFlag::S_IFMT.bits() == kind.bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_may_only_go_up_at_its_beginning_and_no_further_than_the_top() {
        for (target, depth) in [
            ("a", 0),
            ("../a", 1),
            ("./../../b/c", 2),
            ("a/b", 0),
            (".", 0),
        ] {
            assert!(stays_inside(target.as_bytes(), depth), "{target} {depth}");
        }
        for (target, depth) in [
            ("/", 9),
            ("/etc/passwd", 9),
            ("..", 0),
            ("../../a", 1),
            ("a/..", 5),
            ("a/../..", 5),
            ("./a/./../b", 5),
        ] {
            assert!(!stays_inside(target.as_bytes(), depth), "{target} {depth}");
        }
    }

    #[test]
    fn names_that_lead_out_are_no_names() {
        let parse = |name: &str| Inside::parse(name.as_bytes());
        assert_eq!(parse("./").unwrap().parts(), [""; 0]);
        assert_eq!(parse("./a//b/").unwrap().parts(), ["a", "b"]);
        assert_eq!(parse("/a"), Err(NameError::Absolute));
        assert_eq!(parse("a/../b"), Err(NameError::Upwards));
        assert_eq!(parse("a\0"), Err(NameError::Zero));
        assert_eq!(parse(&"a".repeat(256)), Err(NameError::TooLong));
        assert_eq!(parse(&"a/".repeat(257)), Err(NameError::TooLong));
    }
}
