//! Control groups (version 2): one per command, so that everything a command started can be ended
//! and its running out of memory can be told from a plain SIGKILL. A group is removed when its last
//! process is gone; the kernel says when, nothing here asks again and again.

mod members;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::log;

/// What a group for user processes should be able to limit and count.
const WANTED: [&str; 4] = ["memory", "pids", "cpu", "io"];
/// Groups that a user process made inside its own are removed down to this depth.
const MAX_DEPTH: u32 = 16;

/// Why a control group could not be made or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// The directory is no place for control groups.
    #[error("{path} is not in a cgroup2 file system; mount one there or name another directory")]
    NotCgroup2 {
        /// The directory.
        path: PathBuf,
    },
    /// A file or directory operation failed.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// Watching for the end of groups failed.
    #[error("cannot watch control groups: {0}")]
    Watch(#[from] nix::errno::Errno),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_path_buf();
    move |cause| CgroupError::Io { what, path, cause }
}

/// The group that holds all groups of commands.
pub(crate) struct Cgroups {
    directory: PathBuf,
    keeper: Arc<Keeper>,
    missing: Vec<&'static str>,
    /// How many tasks one command may have.
    most_tasks: Option<u64>,
}

impl Cgroups {
    /// Makes the group at `directory` and enables in it every controller that is there; gives the
    /// names of those that are not.
    pub(crate) fn prepare(directory: &Path) -> Result<(Self, Vec<&'static str>), CgroupError> {
        fs::create_dir_all(directory).map_err(failed("make", directory))?;
        if !directory.join("cgroup.procs").exists() {
            return Err(CgroupError::NotCgroup2 {
                path: directory.to_path_buf(),
            });
        }
        let missing = enable_controllers(directory)?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let keeper = Arc::new(Keeper {
            inotify,
            retired: Mutex::default(),
        });
        let groups = Self {
            directory: directory.to_path_buf(),
            keeper,
            missing: missing.clone(),
            most_tasks: None,
        };
        Ok((groups, missing))
    }

    /// Bounds the tasks of all commands together; one of them may have three quarters of that, so
    /// that a command that forks without end leaves room for the next one.
    pub(crate) fn limit_tasks(&mut self, most: u64) -> Result<(), CgroupError> {
        if !self.has("pids") {
            return Ok(());
        }
        let path = self.directory.join("pids.max");
        fs::write(&path, most.to_string()).map_err(failed("write", &path))?;
        self.most_tasks = Some((most / 4).saturating_mul(3));
        Ok(())
    }

    /// Whether the groups of commands have this controller.
    pub(crate) fn has(&self, controller: &str) -> bool {
        !self.missing.contains(&controller)
    }

    /// Makes the group of one command.
    pub(crate) fn create(&self, name: &str) -> Result<CommandGroup, CgroupError> {
        let path = self.directory.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make", &path)(error));
            }
            _ => {}
        }
        let directory = fs::File::open(&path).map_err(failed("open", &path))?;
        let group = CommandGroup {
            path,
            directory: directory.into(),
            keeper: Arc::clone(&self.keeper),
            expected: AtomicU64::new(0),
        };
        if let Some(most) = self.most_tasks {
            group.limit_tasks(most)?;
        }
        Ok(group)
    }

    /// The group of a command that has ended, while something that it started is left in it.
    pub(crate) fn find(&self, name: &str) -> Option<CommandGroup> {
        let path = self.directory.join(name);
        let directory = fs::File::open(&path).ok()?;
        Some(CommandGroup {
            path,
            directory: directory.into(),
            keeper: Arc::clone(&self.keeper),
            expected: AtomicU64::new(0),
        })
    }

    /// Ends every process of every command.
    pub(crate) fn kill_all(&self) {
        kill(&self.directory);
    }

    /// Becomes readable when a group has become empty; then [`sweep`](Self::sweep) is due.
    pub(crate) fn changes(&self) -> BorrowedFd<'_> {
        self.keeper.inotify.as_fd()
    }

    /// Removes the groups that have become empty since their commands ended.
    pub(crate) fn sweep(&self) {
        self.keeper.sweep();
    }
}

/// Enables every wanted controller that `directory` has for the groups inside it.
pub(crate) fn enable_controllers(directory: &Path) -> Result<Vec<&'static str>, CgroupError> {
    let file = directory.join("cgroup.controllers");
    let here = fs::read_to_string(&file).map_err(failed("read", &file))?;
    let control = directory.join("cgroup.subtree_control");
    let mut missing = Vec::new();
    for name in WANTED {
        let enabled = here.split_ascii_whitespace().any(|one| one == name)
            && fs::write(&control, format!("+{name}")).is_ok();
        if !enabled {
            missing.push(name);
        }
    }
    Ok(missing)
}

/// The group of one command. Dropped when nobody needs it any more; the group itself goes away with
/// its last process.
pub(crate) struct CommandGroup {
    path: PathBuf,
    directory: OwnedFd,
    keeper: Arc<Keeper>,
    /// How many of its processes had been ended for memory when it was last asked to end.
    expected: AtomicU64,
}

impl CommandGroup {
    /// The group's directory, to start a process in.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Ends every process in the group.
    pub(crate) fn kill(&self) {
        kill(&self.path);
    }

    /// Sends signals to every process in the group; gives the numbers of those that got them.
    pub(crate) fn signal(&self, signals: &[i32]) -> HashSet<libc::pid_t> {
        members::signal(&self.path, signals)
    }

