//! Removing files and whole trees. Works on open directories only, so that a tree which is changed
//! meanwhile can neither lead it out through a link nor make it run in circles. Descriptors and
//! memory are bounded whatever the tree's size and depth.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use protocol::ErrorBody;

use super::entries::{Entries, look};
use super::error::refused;
use super::manage::rename_in;
use super::path::Place;

/// Levels whose directories stay open, the innermost ones.
const OPEN: usize = 32;
/// Levels that are remembered. A deeper directory is moved up first.
const MAX_DEPTH: usize = 4096;
/// How often a directory that fills again while it is emptied is emptied anew.
const PATIENCE: u32 = 64;

/// Removes what has this name; with `recursive` also what is in it. Gives the number of names.
pub(crate) fn remove(path: &Path, recursive: bool) -> Result<u64, ErrorBody> {
    let failed = |errno| refused("remove", path, errno);
    let place = Place::open(path)?;
    let about = look(place.parent.as_fd(), &place.name).map_err(failed)?;
    let is_directory = about.st_mode & libc::S_IFMT == libc::S_IFDIR;
    let only_directories = super::path::names_directory(path);
    if !is_directory {
        if only_directories {
            return Err(failed(Errno::ENOTDIR));
        }
        unlinkat(
            &place.parent,
            place.name.as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        )
        .map_err(failed)?;
        return Ok(1);
    }
    match unlinkat(
        &place.parent,
        place.name.as_os_str(),
        UnlinkatFlags::RemoveDir,
    ) {
        Ok(()) => return Ok(1),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) if recursive => {}
        Err(errno) => return Err(failed(errno)),
    }
    let top = Entries::open_in(place.parent.as_fd(), &place.name).map_err(failed)?;
    let mut walk = Walk::new(top).map_err(failed)?;
    walk.empty().map_err(|errno| {
        let mut inner = path.to_path_buf();
        // For a message; what lies beyond the first levels does not make it clearer.
        inner.extend(walk.levels.iter().skip(1).take(64).map(|level| &level.name));
        inner.extend(walk.stuck.iter());
        refused("remove", &inner, errno)
    })?;
    match unlinkat(
        &place.parent,
        place.name.as_os_str(),
        UnlinkatFlags::RemoveDir,
    ) {
        Ok(()) | Err(Errno::ENOENT) => Ok(walk.count.saturating_add(1)),
        Err(errno) => Err(failed(errno)),
    }
}

/// A directory that is being emptied.
struct Level {
    /// Its name in the one above.
    name: OsString,
    /// Device and inode, to know it again.
    id: (u64, u64),
    /// Closed while the walk is far below.
    entries: Option<Entries>,
    /// How often it was found to have filled again.
    again: u32,
}

struct Walk {
    /// From the top downwards. The last one is always open.
    levels: Vec<Level>,
    count: u64,
    /// Numbers for the names of directories that were moved up.
    moved: u64,
    /// The name at which it went wrong.
    stuck: Option<OsString>,
}

fn id(directory: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    let about = fstat(directory)?;
    Ok((about.st_dev, about.st_ino))
}

impl Walk {
    fn new(top: Entries) -> Result<Self, Errno> {
        let id = id(top.as_fd())?;
        Ok(Self {
            levels: vec![Level {
                name: OsString::new(),
                id,
                entries: Some(top),
                again: 0,
            }],
            count: 0,
            moved: 0,
            stuck: None,
        })
    }

    /// Empties the top directory.
    fn empty(&mut self) -> Result<(), Errno> {
        while let Some(level) = self.levels.last_mut() {
            let Some(entries) = &mut level.entries else {
                // A level is only ever reached through its child, which opens it again.
                return Err(Errno::EBADF);
            };
            match entries.next_owned()? {
                Some((name, kind)) => self.take(name, kind)?,
                None => self.leave()?,
            }
        }
        Ok(())
    }

