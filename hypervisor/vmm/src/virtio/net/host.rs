//! The host's end of the network: where the control thread leaves a new frame channel for the
//! device's worker. It never waits; a channel that the worker did not take yet gives way to the next.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The channel that the worker is to use next.
#[derive(Debug)]
pub(super) struct Inbox {
    next: Mutex<Option<UnixStream>>,
    pub(super) event: EventFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            next: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub(super) fn take(&self) -> Option<UnixStream> {
        // Non-blocking: an error means that nothing was written since.
        let _ = self.event.read();
        self.next
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// The host's end of the network.
#[derive(Clone, Debug)]
pub struct NetHost(pub(super) Arc<Inbox>);

impl NetHost {
    /// Connects the interface to `channel`, a stream socket, in place of the one before. What was
    /// under way on that one is lost.
    pub fn attach(&self, channel: UnixStream) {
        *self.0.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
        // A full counter means that a wake-up is already waiting.
        let _ = self.0.event.write(1);
    }
}
