//! The tree that an archive becomes. Every name is looked up below the tree's open directory by the
//! kernel's own rule that nothing may lead out of it, so that `..`, absolute names and links in the
//! archive or on the disk cannot.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, makedev, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use protocol::{ErrorBody, ErrorCode};

use super::{Entry, Kind, MAX_DEPTH};
use crate::agent::file::error::refused;

/// Longest name of an entry.
const MAX_NAME: usize = 4096;

/// An archive that cannot be unpacked.
pub(super) fn bad(message: impl Into<String>) -> ErrorBody {
    ErrorBody::caller(ErrorCode::BadArchive, message)
}

/// When the entry was changed.
pub(super) fn time(entry: &Entry) -> TimeSpec {
    TimeSpec::new(entry.mtime_s, i64::from(entry.mtime_ns))
}

/// The tree that grows.
pub(super) struct Tree {
    root: OwnedFd,
    path: PathBuf,
    owners: bool,
    special: bool,
    /// Directories whose times are set when the entries in them have been made, each in the one
    /// before.
    directories: Vec<Entry>,
}

/// An entry's place: an open directory and a name in it.
struct Spot {
    parent: OwnedFd,
    name: Vec<u8>,
}

impl Spot {
    fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }
}

/// A name of the archive as its parts. Slashes at the front are dropped; `..` is refused.
fn parts(name: &[u8]) -> Result<Vec<&[u8]>, ErrorBody> {
    let shown = || String::from_utf8_lossy(name.get(..200).unwrap_or(name)).into_owned();
    if name.len() > MAX_NAME || name.contains(&0) {
        return Err(bad(format!(
            "the name {:?} is longer than {MAX_NAME} bytes or has a zero byte",
            shown()
        )));
    }
    let parts: Vec<&[u8]> = name
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    if parts.iter().any(|part| *part == b"..") {
        return Err(bad(format!("the name {:?} leads out of the tree", shown())));
    }
    if parts.len() > MAX_DEPTH {
        return Err(bad(format!("the name {:?} is too deep", shown())));
    }
    Ok(parts)
}

impl Tree {
    /// An open directory, with its path for messages.
    pub(super) fn new(root: OwnedFd, path: PathBuf, owners: bool, special: bool) -> Self {
        Self {
            root,
            path,
            owners,
            special,
            directories: Vec::new(),
        }
    }

    pub(super) fn shown(&self, name: &[u8]) -> PathBuf {
        let name = name
            .iter()
            .position(|byte| *byte != b'/')
            .map_or(&b""[..], |start| name.get(start..).unwrap_or_default());
        self.path.join(OsStr::from_bytes(name))
    }

    fn refused(&self, name: &[u8], errno: Errno) -> ErrorBody {
        match errno {
            // What the kernel says when a link leads out of the tree.
            Errno::EXDEV => bad(format!(
                "{} leads out of the tree through a link",
                self.shown(name).display()
            )),
            errno => refused("unpack", &self.shown(name), errno),
        }
    }

    pub(super) fn owner(&self, entry: &Entry) -> (Option<Uid>, Option<Gid>) {
        let id = |number| {
            u32::try_from(number)
                .ok()
                .filter(|id| self.owners && *id != u32::MAX)
        };
        (
            id(entry.uid).map(Uid::from_raw),
            id(entry.gid).map(Gid::from_raw),
        )
    }

    /// Opens a directory of the tree. Links are followed as long as they stay in it.
    fn directory(&self, parts: &[&[u8]]) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let path = parts.join(&b'/');
        let path = if path.is_empty() { b".".to_vec() } else { path };
        // The kernel asks for another try when something was renamed meanwhile.
        for _ in 0..16 {
            match openat2(&self.root, OsStr::from_bytes(&path), how) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
        Err(Errno::EBUSY)
    }

