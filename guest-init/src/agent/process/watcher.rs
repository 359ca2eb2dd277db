//! Threads that wait for news of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Somebody who waits for news of a process on a thread of its own.
pub(crate) struct Watcher {
    event: EventFd,
    armed: AtomicBool,
}

impl Watcher {
    pub(crate) fn new() -> Result<Arc<Self>, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Arc::new(Self {
            event: EventFd::from_flags(flags)?,
            armed: AtomicBool::new(false),
        }))
    }

    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Forgets the news that were told.
    pub(crate) fn rest(&self) {
        // Nothing to read is as good.
        let _ = self.event.read();
    }

    pub(crate) fn arm(&self) {
        self.armed.store(true, Ordering::Release);
    }

    /// Wakes whoever waits; costs nothing when nobody does.
    pub(crate) fn notify(&self) {
        if self.armed.swap(false, Ordering::AcqRel) {
            // The counter cannot overflow: it is read before it is armed again.
            let _ = self.event.write(1);
        }
    }
}
