//! What a supervisor does beside supervising: PID 1 has devices, disks and a power button to look
//! after, `supvm serve` has nothing. The loop asks for what to watch and tells what happened.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use protocol::host::supervisor::Lease;

/// What the supervisor is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    /// What control and proxy need is there: start them.
    Release,
    /// Stop everything.
    ShutDown(Outcome),
}

/// What follows when everything has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The process exits or, as PID 1, powers the machine off.
    PowerOff,
    /// PID 1 restarts the machine.
    Restart,
}

/// Work beside supervising. No call may wait.
pub(crate) trait Duties {
    /// The descriptors to wait for, to become readable, each with a number of the caller's choice.
    fn watched(&self) -> Vec<(usize, BorrowedFd<'_>)>;

    /// The descriptor with this number is readable.
    fn ready(&mut self, number: usize) -> Option<Demand>;

    /// When to be called again at the latest.
    fn deadline(&self) -> Option<Instant>;

    /// The deadline has passed.
    fn elapsed(&mut self) -> Option<Demand>;

    /// Net has learned something about an interface.
    fn lease(&mut self, lease: Lease);

    /// Whether children of dead parents come here, as they do to PID 1.
    fn reaps_orphans(&self) -> bool;
}

/// No work beside supervising.
#[derive(Debug)]
pub(crate) struct NoDuties;

impl Duties for NoDuties {
    fn watched(&self) -> Vec<(usize, BorrowedFd<'_>)> {
        Vec::new()
    }

    fn ready(&mut self, _number: usize) -> Option<Demand> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn elapsed(&mut self) -> Option<Demand> {
        None
    }

    fn lease(&mut self, _lease: Lease) {}

    fn reaps_orphans(&self) -> bool {
        false
    }
}
