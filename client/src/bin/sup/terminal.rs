//! Our own terminal: its size, and raw mode, in which every key goes to the VM. Raw mode ends with
//! the value that stands for it, on every way out; nothing else here changes a terminal.

use std::io::{self, IsTerminal};

use nix::libc;
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

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

/// Standard input shows nobody what is typed, until this is dropped.
pub(crate) struct Hidden {
    before: Termios,
}

impl Hidden {
    /// None when standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &hidden)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// What makes a word stand out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    None,
    Green,
    Yellow,
    Red,
}

impl Colour {
    /// The text in this colour, or as it is.
    pub(crate) fn paint(self, text: &str, colours: bool) -> String {
        let number = match self {
            _ if !colours => return text.to_owned(),
            Self::None => return text.to_owned(),
            Self::Green => 32,
            Self::Yellow => 33,
            Self::Red => 31,
        };
        format!("\x1b[{number}m{text}\x1b[0m")
    }
}

/// Whether standard output is a terminal that shows colours to somebody who wants them.
pub(crate) fn colours() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|kind| kind == "dumb");
    io::stdout().is_terminal() && !set("NO_COLOR") && !dumb
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
