//! The other side of what a guest has open: a socket of the kernel for the world, a pipe for a task of
//! this process. Neither is ever waited for.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::pipe::Near;
use super::slab::Token;
use super::table::Ready;
use super::world::{self, Attempt};

/// See the module.
#[derive(Debug)]
pub(super) enum Socket {
    World(OwnedFd),
    Task(Near),
}

impl From<OwnedFd> for Socket {
    fn from(socket: OwnedFd) -> Self {
        Self::World(socket)
    }
}

impl From<Near> for Socket {
    fn from(pipe: Near) -> Self {
        Self::Task(pipe)
    }
}

impl Socket {
    /// Events and the bell name it by this number from now on.
    pub(super) fn listen(&self, poller: &Epoll, token: Token) -> Result<(), Errno> {
        match self {
            Self::World(socket) => {
                let flags = EpollFlags::EPOLLIN
                    | EpollFlags::EPOLLOUT
                    | EpollFlags::EPOLLRDHUP
                    | EpollFlags::EPOLLET;
                poller.add(socket, EpollEvent::new(flags, token.to_u64()))
            }
            Self::Task(pipe) => {
                pipe.listen(token);
                Ok(())
            }
        }
    }

    /// It may live on under another number.
    pub(super) fn forget(&self, poller: &Epoll) {
        if let Self::World(socket) = self {
            let _ = poller.delete(socket);
        }
    }

    /// Notes what the bell was rung for.
    pub(super) fn note(&self, ready: &mut Ready) {
        if let Self::Task(pipe) = self {
            let news = pipe.news();
            ready.readable = true;
            ready.writable = true;
            ready.finished |= news.finished;
            ready.over |= news.gone;
            ready.failed |= news.reset;
        }
    }

    /// How an attempt to connect stands.
    pub(super) fn outcome(&self) -> Attempt {
        match self {
            Self::World(socket) => world::outcome(socket.as_fd()),
            Self::Task(_) => Ok(Some(())),
        }
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::World(socket) => world::send(socket.as_fd(), bytes),
            Self::Task(pipe) => pipe.send(bytes),
        }
    }

    pub(super) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::World(socket) => world::receive(socket.as_fd(), into),
            Self::Task(pipe) => pipe.receive(into),
        }
    }

    /// The length that a datagram has, also where it is larger than the buffer.
    pub(super) fn receive_datagram(&self, into: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::World(socket) => world::receive_datagram(socket.as_fd(), into),
            Self::Task(pipe) => pipe.receive(into),
        }
    }

    /// Says to the other end that nothing more comes.
    pub(super) fn finish(&self) {
        match self {
            Self::World(socket) => world::finish(socket.as_fd()),
            Self::Task(pipe) => pipe.finish(),
        }
    }

    /// Closes so that the other end learns that the connection was reset. A task is told by its
    /// stream.
    pub(super) fn reset(self) {
        if let Self::World(socket) = self {
            world::reset(socket);
        }
    }
}
