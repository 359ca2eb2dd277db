//! A frame channel: a Unix stream socket on which each frame goes behind its length (32 bits,
//! big-endian). Frames are read many at a time into a private buffer; of a frame that the socket took
//! in part, the rest is kept and sent first. It knows no queues. What the other end sends is checked
//! here: a length that no frame has ends the channel.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use protocol::host::MAX_ETHERNET_FRAME;
use vmm_sys_util::epoll::EventSet;

/// Bytes of the length before a frame.
pub(super) const PREFIX: usize = 4;
/// The least frame: addresses and type.
pub(super) const LEAST_FRAME: usize = 14;
/// Bytes that are read at once.
const READ_BYTES: usize = 256 << 10;

/// Why a channel is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// The other end was closed.
    #[error("the other end closed it")]
    Closed,
    /// The other end was closed before a frame was complete.
    #[error("the other end closed it {0} bytes into a frame")]
    Cut(usize),
    /// No frame has this length.
    #[error(
        "a frame of {0} bytes was announced; a frame has {LEAST_FRAME} to {MAX_ETHERNET_FRAME} bytes"
    )]
    Length(u32),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] Errno),
}

/// See the module.
pub(super) struct Channel {
    stream: UnixStream,
    /// Which of the device's channels it is, in epoll.
    pub(super) token: u64,
    /// Whether there may be something to read.
    readable: bool,
    /// Whether it may take something.
    writable: bool,
}

impl Channel {
    pub(super) fn new(stream: UnixStream, token: u64) -> Self {
        Self {
            stream,
            token,
            readable: true,
            writable: true,
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The socket stirred.
    pub(super) fn stirred(&mut self, events: EventSet) {
        // Whoever tries next learns what a hang-up or an error is about.
        let over = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
        self.readable |= events.intersects(EventSet::IN | over);
        self.writable |= events.intersects(EventSet::OUT | over);
    }

    /// Sends what `vectors` point to: how many of the `length` bytes the socket took. Fewer than all
    /// means that it is full, until it stirs.
    pub(super) fn send(&mut self, vectors: &[libc::iovec], length: usize) -> Result<usize, Lost> {
        if !self.writable {
            return Ok(0);
        }
        // SAFETY: all zeros is an empty message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_ptr().cast_mut();
        message.msg_iovlen = vectors.len() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let taken = loop {
            // SAFETY: the caller's vectors point to memory that stays mapped, guest memory or its
            // own; the kernel only reads there.
            let taken =
                unsafe { libc::sendmsg(self.stream.as_raw_fd(), &raw const message, flags) };
            match usize::try_from(taken) {
                Ok(taken) => break taken,
                Err(_) => match Errno::last() {
                    Errno::EINTR => {}
                    Errno::EAGAIN => break 0,
                    error => return Err(error.into()),
                },
            }
        };
        if taken < length {
            self.writable = false;
        }
        Ok(taken)
    }
}

/// Frames that were read and that the guest did not take yet.
pub(super) struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; READ_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// The next frame, if it is there as a whole.
    pub(super) fn frame(&mut self) -> Result<Option<&mut [u8]>, Lost> {
        let there = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let announced = u32::from_be_bytes(*prefix);
        let length = usize::try_from(announced).unwrap_or(usize::MAX);
        if !(LEAST_FRAME..=MAX_ETHERNET_FRAME).contains(&length) {
            return Err(Lost::Length(announced));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let from = self.start.saturating_add(PREFIX);
        Ok(self.bytes.get_mut(from..from.saturating_add(length)))
    }

    /// Forgets the frame of `length` bytes that [`frame`](Self::frame) gave.
    pub(super) fn consume(&mut self, length: usize) {
        self.start = self.start.saturating_add(PREFIX).saturating_add(length);
        if self.start >= self.end {
            self.clear();
        }
    }

    /// Reads more; false when there is nothing now.
    pub(super) fn fill(&mut self, channel: &mut Channel) -> Result<bool, Lost> {
        if !channel.readable {
            return Ok(false);
        }
        // Less than a frame is left; it moves to where its rest has room.
        let left = self.end.saturating_sub(self.start);
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, left);
        let room = self.bytes.get_mut(left..).unwrap_or_default();
        loop {
            match recv(channel.descriptor(), room, MsgFlags::MSG_DONTWAIT) {
                Ok(0) if left == 0 => return Err(Lost::Closed),
                Ok(0) => return Err(Lost::Cut(left)),
                Ok(count) => {
                    self.end = left.saturating_add(count);
                    return Ok(true);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    channel.readable = false;
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The rest of a frame that the socket took in part.
pub(super) struct Unsent {
    bytes: Vec<u8>,
    done: usize,
}

impl Unsent {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(MAX_ETHERNET_FRAME.saturating_add(PREFIX)),
            done: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.done = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.len() == self.done
    }

    /// Room for so many bytes, to be filled by the caller.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        self.done = 0;
        self.bytes.clear();
        self.bytes.resize(length, 0);
        &mut self.bytes
    }

    /// Sends it; true when nothing is left.
    pub(super) fn flush(&mut self, channel: &mut Channel) -> Result<bool, Lost> {
        let rest = self.bytes.get(self.done..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(true);
        }
        let vector = libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        let length = rest.len();
        let taken = channel.send(&[vector], length)?;
        self.done = self.done.saturating_add(taken);
        if taken < length {
            return Ok(false);
        }
        self.clear();
        Ok(true)
    }
}
