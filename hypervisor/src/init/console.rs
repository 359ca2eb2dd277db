//! The machine's console, written by a thread of its own. A console that stands still (Ctrl-S, a
//! serial line with nobody at the other end) must hold up neither init nor any process that logs:
//! what does not fit meanwhile is lost.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{dup2_stderr, dup2_stdout, pipe2, read, write};

/// Bytes that wait for the console.
const WAITING: i32 = 1 << 20;

/// Init's standard output and error on their way to the console. All processes inherit them.
#[derive(Debug)]
pub(super) struct Console {
    terminal: OwnedFd,
    drained: Receiver<()>,
}

impl Console {
    /// Takes over standard output and error.
    pub(super) fn take_over() -> io::Result<Self> {
        let terminal = io::stderr().as_fd().try_clone_to_owned()?;
        let (waiting, log) = log_pipe()?;
        dup2_stdout(&log)?;
        dup2_stderr(&log)?;
        let to = terminal.try_clone()?;
        let (done, drained) = channel();
        std::thread::Builder::new()
            .name("supvm-console".into())
            .spawn(move || pump(&waiting, &to, &done))?;
        Ok(Self { terminal, drained })
    }

    /// Waits until what was logged is on the console, but not for one that stands still. Only what
    /// is said after the last process has ended is waited for as well.
    pub(super) fn finish(self, within: Duration) {
        // The pipe ends when nobody holds it any more.
        let _ = dup2_stdout(&self.terminal);
        let _ = dup2_stderr(&self.terminal);
        if self.drained.recv_timeout(within).is_err()
            && let Ok(null) = std::fs::File::options().write(true).open("/dev/null")
        {
            let _ = dup2_stdout(&null);
            let _ = dup2_stderr(&null);
        }
    }
}

/// A pipe whose writers never wait.
fn log_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (waiting, log) = pipe2(OFlag::O_CLOEXEC)?;
    // As long as it was made is long enough for a start.
    let _ = fcntl(&log, FcntlArg::F_SETPIPE_SZ(WAITING));
    fcntl(&log, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((waiting, log))
}

/// Writes what comes until nobody can write any more.
fn pump(waiting: &OwnedFd, terminal: &OwnedFd, done: &Sender<()>) {
    let mut buffer = [0; 4096];
    loop {
        match read(waiting, &mut buffer) {
            Ok(0) => break,
            Ok(length) => put(terminal, buffer.get(..length).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    let _ = done.send(());
}

/// A console that refuses loses what it refused.
fn put(terminal: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match write(terminal, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_console_that_stands_still_holds_up_nobody_who_logs() {
        let (waiting, log) = log_pipe().unwrap();
        // Nobody reads this console: it stands still when its pipe is full.
        let (console, terminal) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (done, drained) = channel();
        std::thread::spawn(move || pump(&waiting, &terminal, &done));
        let (finished, writer) = channel();
        std::thread::spawn(move || {
            let lost = (0..2000).filter(|_| write(&log, &[b'x'; 4096]) == Err(Errno::EAGAIN));
            finished.send(lost.count()).unwrap();
        });
        assert!(writer.recv_timeout(LONG).unwrap() > 0);
        assert!(drained.try_recv().is_err());
        drop(console);
        drained.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn what_was_logged_is_on_the_console_in_order() {
        let (waiting, log) = log_pipe().unwrap();
        let (console, terminal) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (done, drained) = channel();
        std::thread::spawn(move || pump(&waiting, &terminal, &done));
        write(&log, b"one\n").unwrap();
        write(&log, b"two\n").unwrap();
        drop(log);
        drained.recv_timeout(LONG).unwrap();
        let mut text = [0; 16];
        let length = read(&console, &mut text).unwrap();
        assert_eq!(&text[..length], b"one\ntwo\n");
    }
}
