//! From an archive that a VM made to a tree here. The archive is an attacker's: nothing outside the
//! tree is written, linked to or changed, no device is made, no file gets a user's or group's
//! rights, and what exists is replaced and never written through.

use std::fs::{FileTimes, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::archive::{Archive, ArchiveError, Entry, Kind};
use super::beneath::{Inside, NameError, Pending, Root, local_mode, make_directory, stays_inside};
use super::notes::Notes;
use crate::complaint::harmless;

/// Permissions that are given last, because they keep us out; a few in any honest tree.
const MOST_DEFERRED: usize = 65_536;

/// Why a tree is not whole.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnpackError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("the VM's archive names `{name}`, which is refused: {cause}")]
    Name { name: String, cause: NameError },
    #[error("cannot make {name}: {cause}")]
    Make { name: String, cause: io::Error },
    #[error("the VM's archive has holes, which were not asked for")]
    Sparse,
    #[error(
        "the VM's archive has more than {MOST_DEFERRED} directories that may not be written to"
    )]
    Closed,
}

/// What to take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) sparse: bool,
    pub(super) all_links: bool,
    /// Nothing of the tree was here before the copy, whatever earlier attempts have left.
    pub(super) is_new: bool,
}

/// Unpacks all of it into the directory, which is made when missing, and onto its disk.
pub(super) fn unpack(
    from: impl Read,
    into: &Path,
    options: Options,
    notes: &Notes,
) -> Result<(), UnpackError> {
    let wrong = |cause| UnpackError::Make {
        name: into.display().to_string(),
        cause,
    };
    let is_new = match std::fs::create_dir(into) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => options.is_new,
        Err(error) => return Err(wrong(error)),
    };
    let mut unpack = Unpack {
        root: Root::open(into).map_err(wrong)?,
        is_new,
        options,
        notes,
        deferred: Vec::new(),
        buffer: vec![0; 256 << 10],
    };
    let mut archive = Archive::new(from);
    while let Some(entry) = archive.next()? {
        unpack.entry(&mut archive, &entry)?;
    }
    unpack.close()?.sync().map_err(wrong)
}

struct Unpack<'n> {
    root: Root,
    /// The directory was not here before.
    is_new: bool,
    options: Options,
    notes: &'n Notes,
    deferred: Vec<(Inside, u32)>,
    buffer: Vec<u8>,
}

