//! Our own terminal: its size, and raw mode, in which every key goes to the VM. Raw mode ends with
//! the value that stands for it, on every way out; nothing else here changes a terminal.

use std::io::{self, IsTerminal};

use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// For programs that ask when nobody knows.
const USUAL_SIZE: (u16, u16) = (80, 24);

mod system {
    nix::ioctl_read_bad!(window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);
}

/// Raw mode of standard input, until it is dropped.
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// None when standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Not TCSADRAIN: a terminal that nobody reads would keep us here.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Columns and rows of the terminal that we write to, or read from.
pub(crate) fn size() -> (u16, u16) {
    [libc::STDOUT_FILENO, libc::STDIN_FILENO]
        .into_iter()
        .find_map(size_of)
        .unwrap_or(USUAL_SIZE)
}

fn size_of(descriptor: i32) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the call writes one `winsize`, into one that we own.
    unsafe { system::window_size(descriptor, &raw mut size) }.ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
