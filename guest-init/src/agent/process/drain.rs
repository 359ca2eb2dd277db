//! Empties the pipes of processes whose client has gone, so that they neither stop at a full pipe
//! nor die of a closed one. One thread serves all of them; what it reads is thrown away.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::log;

/// Pipes that are kept at once; what comes on top is closed.
const MAX_PIPES: usize = 4096;

/// The pipes that nobody listens to.
pub(crate) struct Drain {
    epoll: Epoll,
    pipes: Mutex<HashMap<RawFd, OwnedFd>>,
}

impl Drain {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            pipes: Mutex::default(),
        })
    }

    /// Takes over the reading end of a pipe. It must not block.
    pub(crate) fn adopt(&self, pipe: OwnedFd) {
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        if pipes.len() >= MAX_PIPES {
            log::warn(format_args!(
                "event=pipe_closed reason=\"{MAX_PIPES} pipes are drained already\""
            ));
            return;
        }
        let number = pipe.as_raw_fd();
        let data = u64::from(number.unsigned_abs());
        match self
            .epoll
            .add(&pipe, EpollEvent::new(EpollFlags::EPOLLIN, data))
        {
            Ok(()) => {
                pipes.insert(number, pipe);
            }
            Err(error) => log::warn(format_args!("event=pipe_closed error={error}")),
        }
    }

    /// Reads and discards, for ever.
    pub(crate) fn run(&self) {
        let mut events = [EpollEvent::empty(); 16];
        let mut waste = vec![0; 16 << 10];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    log::error(format_args!("event=drain_stopped error={error}"));
                    return;
                }
            };
            for event in events.iter().take(count) {
                let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
                let Ok(number) = RawFd::try_from(event.data()) else {
                    continue;
                };
                let Some(pipe) = pipes.get(&number) else {
                    continue;
                };
                match nix::unistd::read(pipe, &mut waste) {
                    Ok(1..) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                    // Closing the last copy of a descriptor takes it out of the epoll set.
                    Ok(0) | Err(_) => drop(pipes.remove(&number)),
                }
            }
        }
    }
}