impl Unpack<'_> {
    fn entry(
        &mut self,
        archive: &mut Archive<impl Read>,
        entry: &Entry,
    ) -> Result<(), UnpackError> {
        let name = parse(&entry.name)?;
        match &entry.kind {
            Kind::Directory => self.directory(name, entry),
            Kind::File => self.file(archive, &name, entry, None),
            Kind::Sparse(_) if !self.options.sparse => Err(UnpackError::Sparse),
            Kind::Sparse(map) => self.file(archive, &name, entry, Some(map)),
            Kind::Symlink => self.symlink(&name, entry),
            Kind::HardLink => self.link(&name, entry),
            Kind::Special => {
                let name = String::from_utf8_lossy(&entry.name);
                self.notes.leave_out(&format!("{name}, a device or a pipe"));
                Ok(())
            }
        }
    }

    fn directory(&mut self, inside: Inside, entry: &Entry) -> Result<(), UnpackError> {
        // What else the bits mean, an attacker shall not decide.
        let mode = local_mode(entry.mode);
        let mut make = || -> io::Result<bool> {
            let (directory, is_new) = match inside.split() {
                Some((parents, name)) => {
                    let made = make_directory(self.root.directory(parents)?, name)?;
                    (made.0, made.1 || self.options.is_new)
                }
                None => (self.root.directory(&[])?.try_clone_to_owned()?, self.is_new),
            };
            // Who may enter one that was here before is not for the VM to say.
            if is_new {
                // While it is filled it must let us in.
                let permissions = Permissions::from_mode(mode | 0o700);
                std::fs::File::from(directory).set_permissions(permissions)?;
            }
            Ok(is_new)
        };
        let is_new = make().map_err(|cause| wrong(entry, cause))?;
        if is_new && mode & 0o700 != 0o700 {
            if self.deferred.len() >= MOST_DEFERRED {
                return Err(UnpackError::Closed);
            }
            self.deferred.push((inside, mode));
        }
        Ok(())
    }

    fn file(
        &mut self,
        archive: &mut Archive<impl Read>,
        inside: &Inside,
        entry: &Entry,
        map: Option<&[(u64, u64)]>,
    ) -> Result<(), UnpackError> {
        let wrong = |cause| wrong(entry, cause);
        let (parents, name) = inside.split().ok_or_else(|| wrong(is_top()))?;
        let directory = self.root.directory(parents).map_err(wrong)?;
        let (pending, mut file) = Pending::file(directory).map_err(wrong)?;
        let all = [(0, entry.size)];
        for (offset, length) in map.unwrap_or(&all) {
            file.seek(SeekFrom::Start(*offset)).map_err(wrong)?;
            let mut left = *length;
            while left > 0 {
                let turn = usize::try_from(left).unwrap_or(usize::MAX);
                let turn = turn.min(self.buffer.len());
                let room = self.buffer.get_mut(..turn).unwrap_or_default();
                let count = archive.read(room)?;
                let bytes = room.get(..count).unwrap_or_default();
                file.write_all(bytes).map_err(wrong)?;
                left = left.saturating_sub(u64::try_from(count).unwrap_or(left));
            }
        }
        if map.is_some() {
            file.set_len(entry.size).map_err(wrong)?;
        }
        let finish = || -> io::Result<()> {
            file.set_permissions(Permissions::from_mode(local_mode(entry.mode)))?;
            if let Some(time) = time(entry) {
                file.set_times(FileTimes::new().set_modified(time))?;
            }
            pending.commit(name)
        };
        finish().map_err(wrong)
    }

    fn symlink(&mut self, inside: &Inside, entry: &Entry) -> Result<(), UnpackError> {
        let wrong = |cause| wrong(entry, cause);
        let (parents, name) = inside.split().ok_or_else(|| wrong(is_top()))?;
        if !self.options.all_links && !stays_inside(&entry.link, parents.len()) {
            let link = String::from_utf8_lossy(&entry.name);
            let target = String::from_utf8_lossy(&entry.link);
            self.notes
                .leave_out(&format!("{link}, a link that leads out to {target}"));
            return Ok(());
        }
        let directory = self.root.directory(parents).map_err(wrong)?;
        let pending = Pending::symlink(directory, &entry.link).map_err(wrong)?;
        pending.commit(name).map_err(wrong)
    }

    fn link(&mut self, inside: &Inside, entry: &Entry) -> Result<(), UnpackError> {
        let wrong = |cause| wrong(entry, cause);
        let target = parse(&entry.link)?;
        let (from, old) = target.split().ok_or_else(|| wrong(is_top()))?;
        let (parents, name) = inside.split().ok_or_else(|| wrong(is_top()))?;
        let mut linked = || -> io::Result<()> {
            let from = self.root.directory(from)?.try_clone_to_owned()?;
            let directory = self.root.directory(parents)?;
            let from = std::os::fd::AsFd::as_fd(&from);
            Pending::link(directory, from, old)?.commit(name)
        };
        linked().map_err(wrong)
    }

    /// The innermost first: an outer one may keep us out.
    fn close(mut self) -> Result<Root, UnpackError> {
        while let Some((inside, mode)) = self.deferred.pop() {
            let mut close = || -> io::Result<()> {
                let directory = self.root.directory(inside.parts())?.try_clone_to_owned()?;
                std::fs::File::from(directory).set_permissions(Permissions::from_mode(mode))
            };
            close().map_err(|cause| UnpackError::Make {
                name: harmless(&format!("{:?}", inside.parts())),
                cause,
            })?;
        }
        Ok(self.root)
    }
}

fn parse(bytes: &[u8]) -> Result<Inside, UnpackError> {
    Inside::parse(bytes).map_err(|cause| UnpackError::Name {
        name: harmless(&String::from_utf8_lossy(bytes)),
        cause,
    })
}

fn wrong(entry: &Entry, cause: io::Error) -> UnpackError {
    UnpackError::Make {
        name: harmless(&String::from_utf8_lossy(&entry.name)),
        cause,
    }
}

fn is_top() -> io::Error {
    io::Error::other("it is the tree itself")
}

fn time(entry: &Entry) -> Option<SystemTime> {
    let since = Duration::new(u64::try_from(entry.mtime_s).ok()?, entry.mtime_ns);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests;
