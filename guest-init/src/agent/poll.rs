//! Waiting for several descriptors at once. A descriptor that is of no interest now is left out, so
//! that a condition nobody wants to handle cannot wake a thread again and again.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;

/// A descriptor and what about it is of interest.
#[derive(Clone, Copy)]
pub(crate) struct Interest(libc::pollfd);

impl Interest {
    /// No descriptor.
    pub(crate) const NONE: Self = Self(libc::pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    });

    /// Bytes can be read or written. A closed or broken peer is always of interest.
    pub(crate) fn new(descriptor: BorrowedFd<'_>, read: bool, write: bool) -> Self {
        let mut events = 0;
        if read {
            events |= libc::POLLIN;
        }
        if write {
            events |= libc::POLLOUT;
        }
        Self(libc::pollfd {
            fd: descriptor.as_raw_fd(),
            events,
            revents: 0,
        })
    }

    /// Something out of the ordinary has happened, as the files of control groups say it.
    pub(crate) fn news(descriptor: BorrowedFd<'_>) -> Self {
        Self(libc::pollfd {
            fd: descriptor.as_raw_fd(),
            events: libc::POLLPRI,
            revents: 0,
        })
    }

    /// The end of what the peer sends is of interest, though its bytes may not be.
    pub(crate) fn and_end(mut self) -> Self {
        self.0.events |= libc::POLLRDHUP;
        self
    }

    /// The peer sends no more, as far as [`and_end`](Self::and_end) asked for it.
    pub(crate) fn ended(&self) -> bool {
        self.0.revents & libc::POLLRDHUP != 0
    }

    /// Reading would give bytes, an end or an error.
    pub(crate) fn readable(&self) -> bool {
        self.0.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Writing would take bytes, or fail.
    pub(crate) fn writable(&self) -> bool {
        self.0.revents & libc::POLLOUT != 0
    }

    /// There are bytes or an end to be read.
    pub(crate) fn has_input(&self) -> bool {
        self.0.revents & libc::POLLIN != 0
    }

    /// Both directions are closed, or the connection is broken.
    pub(crate) fn hung_up(&self) -> bool {
        self.0.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }
}

/// Waits until something of interest happened or the deadline has passed.
pub(crate) fn wait<const N: usize>(
    interests: &mut [Interest; N],
    deadline: Option<Instant>,
) -> Result<(), Errno> {
    let mut fds = interests.map(|interest| interest.0);
    let timeout = deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        // One millisecond more than whole ones: never wake before the deadline.
        let millis = left.as_millis().saturating_add(u128::from(!left.is_zero()));
        i32::try_from(millis).unwrap_or(i32::MAX)
    });
    let count = libc::nfds_t::try_from(N).unwrap_or(0);
    // SAFETY: the array holds `N` entries and lives across the call.
    match Errno::result(unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) }) {
        Ok(_) => {}
        Err(Errno::EINTR) => fds = fds.map(|fd| libc::pollfd { revents: 0, ..fd }),
        Err(error) => return Err(error),
    }
    for (interest, fd) in interests.iter_mut().zip(fds) {
        interest.0 = fd;
    }
    Ok(())
}