    /// The same, and makes what is missing.
    fn made_directory(&self, parts: &[&[u8]]) -> Result<OwnedFd, Errno> {
        match self.directory(parts) {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        let mut at = self.directory(&[])?;
        for length in 1..=parts.len() {
            let (Some(so_far), Some(name)) =
                (parts.get(..length), parts.get(length.saturating_sub(1)))
            else {
                break;
            };
            let mode = Mode::from_bits_truncate(0o755);
            match mkdirat(&at, OsStr::from_bytes(name), mode) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
            at = self.directory(so_far)?;
        }
        Ok(at)
    }

    /// Where an entry goes; none for the tree itself.
    fn spot(&self, name: &[u8]) -> Result<Option<Spot>, ErrorBody> {
        let parts = parts(name)?;
        let Some((last, parents)) = parts.split_last() else {
            return Ok(None);
        };
        let parent = self
            .made_directory(parents)
            .map_err(|errno| self.refused(name, errno))?;
        Ok(Some(Spot {
            parent,
            name: last.to_vec(),
        }))
    }

    /// Makes what the entry says. Gives the file if content follows.
    pub(super) fn make(&mut self, entry: &Entry) -> Result<Option<File>, ErrorBody> {
        self.leave(&entry.name)?;
        let Some(spot) = self.spot(&entry.name)? else {
            if entry.kind != Kind::Directory {
                return Err(bad("an entry that is no directory has no name"));
            }
            self.directories.push(entry.clone());
            return Ok(None);
        };
        let refused = |errno| self.refused(&entry.name, errno);
        if entry.kind == Kind::Directory {
            self.make_directory(&spot).map_err(refused)?;
            self.directories.push(entry.clone());
            return Ok(None);
        }
        let special = matches!(
            entry.kind,
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo
        );
        if special && !self.special {
            return Err(bad(format!(
                "{} is a device or a pipe; ask for those to have them made",
                self.shown(&entry.name).display()
            )));
        }
        // Found before anything is taken away: a link to itself would lose the file.
        let source = match entry.kind {
            Kind::HardLink => Some(self.link_source(entry)?),
            _ => None,
        };
        match unlinkat(&spot.parent, spot.name(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(refused(errno)),
        }
        match entry.kind {
            Kind::File | Kind::Directory => {
                let flags = OFlag::O_WRONLY
                    | OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC;
                let mode = Mode::from_bits_truncate(0o600);
                let file = openat(&spot.parent, spot.name(), flags, mode).map_err(refused)?;
                return Ok(Some(file.into()));
            }
            Kind::HardLink => {
                if let Some(source) = source {
                    linkat(
                        &source.parent,
                        source.name(),
                        &spot.parent,
                        spot.name(),
                        AtFlags::empty(),
                    )
                    .map_err(refused)?;
                }
                return Ok(None);
            }
            Kind::Symlink => {
                if entry.link.len() > MAX_NAME || entry.link.contains(&0) {
                    return Err(bad("a link is longer than a path or has a zero byte"));
                }
                symlinkat(OsStr::from_bytes(&entry.link), &spot.parent, spot.name())
                    .map_err(refused)?;
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::CharDevice => SFlag::S_IFCHR,
                    Kind::BlockDevice => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                let device = makedev(entry.major, entry.minor);
                let mode = Mode::from_bits_truncate(0o600);
                mknodat(&spot.parent, spot.name(), kind, mode, device).map_err(refused)?;
            }
        }
        self.attributes(&spot, entry).map_err(refused)?;
        Ok(None)
    }

    fn make_directory(&self, spot: &Spot) -> Result<(), Errno> {
        match mkdirat(&spot.parent, spot.name(), Mode::from_bits_truncate(0o755)) {
            Err(Errno::EEXIST) => {
                let flags =
                    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                match openat(&spot.parent, spot.name(), flags, Mode::empty()) {
                    Ok(_) => Ok(()),
                    // Something else has its name: a link, perhaps.
                    Err(_) => {
                        unlinkat(&spot.parent, spot.name(), UnlinkatFlags::NoRemoveDir)?;
                        mkdirat(&spot.parent, spot.name(), Mode::from_bits_truncate(0o755))
                    }
                }
            }
            other => other,
        }
    }

    /// The file that a hard link is another name of; it has to be in the tree.
    fn link_source(&self, entry: &Entry) -> Result<Spot, ErrorBody> {
        let parts = parts(&entry.link)?;
        let Some((last, parents)) = parts.split_last() else {
            return Err(bad("a link points to the tree itself"));
        };
        let parent = self
            .directory(parents)
            .map_err(|errno| self.refused(&entry.link, errno))?;
        if self.parts_equal(&entry.name, &parts) {
            return Err(bad("a link points to itself"));
        }
        Ok(Spot {
            parent,
            name: last.to_vec(),
        })
    }

    fn parts_equal(&self, name: &[u8], other: &[&[u8]]) -> bool {
        parts(name).is_ok_and(|parts| parts == other)
    }

    fn attributes(&self, spot: &Spot, entry: &Entry) -> Result<(), Errno> {
        let (uid, gid) = self.owner(entry);
        fchownat(
            &spot.parent,
            spot.name(),
            uid,
            gid,
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        if entry.kind != Kind::Symlink {
            let mode = Mode::from_bits_truncate(entry.mode);
            fchmodat(
                &spot.parent,
                spot.name(),
                mode,
                FchmodatFlags::FollowSymlink,
            )?;
        }
        let time = time(entry);
        utimensat(
            &spot.parent,
            spot.name(),
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
    }

    /// Finishes the directories that `name` is not in.
    pub(super) fn leave(&mut self, name: &[u8]) -> Result<(), ErrorBody> {
        let inner = if name.is_empty() {
            Vec::new()
        } else {
            parts(name)?
        };
        while let Some(directory) = self.directories.last() {
            let outer = parts(&directory.name)?;
            if !name.is_empty() && inner.starts_with(&outer) && inner != outer {
                return Ok(());
            }
            let refused = |errno| self.refused(&directory.name, errno);
            match outer.split_last() {
                None => {
                    let spot = Spot {
                        parent: self.directory(&[]).map_err(refused)?,
                        name: b".".to_vec(),
                    };
                    self.attributes(&spot, directory).map_err(refused)?;
                }
                Some((last, parents)) => {
                    let spot = Spot {
                        parent: self.directory(parents).map_err(refused)?,
                        name: last.to_vec(),
                    };
                    match self.attributes_of_directory(&spot, directory) {
                        // Somebody has taken it away, or exchanged it.
                        Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                        Err(errno) => return Err(refused(errno)),
                    }
                }
            }
            self.directories.pop();
        }
        Ok(())
    }

    /// Never through a link that has taken the directory's place meanwhile.
    fn attributes_of_directory(&self, spot: &Spot, entry: &Entry) -> Result<(), Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let parent = openat(&spot.parent, spot.name(), flags, Mode::empty())?;
        let itself = Spot {
            parent,
            name: b".".to_vec(),
        };
        self.attributes(&itself, entry)
    }
}
