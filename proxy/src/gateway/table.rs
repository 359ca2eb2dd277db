//! What a stack has open, each with its socket, its key and its place in the limits, and whose turn
//! it is. Everything that is taken in here is taken out again when its socket is closed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use smoltcp::wire::IpProtocol;

use super::Common;
use super::counters::{Counters, count};
use super::engine::Engine;
use super::flows::Flow;
use super::slab::Token;
use super::socket::Socket;
use super::tcp::{Asking, Connection, With};

/// What tells connections and flows apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) protocol: IpProtocol,
    /// An echo's identifier stands here as well.
    pub(super) guest_port: u16,
    pub(super) peer: SocketAddr,
}

/// What the kernel said about a socket and what was seen of it since.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The other end has finished or gone: reads go on until they say so.
    pub(super) finished: bool,
    /// Both directions are over.
    pub(super) over: bool,
    /// The other end has reset the connection; it is read behind what came before.
    pub(super) failed: bool,
}

impl Ready {
    pub(super) fn note(&mut self, flags: EpollFlags) {
        let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        self.readable |= flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | gone);
        self.writable |= flags.intersects(EpollFlags::EPOLLOUT | gone);
        self.finished |= flags.intersects(EpollFlags::EPOLLRDHUP | gone);
        self.over |= flags.intersects(gone);
        self.failed |= flags.contains(EpollFlags::EPOLLERR);
    }
}

/// Something that is open.
pub(super) struct Entry {
    pub(super) key: Key,
    // Before the socket, so that a reset is marked before its end is seen.
    pub(super) kind: Kind,
    pub(super) socket: Socket,
    pub(super) ready: Ready,
    /// Held by what is open to the world.
    pub(super) permit: Option<Permit>,
    dirty: bool,
    starved: bool,
}

pub(super) enum Kind {
    Asking(Asking),
    Tcp(Box<Connection>),
    Flow(Flow),
}

/// One of the connections and flows to the world.
pub(super) struct Permit {
    common: Arc<Common>,
    counters: Arc<Counters>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.common.leave();
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What becomes of an entry after its turn.
pub(super) enum Next {
    /// Look again then, or when something happens.
    Wait(Option<Instant>),
    /// Something could not be sent to the guest; look again when it can.
    Starved(Option<Instant>),
    Gone {
        /// The socket is closed with a reset.
        reset: bool,
    },
}

impl Engine {
    /// A place among the connections to the world. What a limit refuses is counted.
    pub(super) fn permit(&self) -> Option<Permit> {
        let open = self.counters.open.load(Ordering::Relaxed);
        if open >= self.max_connections || !self.common.enter() {
            count(&self.counters.limited);
            return None;
        }
        self.counters.open.fetch_add(1, Ordering::Relaxed);
        Some(Permit {
            common: Arc::clone(&self.common),
            counters: Arc::clone(&self.counters),
        })
    }

    /// Takes something in that is open, and listens to its socket.
    pub(super) fn insert(
        &mut self,
        key: Key,
        socket: impl Into<Socket>,
        kind: Kind,
        permit: Option<Permit>,
    ) -> Option<Token> {
        if let Some(number) = self.number_of(&kind) {
            *number = number.saturating_add(1);
        }
        let poller = &self.poller.get_ref().0;
        let socket = socket.into();
        let mut added = Ok(());
        let token = self.entries.insert(|token| {
            added = socket.listen(poller, token);
            Entry {
                key,
                socket,
                ready: Ready::default(),
                kind,
                permit,
                dirty: false,
                starved: false,
            }
        });
        if added.is_err() {
            let entry = self.entries.remove(token)?;
            if let Some(number) = self.number_of(&entry.kind) {
                *number = number.saturating_sub(1);
            }
            count(&self.counters.limited);
            return None;
        }
        self.keys.insert(key, token);
        Some(token)
    }

    /// Takes something out; its socket is closed when the caller drops it.
    pub(super) fn remove(&mut self, token: Token) -> Option<Entry> {
        let entry = self.entries.remove(token)?;
        if self.keys.get(&entry.key) == Some(&token) {
            self.keys.remove(&entry.key);
        }
        self.timers.remove(token);
        if let Some(number) = self.number_of(&entry.kind) {
            *number = number.saturating_sub(1);
        }
        if matches!(entry.kind, Kind::Asking(_)) {
            // The socket may live on as a connection's, under another number.
            entry.socket.forget(&self.poller.get_ref().0);
        }
        self.forget_starved();
        Some(entry)
    }

    /// How many there are of a kind that has a limit of its own.
    fn number_of(&mut self, kind: &Kind) -> Option<&mut usize> {
        match kind {
            Kind::Asking(_) => Some(&mut self.asking),
            Kind::Tcp(connection) => match connection.with {
                With::World => None,
                With::Names => Some(&mut self.name_streams),
                With::Edge => Some(&mut self.inbound),
            },
            Kind::Flow(_) => None,
        }
    }

    /// Those that have ended stay in the queue of those that wait for room, but not without end: a
    /// guest that takes nothing may open and end as many as it likes.
    fn forget_starved(&mut self) {
        let most = self.keys.len().saturating_mul(2).saturating_add(64);
        if self.starved.len() > most {
            let entries = &mut self.entries;
            let waits = |token: &Token| entries.get_mut(*token).is_some_and(|entry| entry.starved);
            self.starved.retain(waits);
        }
    }

    /// Notes that something has happened to an entry.
    pub(super) fn soil(&mut self, token: Token) {
        if let Some(entry) = self.entries.get_mut(token)
            && !entry.dirty
        {
            entry.dirty = true;
            self.dirty.push(token);
        }
    }

    pub(super) fn serve_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for token in dirty.drain(..) {
            if let Some(entry) = self.entries.get_mut(token) {
                entry.dirty = false;
                self.serve(token);
            }
        }
        // Serving one may have soiled another.
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
    }

    /// Those who could not send, in the order in which they came, while there is room.
    pub(super) fn serve_starved(&mut self) {
        for _ in 0..self.starved.len() {
            if self.link.full() {
                return;
            }
            let Some(token) = self.starved.pop_front() else {
                return;
            };
            if let Some(entry) = self.entries.get_mut(token) {
                entry.starved = false;
                self.serve(token);
            }
        }
    }

    fn serve(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        let next = match &entry.kind {
            Kind::Asking(_) => self.serve_asking(token),
            Kind::Tcp(_) => self.serve_connection(token),
            Kind::Flow(_) => self.serve_flow(token),
        };
        let deadline = match next {
            Next::Wait(deadline) => deadline,
            Next::Starved(deadline) => {
                if let Some(entry) = self.entries.get_mut(token)
                    && !entry.starved
                {
                    entry.starved = true;
                    self.starved.push_back(token);
                }
                deadline
            }
            Next::Gone { reset } => {
                let Some(Entry {
                    mut kind, socket, ..
                }) = self.remove(token)
                else {
                    return;
                };
                if let Kind::Tcp(connection) = &mut kind {
                    connection.orderly = !reset;
                }
                drop(kind);
                if reset {
                    socket.reset();
                }
                return;
            }
        };
        if let Some(deadline) = deadline {
            self.timers.set(token, deadline);
        }
    }
}
