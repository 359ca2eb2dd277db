//! A file on its way here: it waits under a hidden name beside its place, which a later copy of the
//! same file finds, and gets its own name when it is whole. Nothing but a file of our own is gone on
//! with, and nobody else's is ever written to.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use client::protocol::file::FileInfo;
use data_encoding::HEXLOWER;
use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::complaint::Complaint;

/// Why what arrives cannot be put anywhere.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error("cannot write {}: {cause}", path.display())]
    Open { path: PathBuf, cause: io::Error },
    #[error("{} is in the way, and somebody else's; remove it", path.display())]
    Foreign { path: PathBuf },
    #[error("another sup is copying it to {}", path.display())]
    Busy { path: PathBuf },
}

impl PlaceError {
    pub(super) fn complain(&self, what: &str) -> Complaint {
        Complaint::new(what, self.to_string())
    }
}

/// A file that is not whole yet, locked against others who copy the same.
pub(super) struct Waiting {
    path: PathBuf,
    to: PathBuf,
    _lock: Flock<File>,
}

impl Waiting {
    /// Where to write, and the name that is waited under; no such name for devices and pipes, which
    /// are written to as they are.
    pub(super) fn open(
        vm: &str,
        from: &[u8],
        to: &Path,
        info: &FileInfo,
    ) -> Result<(Option<Self>, File), PlaceError> {
        let wrong = |path: &Path, cause| PlaceError::Open {
            path: path.to_owned(),
            cause,
        };
        // A link of the user's own is followed.
        let to = std::fs::canonicalize(to).unwrap_or_else(|_| to.to_owned());
        if let Ok(about) = std::fs::metadata(&to) {
            let kind = about.file_type();
            if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() {
                let file = OpenOptions::new().write(true).open(&to);
                return Ok((None, file.map_err(|cause| wrong(&to, cause))?));
            }
        }
        let (ours, others) = names(vm, from, &to, info);
        let directory = match to.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
            _ => PathBuf::from("."),
        };
        let path = directory.join(&ours);
        let (file, lock) = loop {
            let file = create(&path).map_err(|cause| wrong(&to, cause))?;
            let about = file.metadata().map_err(|cause| wrong(&to, cause))?;
            // In a directory of everybody's somebody else may have guessed the name.
            let ours = about.uid() == nix::unistd::geteuid().as_raw();
            if !ours || !about.is_file() || about.nlink() > 1 {
                return Err(PlaceError::Foreign { path });
            }
            let lock = file.try_clone().map_err(|cause| wrong(&to, cause))?;
            let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
                return Err(PlaceError::Busy { path: to });
            };
            // Before it was locked, another copy may have given it its name, or taken it for stale.
            if is_at(&path, &file) {
                break (file, lock);
            }
        };
        remove_stale(&directory, &ours, &others);
        let waiting = Self {
            path,
            to,
            _lock: lock,
        };
        Ok((Some(waiting), file))
    }

    /// Gives it its name. A file that had it keeps its rights: who may read it is not for a VM to say. What it could do
    /// by setuid or setgid was meant for its old content.
    pub(super) fn finish(self, file: &File, mode: u32) -> io::Result<()> {
        let old = std::fs::metadata(&self.to).ok();
        let mode = old.map_or(mode, |old| old.mode() & 0o777);
        file.set_permissions(Permissions::from_mode(mode))?;
        // Or a power cut could leave the name with nothing behind it.
        file.sync_all()?;
        std::fs::rename(&self.path, &self.to)
    }

    pub(super) fn forget(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)
}

/// Whether this file has this name.
fn is_at(path: &Path, file: &File) -> bool {
    let there = std::fs::symlink_metadata(path);
    let Ok((there, about)) = there.and_then(|there| Ok((there, file.metadata()?))) else {
        return false;
    };
    (there.dev(), there.ino()) == (about.dev(), about.ino())
}

/// The hidden name of what is to be at `to` and is this very file of the VM, and the beginning of
/// the names of other ones. After this machine was restarted there is another name: what had been
/// written may not be there any more, whatever its length says.
fn names(vm: &str, from: &[u8], to: &Path, info: &FileInfo) -> (OsString, OsString) {
    let hash = |parts: &[&[u8]], length: usize| {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&u64::try_from(part.len()).unwrap_or(0).to_le_bytes());
            hasher.update(part);
        }
        let bytes = *hasher.finalize().as_bytes();
        HEXLOWER.encode(bytes.get(..length).unwrap_or_default())
    };
    let name = to.file_name().unwrap_or_default();
    let others = format!(".sup-{}-", hash(&[name.as_bytes()], 4));
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let source = hash(
        &[
            vm.as_bytes(),
            from,
            &info.inode.to_le_bytes(),
            &info.size.to_le_bytes(),
            &info.mtime_s.to_le_bytes(),
            &info.mtime_ns.to_le_bytes(),
            &boot,
        ],
        8,
    );
    (format!("{others}{source}").into(), others.into())
}

/// What was to have the same name and never will: of a file that has changed since.
fn remove_stale(directory: &Path, ours: &OsString, others: &OsString) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == *ours || !name.as_bytes().starts_with(others.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(flags.bits())
            .open(&path);
        // One that is locked is being written. Who holds the lock of one that is there is the only one
        // to take its name from it.
        if let Ok(file) = file
            && let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && is_at(&path, &lock)
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use client::protocol::file::FileType;

    use super::*;

    fn info(inode: u64) -> FileInfo {
        FileInfo {
            file_type: FileType::Regular,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 5,
            allocated: 4096,
            mtime_s: 1,
            mtime_ns: 0,
            links: 1,
            inode,
            target: None,
        }
    }

    #[test]
    fn copies_to_one_name_at_a_time_lose_nothing_of_each_other() {
        let home = tempfile::tempdir().unwrap();
        let to = home.path().join("here");
        // The first two are the same file of the VM, the third another one.
        std::thread::scope(|copies| {
            for inode in [1, 1, 2] {
                let to = &to;
                copies.spawn(move || {
                    let content = inode.to_string().repeat(5);
                    for _ in 0..2000 {
                        let (waiting, mut file) = match Waiting::open("vm", b"f", to, &info(inode))
                        {
                            Ok((waiting, file)) => (waiting.unwrap(), file),
                            Err(PlaceError::Busy { .. }) => continue,
                            Err(error) => panic!("{error}"),
                        };
                        file.set_len(0).unwrap();
                        file.write_all(content.as_bytes()).unwrap();
                        waiting.finish(&file, 0o644).unwrap();
                        let found = std::fs::read_to_string(to).unwrap();
                        assert!(["11111", "22222"].contains(&found.as_str()), "{found}");
                    }
                });
            }
        });
        // Nothing waits any more.
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }
}
