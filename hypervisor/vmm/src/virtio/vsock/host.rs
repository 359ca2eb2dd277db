//! The host's end of vsock: how the control thread asks the device's worker for a stream. It never
//! waits for the guest; the outcome comes as an event.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::MOST_CONNECTIONS;
use super::events::{VsockEvent, VsockEvents};

/// A stream that is wanted.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) ticket: u64,
    pub(super) port: u32,
    pub(super) wait_for_agent: bool,
    pub(super) stream: UnixStream,
}

/// What the worker has not taken yet; None once it takes nothing any more.
#[derive(Debug)]
pub(super) struct Inbox {
    wanted: Mutex<Option<Vec<Wanted>>>,
    pub(super) event: EventFd,
    pub(super) events: VsockEvents,
}

impl Inbox {
    pub(super) fn new(events: VsockEvents) -> io::Result<Self> {
        Ok(Self {
            wanted: Mutex::new(Some(Vec::new())),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            events,
        })
    }

    pub(super) fn take(&self) -> Vec<Wanted> {
        // Non-blocking: an error means that nothing was written since.
        let _ = self.event.read();
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn close(&self) -> Vec<Wanted> {
        self.wanted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .unwrap_or_default()
    }

    pub(super) fn refuse(&self, ticket: u64, message: &str) {
        self.events.send(VsockEvent::NotConnected {
            ticket,
            message: message.to_owned(),
        });
    }
}

/// The host's end of vsock: opens streams into the guest.
#[derive(Debug)]
pub struct VsockHost(pub(super) Arc<Inbox>);

impl VsockHost {
    /// Opens a stream to the guest's `port` and joins it to `stream`. It stays pending until the
    /// guest answers or the other end of `stream` is closed; with `wait_for_agent`, it is not even
    /// asked for before the agent rang. What became of it comes as an event with the same `ticket`.
    pub fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream) {
        let refusal = {
            let mut wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            match wanted.as_mut() {
                None => Some("the machine's vsock device has ended"),
                Some(wanted) if wanted.len() >= MOST_CONNECTIONS => {
                    Some("too many streams are being opened at once; try again")
                }
                Some(wanted) => {
                    wanted.push(Wanted {
                        ticket,
                        port,
                        wait_for_agent,
                        stream,
                    });
                    None
                }
            }
        };
        match refusal {
            Some(refusal) => self.0.refuse(ticket, refusal),
            // A full counter means that a wake-up is already waiting.
            None => drop(self.0.event.write(1)),
        }
    }
}