    /// Removes one entry of the innermost directory, or goes into it.
    fn take(&mut self, name: OsString, kind: u8) -> Result<(), Errno> {
        let Some(directory) = self.last() else {
            return Err(Errno::EBADF);
        };
        let removed = match kind {
            libc::DT_DIR => unlinkat(directory, name.as_os_str(), UnlinkatFlags::RemoveDir),
            _ => match unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
                // A directory; POSIX says EPERM, Linux EISDIR.
                Err(Errno::EISDIR) => {
                    unlinkat(directory, name.as_os_str(), UnlinkatFlags::RemoveDir)
                }
                other => other,
            },
        };
        match removed {
            Ok(()) => self.count = self.count.saturating_add(1),
            // Somebody else removed it, or exchanged it: the next round will see.
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                if let Err(errno) = self.enter(&name) {
                    self.stuck = Some(name);
                    return Err(errno);
                }
            }
            Err(errno) => {
                self.stuck = Some(name);
                return Err(errno);
            }
        }
        Ok(())
    }

    fn enter(&mut self, name: &OsStr) -> Result<(), Errno> {
        let Some(directory) = self.last() else {
            return Err(Errno::EBADF);
        };
        if self.levels.len() >= MAX_DEPTH {
            return self.move_up(name);
        }
        let entries = match Entries::open_in(directory, name) {
            // It has gone or is no directory any more.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            other => other?,
        };
        let id = id(entries.as_fd())?;
        self.levels.push(Level {
            name: name.to_owned(),
            id,
            entries: Some(entries),
            again: 0,
        });
        let far = self.levels.len().checked_sub(OPEN.saturating_add(1));
        // The top one stays open: it is where directories are moved up to.
        if let Some(level) = far
            .filter(|index| *index > 0)
            .and_then(|index| self.levels.get_mut(index))
        {
            level.entries = None;
        }
        Ok(())
    }

    /// Moves a directory that is too deep to the top, where it is found later.
    fn move_up(&mut self, name: &OsStr) -> Result<(), Errno> {
        loop {
            let (Some(from), Some(top)) = (self.last(), self.top()) else {
                return Err(Errno::EBADF);
            };
            let new = OsString::from(format!(".supvm-removed-{}", self.moved));
            let done = rename_in(from, name, top, &new, libc::RENAME_NOREPLACE);
            self.moved = self.moved.saturating_add(1);
            match done {
                Err(Errno::EEXIST) => {}
                Err(Errno::ENOENT) => return Ok(()),
                other => return other,
            }
        }
    }

    /// The innermost directory has no more entries: remove it and go on in the one above.
    fn leave(&mut self) -> Result<(), Errno> {
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let Some(directory) = &level.entries else {
            return Ok(());
        };
        if self.levels.is_empty() {
            return self.leave_top(level);
        }
        if self.last().is_none() {
            self.reopen(directory.as_fd())?;
        }
        let Some(parent) = self.last() else {
            return Err(Errno::EBADF);
        };
        match unlinkat(parent, level.name.as_os_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) => self.count = self.count.saturating_add(1),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            // Entries were added, or missed because others were removed while they were read.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => return self.once_more(level),
            Err(errno) => {
                self.levels.push(level);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// The top directory itself is removed by the caller, but has to be empty.
    fn leave_top(&mut self, mut level: Level) -> Result<(), Errno> {
        let Some(entries) = &mut level.entries else {
            return Err(Errno::EBADF);
        };
        entries.rewind()?;
        if entries.next()?.is_none() {
            return Ok(());
        }
        self.once_more(level)
    }

    fn once_more(&mut self, mut level: Level) -> Result<(), Errno> {
        level.again = level.again.saturating_add(1);
        let patient = level.again < PATIENCE;
        if let Some(entries) = &mut level.entries {
            entries.rewind()?;
        }
        self.levels.push(level);
        if patient {
            Ok(())
        } else {
            Err(Errno::ENOTEMPTY)
        }
    }

    fn last(&self) -> Option<BorrowedFd<'_>> {
        self.levels.last()?.entries.as_ref().map(AsFd::as_fd)
    }

    fn top(&self) -> Option<BorrowedFd<'_>> {
        self.levels.first()?.entries.as_ref().map(AsFd::as_fd)
    }

    /// Opens the innermost remembered directory again, as the parent of an open one in it.
    fn reopen(&mut self, child: BorrowedFd<'_>) -> Result<(), Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let parent = openat(child, "..", flags, Mode::empty())?;
        let Some(level) = self.levels.last_mut() else {
            return Err(Errno::EBADF);
        };
        // Somebody moved the child: nothing of what is above it now is ours to remove.
        if id(parent.as_fd())? != level.id {
            return Err(Errno::EBUSY);
        }
        level.entries = Some(Entries::new(parent));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_in_the_tree_is_removed_and_its_target_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), b"1").unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        symlink(&outside, tree.join("a/b/link")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        assert_eq!(remove(&tree, true).unwrap(), 5);
        assert!(!tree.exists());
        assert!(outside.join("precious").exists());
        let link = directory.path().join("link");
        symlink(&outside, &link).unwrap();
        assert_eq!(remove(&link, true).unwrap(), 1);
        assert!(outside.join("precious").exists());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        fs::create_dir(&top).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut at = nix::fcntl::open(&top, flags, Mode::empty()).unwrap();
        for _ in 0..MAX_DEPTH + 500 {
            for name in ["d", "empty"] {
                nix::sys::stat::mkdirat(&at, name, Mode::from_bits_truncate(0o755)).unwrap();
            }
            at = openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        let count = remove(&top, true).unwrap();
        assert_eq!(count, 2 * (MAX_DEPTH as u64 + 500) + 1);
        assert!(!top.exists());
    }

    #[test]
    fn a_full_directory_is_refused_unless_asked_for_all_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        fs::create_dir_all(top.join("x")).unwrap();
        let error = remove(&top, false).unwrap_err();
        assert_eq!(error.code, protocol::ErrorCode::DirectoryNotEmpty);
        assert!(error.detail.starts_with("ENOTEMPTY\n"), "{}", error.detail);
        assert_eq!(remove(&top, true).unwrap(), 2);
    }
}
