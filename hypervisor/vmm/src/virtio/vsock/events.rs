//! What the vsock device tells the machine's control thread. A bounded queue: there is at most one
//! outcome per `connect`, and the doorbell is one flag however often the guest rings.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Something the control thread wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VsockEvent {
    /// The guest accepted; bytes flow.
    Connected {
        /// The one of `connect`.
        ticket: u64,
    },
    /// There is no stream; the socket is closed.
    NotConnected {
        /// The one of `connect`.
        ticket: u64,
        /// Why, for the caller to read.
        message: String,
    },
    /// The guest's agent listens.
    AgentRang,
}

#[derive(Debug, Default)]
struct Queue {
    agent_rang: bool,
    outcomes: VecDeque<VsockEvent>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    event: EventFd,
}

/// The device's end.
#[derive(Debug)]
pub struct VsockEvents(Arc<Shared>);

/// The control thread's end.
#[derive(Debug)]
pub struct VsockEventReceiver(Arc<Shared>);

impl VsockEvents {
    /// A new pair.
    pub fn channel() -> io::Result<(Self, VsockEventReceiver)> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        Ok((Self(Arc::clone(&shared)), VsockEventReceiver(shared)))
    }

    pub(super) fn send(&self, event: VsockEvent) {
        {
            let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                VsockEvent::AgentRang => queue.agent_rang = true,
                outcome => queue.outcomes.push_back(outcome),
            }
        }
        // A full counter means that a wake-up is already waiting.
        let _ = self.0.event.write(1);
    }
}

impl VsockEventReceiver {
    /// Readable while something waits.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// Takes everything that waits; never blocks. The doorbell comes first.
    pub fn take(&self) -> Vec<VsockEvent> {
        // Non-blocking: an error means that nothing was written since.
        let _ = self.0.event.read();
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let rang = std::mem::take(&mut queue.agent_rang).then_some(VsockEvent::AgentRang);
        rang.into_iter().chain(queue.outcomes.drain(..)).collect()
    }
}
