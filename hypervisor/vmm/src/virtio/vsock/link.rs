//! A connection and the host's socket it is joined to: moves bytes between the two without ever
//! blocking and tells the connection what the socket did. At most one window of the guest's bytes is
//! kept while the socket is full. Readiness is remembered from edge-triggered events.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::connection::Connection;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) guest_port: u32,
    /// Until its outcome is reported.
    pub(super) ticket: Option<u64>,
    /// Whether it stands in the line of those that have something to send.
    pub(super) in_line: bool,
    /// Whether it is listed among those whose host side has vanished.
    pub(super) listed_as_vanished: bool,
    stream: Option<UnixStream>,
    /// The guest's bytes that the socket did not take yet.
    buffer: VecDeque<u8>,
    readable: bool,
    hung_up: bool,
    write_closed: bool,
    read_closed: bool,
}

impl Link {
    pub(super) fn new(guest_port: u32, ticket: u64, waits: bool, stream: UnixStream) -> Self {
        Self {
            connection: Connection::new(waits),
            guest_port,
            ticket: Some(ticket),
            in_line: false,
            listed_as_vanished: false,
            stream: Some(stream),
            buffer: VecDeque::new(),
            readable: true,
            hung_up: false,
            write_closed: false,
            read_closed: false,
        }
    }

    pub(super) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    pub(super) fn is_readable(&self) -> bool {
        self.readable && self.stream.is_some()
    }

    pub(super) fn has_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Whether nothing is left to do in either direction.
    pub(super) fn is_over(&self) -> bool {
        self.connection.is_over() && (self.buffer.is_empty() || self.stream.is_none())
    }

    /// The socket stirred.
    pub(super) fn stirred(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        if hung_up && self.connection.is_pending() {
            self.connection.abort();
            self.vanished();
        } else if writable || hung_up {
            self.flush();
        }
        self.settle();
    }

    /// Takes bytes that the guest sent, at most what its window allows.
    pub(super) fn deliver(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        if self.buffer.is_empty() {
            match self.write(bytes) {
                Ok(taken) => {
                    self.connection
                        .delivered(u32::try_from(taken).unwrap_or(u32::MAX));
                    rest = bytes.get(taken..).unwrap_or_default();
                }
                Err(_) => return self.stop_receiving(rest.len()),
            }
        }
        if !rest.is_empty() {
            self.buffer.extend(rest);
        }
    }

    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (first, _) = self.buffer.as_slices();
            match self.write(first) {
                Ok(0) => return,
                Ok(taken) => {
                    self.connection
                        .delivered(u32::try_from(taken).unwrap_or(u32::MAX));
                    self.buffer.drain(..taken);
                }
                Err(_) => return self.stop_receiving(0),
            }
        }
        // A connection that lags once does not keep a window's worth of memory for ever.
        self.buffer = VecDeque::new();
    }

    /// How much the socket took, 0 when it is full.
    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let Some(stream) = &self.stream else {
            return Err(Errno::EPIPE);
        };
        if self.write_closed {
            return Err(Errno::EPIPE);
        }
        let mut taken = 0_usize;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(stream.as_raw_fd(), rest, flags) {
                Ok(count) => taken = taken.saturating_add(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    /// The host's side takes nothing any more; `also` bytes that are not in the buffer are lost too.
    fn stop_receiving(&mut self, also: usize) {
        let lost = self.buffer.len().saturating_add(also);
        self.connection
            .delivered(u32::try_from(lost).unwrap_or(u32::MAX));
        self.buffer = VecDeque::new();
        self.connection.host_stopped_receiving();
    }

    /// Reads what the host sent: None when there is nothing now, or nothing any more.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Option<usize> {
        let stream = self.stream.as_ref()?;
        loop {
            match recv(stream.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => break,
                Ok(count) => return Some(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.readable = false;
                    return None;
                }
                // The other end is gone and had not read everything; what it sent comes after this.
                Err(Errno::ECONNRESET) if !self.hung_up => self.hung_up = true,
                Err(_) => break,
            }
        }
        self.readable = false;
        self.connection.host_sent_all();
        self.settle();
        None
    }

    /// Brings the socket to where the connection is.
    pub(super) fn settle(&mut self) {
        if self.hung_up && !self.connection.wants_host_bytes() && !self.connection.is_pending() {
            self.vanished();
        }
        let Some(stream) = &self.stream else { return };
        // A socket that is already closed on the other side has nothing left to be told.
        if self.connection.guest_stopped_receiving() && !self.read_closed {
            self.read_closed = true;
            let _ = stream.shutdown(Shutdown::Read);
        }
        if self.connection.host_has_all() && !self.write_closed {
            self.write_closed = true;
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// The host's side is gone for good.
    fn vanished(&mut self) {
        self.stop_receiving(0);
        self.connection.host_sent_all();
        self.readable = false;
        self.stream = None;
    }

    /// Gives the connection up; the guest is told.
    pub(super) fn give_up(&mut self) {
        self.connection.abort();
        self.vanished();
    }
}
