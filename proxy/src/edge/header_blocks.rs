//! The byte stream of a visitor who speaks HTTP/2, on its way to hyper. It passes unchanged; what is
//! looked for is where header blocks begin and end (RFC 9113, 4.1 and 4.3), because a head that is begun
//! has to end in time while a body may take as long as it likes. Malformed frames are hyper's to refuse.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::activity::Activity;

/// Bytes of the client connection preface (RFC 9113, 3.4), which frames follow.
const PREFACE: u32 = 24;

/// Bytes of a frame's header.
const HEADER: usize = 9;

/// The types of frames that carry a part of a block, and the flag of the last one.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Follows frames from read to read.
#[derive(Debug)]
struct Blocks {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    had: usize,
    /// Bytes of the payload that are still to come.
    left: u32,
    /// Within a block.
    open: bool,
    /// The payload that is coming in ends the block.
    last: bool,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            header: [0; HEADER],
            had: 0,
            left: PREFACE,
            open: false,
            last: false,
        }
    }
}

impl Blocks {
    /// Goes over the next bytes; says whether a block ended in them.
    fn follow(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        loop {
            let skipped = usize::try_from(self.left).unwrap_or(usize::MAX);
            let skipped = skipped.min(bytes.len());
            bytes = bytes.get(skipped..).unwrap_or_default();
            self.left = self
                .left
                .saturating_sub(u32::try_from(skipped).unwrap_or(u32::MAX));
            if self.left > 0 {
                return ended;
            }
            if self.open && self.last {
                self.open = false;
                self.last = false;
                ended = true;
            }
            let Some((byte, rest)) = bytes.split_first() else {
                return ended;
            };
            bytes = rest;
            if let Some(place) = self.header.get_mut(self.had) {
                *place = *byte;
            }
            self.had = self.had.saturating_add(1);
            if self.had == HEADER {
                self.had = 0;
                let [high, middle, low, kind, flags, ..] = self.header;
                self.left = u32::from_be_bytes([0, high, middle, low]);
                if kind == HEADERS || kind == CONTINUATION {
                    self.open = true;
                    self.last = flags & END_HEADERS != 0;
                }
            }
        }
    }
}

/// The stream.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    inner: T,
    activity: Arc<Activity>,
    blocks: Blocks,
    /// The activity was told of the block that is coming in.
    told: bool,
}

impl<T> Watched<T> {
    pub(crate) fn new(inner: T, activity: Arc<Activity>) -> Self {
        Self {
            inner,
            activity,
            blocks: Blocks::default(),
            told: false,
        }
    }

    fn note(&mut self, bytes: &[u8]) {
        let ended = self.blocks.follow(bytes);
        if ended && self.told {
            self.told = false;
            self.activity.head_ended();
        }
    }

    /// There is nothing more. Only then does a block that is open wait for the visitor: while an answer
    /// cannot go out, hyper may not ask for what is long there.
    fn waits(&mut self) {
        if self.blocks.open && !self.told {
            self.told = true;
            self.activity.head_began();
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buffer);
        match &read {
            Poll::Ready(Ok(())) => self.note(buffer.filled().get(before..).unwrap_or_default()),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.waits(),
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let size = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![size[1], size[2], size[3], kind, flags, 0, 0, 0, 1];
        // Payloads that look like headers of frames.
        frame.extend([HEADERS, 0].iter().cycle().take(length));
        frame
    }

    /// Whether a block is open after each byte, and how many have ended by then.
    fn byte_by_byte(bytes: &[u8]) -> Vec<(bool, u32)> {
        let mut blocks = Blocks::default();
        let mut ended = 0;
        let mut step = |byte: &u8| {
            ended += u32::from(blocks.follow(std::slice::from_ref(byte)));
            (blocks.open, ended)
        };
        bytes.iter().map(&mut step).collect()
    }

    fn conversation() -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 18));
        bytes.extend(frame(HEADERS, END_HEADERS, 40));
        bytes.extend(frame(DATA, 0, 16_000));
        bytes.extend(frame(HEADERS, 0, 10));
        bytes.extend(frame(CONTINUATION, 0, 0));
        bytes.extend(frame(CONTINUATION, END_HEADERS, 5));
        bytes.extend(frame(HEADERS, END_HEADERS, 0));
        bytes.extend(frame(DATA, 1, 0));
        bytes
    }

    #[test]
    fn a_block_is_open_from_its_first_frame_to_the_end_of_its_last() {
        let bytes = conversation();
        let states = byte_by_byte(&bytes);
        let first = 24 + 9 + 18;
        let expected = |at: usize| match at {
            at if at < first + 8 => (false, 0),
            at if at < first + 48 => (true, 0),
            at if at < first + 49 + 16_009 + 8 => (false, 1),
            at if at < first + 49 + 16_009 + 19 + 9 + 13 => (true, 1),
            at if at < first + 49 + 16_009 + 19 + 9 + 14 + 8 => (false, 2),
            _ => (false, 3),
        };
        for (at, state) in states.iter().enumerate() {
            assert_eq!(*state, expected(at), "after byte {at}");
        }
    }

    #[test]
    fn how_the_bytes_are_split_makes_no_difference() {
        let bytes = conversation();
        let states = byte_by_byte(&bytes);
        let mut random = 7_u64;
        for _ in 0..200 {
            let mut blocks = Blocks::default();
            let mut at = 0;
            while at < bytes.len() {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let length = 1 + (random >> 33) as usize % 60;
                let end = (at + length).min(bytes.len());
                let before = if at == 0 { 0 } else { states[at - 1].1 };
                let ended = blocks.follow(&bytes[at..end]);
                let (open, by_then) = states[end - 1];
                assert_eq!(
                    (blocks.open, ended),
                    (open, by_then > before),
                    "{at}..{end}"
                );
                at = end;
            }
        }
    }
}
