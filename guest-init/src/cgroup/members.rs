//! The processes of a group, for signals that have no file of their own in the kernel's interface.
//! Never signals a number that has come to name a process of somebody else.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;

use super::MAX_DEPTH;

/// Processes that are held at once.
const HELD: usize = 256;

/// Sends the signals, in this order, to every process of the group and of the groups inside it; gives
/// the numbers of those that got them.
pub(super) fn signal(group: &Path, signals: &[i32]) -> HashSet<libc::pid_t> {
    let mut all = HashSet::new();
    collect(group, 0, &mut all);
    let mut reached = HashSet::new();
    let all: Vec<_> = all.into_iter().collect();
    for some in all.chunks(HELD) {
        let held: Vec<_> = some
            .iter()
            .filter_map(|pid| Some((*pid, hold(*pid).ok()?)))
            .collect();
        // What is held keeps its meaning; what is still in the group by its number was so before.
        let mut still = HashSet::new();
        collect(group, 0, &mut still);
        for (pid, process) in held {
            if still.contains(&pid) {
                for signal in signals {
                    send(&process, *signal);
                }
                reached.insert(pid);
            }
        }
    }
    reached
}

fn collect(group: &Path, depth: u32, into: &mut HashSet<libc::pid_t>) {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    // What lives in another PID namespace than ours has the number 0 here.
    let numbers = text
        .lines()
        .filter_map(|line| line.parse::<libc::pid_t>().ok());
    into.extend(numbers.filter(|pid| *pid > 0));
    if depth >= MAX_DEPTH {
        return;
    }
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth.saturating_add(1), into);
        }
    }
}

fn hold(pid: libc::pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: plain numbers.
    let made = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let number = RawFd::try_from(made).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn send(process: &OwnedFd, signal: i32) {
    // SAFETY: plain numbers, and no details of the signal. One that has ended needs none any more.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}