    /// Bounds the memory of everything in the group together. When it is used up, all of the group is
    /// ended, so that nothing half-dead is left.
    pub(crate) fn limit_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        self.set("memory.max", &bytes.to_string())?;
        self.set("memory.oom.group", "1")?;
        // A kernel without swap has no such file, and nothing to limit.
        match self.set("memory.swap.max", "0") {
            Err(CgroupError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Bounds how many tasks there may be in the group.
    pub(crate) fn limit_tasks(&self, most: u64) -> Result<(), CgroupError> {
        self.set("pids.max", &most.to_string())
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(failed("write", &path))
    }

    /// A file that `poll` finds interesting (POLLPRI) when the group becomes empty.
    pub(crate) fn events(&self) -> Option<fs::File> {
        fs::File::open(self.path.join("cgroup.events")).ok()
    }

    /// Whether there is a process in the group, by this file of [`events`](Self::events): `poll` finds
    /// it interesting again only when there is something newer.
    pub(crate) fn says_populated(events: &fs::File) -> bool {
        let mut text = [0; 256];
        let count = events.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        counter(&text, "populated") > 0
    }

    /// Whether there is a process in the group.
    pub(crate) fn is_populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .is_ok_and(|events| counter(&events, "populated") > 0)
    }

    /// Somebody is about to end the group: what memory has done to it until now is not why it ends.
    pub(crate) fn expect_end(&self) {
        self.expected.store(self.memory_kills(), Ordering::Release);
    }

    /// Whether the kernel ended a process of this group because memory ran out, after nobody or after
    /// the last one who [wanted its end](Self::expect_end).
    pub(crate) fn out_of_memory(&self) -> bool {
        self.memory_kills() > self.expected.load(Ordering::Acquire)
    }

    fn memory_kills(&self) -> u64 {
        fs::read_to_string(self.path.join("memory.events"))
            .map_or(0, |events| counter(&events, "oom_kill"))
    }
}

impl Drop for CommandGroup {
    fn drop(&mut self) {
        self.keeper.retire(&self.path);
    }
}

fn kill(group: &Path) {
    if let Err(error) = fs::write(group.join("cgroup.kill"), "1")
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn(format_args!(
            "event=cgroup_kill_failed group={} error={error}",
            group.display()
        ));
    }
}

fn counter(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// Removes groups when the kernel says that they are empty.
struct Keeper {
    inotify: Inotify,
    retired: Mutex<HashMap<WatchDescriptor, PathBuf>>,
}

impl Keeper {
    fn retire(&self, group: &Path) {
        if remove(group, 0) {
            return;
        }
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        match self
            .inotify
            .add_watch(&group.join("cgroup.events"), AddWatchFlags::IN_MODIFY)
        {
            Ok(watch) => {
                // It may have become empty before the watch was there.
                if !remove(group, 0) {
                    retired.insert(watch, group.to_path_buf());
                }
            }
            Err(error) => log::warn(format_args!(
                "event=cgroup_left_behind group={} error={error}",
                group.display()
            )),
        }
    }

    fn sweep(&self) {
        // No events and an interrupted read come to the same: nothing to do now.
        let Ok(events) = self.inotify.read_events() else {
            return;
        };
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            if let Some(group) = retired.get(&event.wd)
                && remove(group, 0)
            {
                retired.remove(&event.wd);
            }
        }
    }
}

/// Removes a group and the empty groups inside it. Says whether it is gone.
fn remove(group: &Path, depth: u32) -> bool {
    match fs::remove_dir(group) {
        Ok(()) => return true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
        Err(_) if depth >= MAX_DEPTH => return false,
        Err(_) => {}
    }
    let populated = fs::read_to_string(group.join("cgroup.events"))
        .is_ok_and(|events| counter(&events, "populated") > 0);
    if populated {
        return false;
    }
    let Ok(inner) = fs::read_dir(group) else {
        return false;
    };
    for entry in inner.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path(), depth.saturating_add(1));
        }
    }
    fs::remove_dir(group).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 7\n";
        assert_eq!(counter(events, "oom_kill"), 2);
        assert_eq!(counter(events, "oom_kil"), 0);
    }

    #[test]
    fn memory_that_ran_out_before_somebody_wanted_the_end_is_not_its_reason() {
        let place = tempfile::tempdir().unwrap();
        let group = CommandGroup {
            path: place.path().to_path_buf(),
            directory: fs::File::open(place.path()).unwrap().into(),
            keeper: Arc::new(Keeper {
                inotify: Inotify::init(InitFlags::IN_CLOEXEC).unwrap(),
                retired: Mutex::default(),
            }),
            expected: AtomicU64::new(0),
        };
        let kills = |count: u32| {
            let text = format!("oom {count}\noom_kill {count}\n");
            fs::write(place.path().join("memory.events"), text).unwrap();
        };
        assert!(!group.out_of_memory());
        kills(1);
        assert!(group.out_of_memory());
        group.expect_end();
        assert!(!group.out_of_memory());
        kills(2);
        assert!(group.out_of_memory(), "while it was on its way to its end");
    }

    #[test]
    fn a_plain_directory_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let error = Cgroups::prepare(directory.path()).err().unwrap();
        assert!(matches!(error, CgroupError::NotCgroup2 { .. }), "{error}");
    }
}
