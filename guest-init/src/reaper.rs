//! The one place that waits for children. Every exit status in the agent comes from here, for
//! processes that the agent started as for orphans that it inherited, so no waiter can lose a race
//! against another. Nothing else may call a function of the wait family. Whoever learns first that a
//! child has ended, by its descriptor or by a signal, has the statuses collected here: no hand-over
//! between threads lies between a child's exit and its last frame.

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It returned this.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl Status {
    fn from_wait(raw: libc::c_int) -> Option<Self> {
        if libc::WIFEXITED(raw) {
            u8::try_from(libc::WEXITSTATUS(raw)).ok().map(Self::Code)
        } else if libc::WIFSIGNALED(raw) {
            u8::try_from(libc::WTERMSIG(raw)).ok().map(Self::Signal)
        } else {
            None
        }
    }
}

/// A process that the agent started.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its identifier; may name another process once [`status`](Self::status) is known.
    pub(crate) pid: libc::pid_t,
    status: OnceLock<Status>,
    exited: OwnedFd,
    collected: EventFd,
}

impl Child {
    /// How it ended, once it has.
    pub(crate) fn status(&self) -> Option<Status> {
        self.status.get().copied()
    }

    /// Becomes readable when it has ended, and stays so. Its status may not be there for the taking
    /// yet: somebody who traces it is served first.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        self.exited.as_fd()
    }

    /// Becomes readable when the status is known, and stays so.
    pub(crate) fn collected(&self) -> BorrowedFd<'_> {
        self.collected.as_fd()
    }
}

struct Entry {
    child: Arc<Child>,
    /// What must live as long as the process.
    _keep: Box<dyn Any + Send>,
}

/// All children of this process.
#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
    reaped: Condvar,
}

#[derive(Default)]
struct State {
    entries: HashMap<libc::pid_t, Entry>,
    /// Counts the statuses collected, so that a waiter can tell that one came in between.
    collected: u64,
}

impl Reaper {
    /// Starts a process by calling `spawn`, which gives its identifier and a descriptor of it. It is
    /// known here before its status can be collected, however fast it ends. `keep` is dropped after
    /// it has ended.
    pub(crate) fn start<E: From<Errno>>(
        &self,
        keep: Box<dyn Any + Send>,
        spawn: impl FnOnce() -> Result<(libc::pid_t, OwnedFd), E>,
    ) -> Result<Arc<Child>, E> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let collected = EventFd::from_flags(flags)?;
        // Held across the start: `collect` cannot see the process before its entry is there.
        let mut state = lock(&self.state);
        let (pid, exited) = spawn()?;
        let child = Arc::new(Child {
            pid,
            status: OnceLock::new(),
            exited,
            collected,
        });
        let entry = Entry {
            child: Arc::clone(&child),
            _keep: keep,
        };
        state.entries.insert(pid, entry);
        Ok(child)
    }

    /// Collects the status of every child that has ended. Says whether children are left.
    pub(crate) fn collect(&self) -> bool {
        loop {
            let mut state = lock(&self.state);
            let mut raw = 0;
            // SAFETY: `raw` is a valid place for the status for the time of the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG) };
            match pid {
                0 => return true,
                -1 if Errno::last() == Errno::EINTR => continue,
                -1 => return false,
                _ => {}
            }
            let Some(status) = Status::from_wait(raw) else {
                continue;
            };
            let entry = state.entries.remove(&pid);
            state.collected = state.collected.wrapping_add(1);
            if let Some(Entry { child, .. }) = &entry {
                // The entry was removed above, so this is the only status it ever gets. Under the
                // lock: who finds nothing left to collect finds every status set.
                let _ = child.status.set(status);
                // The counter holds at most one; it cannot overflow.
                let _ = child.collected.write(1);
            }
            drop(state);
            drop(entry);
            self.reaped.notify_all();
        }
    }

    /// Sends a signal to the process group that `child` leads, or to `child` alone while it has not
    /// come to make one, unless the child has been collected: then its number may belong to somebody
    /// else. Says whether it was sent.
    pub(crate) fn signal_group(&self, child: &Child, signal: u8) -> bool {
        let state = lock(&self.state);
        let alive = state
            .entries
            .get(&child.pid)
            .is_some_and(|entry| std::ptr::eq(&*entry.child, child));
        // SAFETY: kill takes plain numbers; the lock keeps this one from being reused.
        let send = |to| unsafe { libc::kill(to, i32::from(signal)) } == 0;
        alive && (send(child.pid.saturating_neg()) || send(child.pid))
    }

    /// Sends a signal to the groups of all processes that the agent started.
    pub(crate) fn signal_all(&self, signal: i32) {
        for pid in lock(&self.state).entries.keys() {
            // SAFETY: kill takes plain numbers; the lock keeps the group's number from being reused.
            unsafe { libc::kill(pid.saturating_neg(), signal) };
        }
    }

    /// Waits until no child is left, or until the deadline. Says whether none is left.
    pub(crate) fn wait_for_none(&self, deadline: Instant) -> bool {
        loop {
            let before = lock(&self.state).collected;
            if !self.collect() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let state = lock(&self.state);
            let waited = self
                .reaped
                .wait_timeout_while(state, left, |state| state.collected == before);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_status_is_read_as_code_or_signal() {
        assert_eq!(Status::from_wait(3 << 8), Some(Status::Code(3)));
        assert_eq!(Status::from_wait(11), Some(Status::Signal(11)));
        assert_eq!(Status::from_wait(0x80 | 6), Some(Status::Signal(6)));
        // Stopped, not ended.
        assert_eq!(Status::from_wait(0x7f | (19 << 8)), None);
    }
}
