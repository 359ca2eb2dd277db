//! Pseudo-terminals: the agent holds the master, the process's session is controlled by the other
//! end. Everything is reached by descriptors, because the paths below /dev are the user's to remove.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use protocol::process::TerminalSize;

/// From the kernel's `asm-generic/ioctls.h`: a number of type `T` (0x54).
const TIOCGPTPEER: libc::Ioctl = 0x5441;

/// Where pseudo-terminals come from.
pub(crate) struct Terminals {
    /// The directory of the mount, if there is one.
    directory: Option<OwnedFd>,
}

/// Both ends of a new one.
pub(crate) struct Terminal {
    /// Does not block.
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

impl Terminals {
    pub(crate) fn find() -> Self {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Self {
            directory: open("/dev/pts", flags, Mode::empty()).ok(),
        }
    }

    /// Makes one of this size that belongs to `uid`.
    pub(crate) fn make(&self, size: TerminalSize, uid: u32) -> Result<Terminal, Errno> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let master = match &self.directory {
            Some(directory) => openat(directory, "ptmx", flags, Mode::empty())?,
            None => open("/dev/ptmx", flags, Mode::empty())?,
        };
        let unlocked: libc::c_int = 0;
        // SAFETY: the call reads one integer that lives across it.
        Errno::result(unsafe {
            libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked)
        })?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: plain numbers.
        let slave = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) })?;
        // SAFETY: the call has just made this descriptor and nobody else owns it.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        if uid != 0 {
            nix::unistd::fchown(&slave, Some(uid.into()), None)?;
        }
        resize(master.as_fd(), size)?;
        Ok(Terminal { master, slave })
    }
}

/// How it takes its input, if it says so.
pub(crate) fn settings(master: BorrowedFd<'_>) -> Option<libc::termios> {
    // SAFETY: all zeroes is a valid value of this plain structure of numbers.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one structure that lives across it.
    let asked = unsafe { libc::tcgetattr(master.as_raw_fd(), &raw mut settings) };
    (asked == 0).then_some(settings)
}

/// Sets the size; whoever runs in the foreground is told by the kernel.
pub(crate) fn resize(master: BorrowedFd<'_>, size: TerminalSize) -> Result<(), Errno> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the call reads one structure that lives across it.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}
