//! Why a machine ends, and how the first of several reasons reaches the main thread. Whoever finds
//! a reason tells it and stops; nobody but the main thread ends the process.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use protocol::host::vmm::Ending;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// ACPI S5.
    #[error("the guest powered itself off")]
    PoweredOff,
    /// The reset register.
    #[error("the guest asked for a restart")]
    Reset,
    /// pvpanic.
    #[error("the guest's kernel panicked")]
    GuestPanic,
    /// KVM_EXIT_SHUTDOWN.
    #[error("the guest's processor gave up (triple fault)")]
    TripleFault,
    /// Control asked for it.
    #[error("switched off")]
    SwitchedOff,
    /// A device cannot go on.
    #[error("device fault: {0}")]
    DeviceFault(String),
    /// The monitor cannot go on.
    #[error("failed: {0}")]
    Failed(String),
}

impl Cause {
    /// What the parent learns from the exit code.
    pub fn ending(&self) -> Ending {
        match self {
            Self::PoweredOff => Ending::PoweredOff,
            Self::Reset => Ending::Reset,
            Self::GuestPanic => Ending::GuestPanic,
            Self::TripleFault => Ending::TripleFault,
            Self::SwitchedOff => Ending::SwitchedOff,
            Self::DeviceFault(_) => Ending::DeviceFault,
            Self::Failed(_) => Ending::Failed,
        }
    }
}

/// Tells the main thread. At most one cause is kept; later ones are consequences of the first.
#[derive(Clone)]
pub struct Teller {
    told: Arc<AtomicBool>,
    sender: Sender<Cause>,
    event: Arc<EventFd>,
}

impl Teller {
    /// Tells a cause, unless one was told before.
    pub fn tell(&self, cause: Cause) {
        if !self.told.swap(true, Ordering::AcqRel) {
            // The main thread may be gone already: then the machine ends anyway.
            let _ = self.sender.send(cause);
            let _ = self.event.write(1);
        }
    }
}

/// The main thread's end.
pub struct Told {
    receiver: Receiver<Cause>,
    event: Arc<EventFd>,
}

impl Told {
    /// Readable when there is a cause.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The cause, if one was told.
    pub fn cause(&self) -> Option<Cause> {
        self.receiver.try_recv().ok()
    }
}

/// A connected pair.
pub fn teller() -> io::Result<(Teller, Told)> {
    let event = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    let (sender, receiver) = channel();
    let teller = Teller {
        told: Arc::default(),
        sender,
        event: Arc::clone(&event),
    };
    Ok((teller, Told { receiver, event }))
}

/// What a caught panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_counts() {
        let (teller, told) = teller().unwrap();
        assert_eq!(told.cause(), None);
        teller.tell(Cause::GuestPanic);
        teller.clone().tell(Cause::Reset);
        assert_eq!(told.event().read().unwrap(), 1);
        assert_eq!(told.cause(), Some(Cause::GuestPanic));
        assert_eq!(told.cause(), None);
    }

    #[test]
    fn each_cause_has_an_exit_code_of_its_own() {
        let causes = [
            (Cause::PoweredOff, 0),
            (Cause::Reset, 10),
            (Cause::GuestPanic, 11),
            (Cause::TripleFault, 12),
            (Cause::SwitchedOff, 13),
            (Cause::DeviceFault(String::new()), 14),
            (Cause::Failed(String::new()), 20),
        ];
        for (cause, code) in causes {
            assert_eq!(cause.ending().to_wire(), code, "{cause}");
        }
    }
}
