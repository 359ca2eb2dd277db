//! Frames off a stream and onto it. At most one frame and one read's bytes are held.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use protocol::frame::{self, HEADER_LEN, MAX_BODY};
use protocol::{Frame, FrameReader, Kind, Message};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::error::ClientError;

const READ: usize = 64 << 10;

/// Reads frames.
#[derive(Debug)]
pub(crate) struct Frames<R> {
    inner: R,
    reader: FrameReader,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            reader: FrameReader::new(),
            buffer: vec![0; READ].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// The next frame; none at an end between frames. Dropping the call loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, ClientError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same for those who poll.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Frame>, ClientError>> {
        loop {
            let mut rest = self.buffer.get(self.start..self.end).unwrap_or_default();
            let frame = self.reader.push(&mut rest)?;
            self.start = self.end.saturating_sub(rest.len());
            if frame.is_some() {
                return Poll::Ready(Ok(frame));
            }
            let mut buffer = ReadBuf::new(&mut self.buffer);
            let read = ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buffer));
            let count = buffer.filled().len();
            read.map_err(ClientError::lost)?;
            self.start = 0;
            self.end = count;
            if count == 0 {
                self.reader.finish()?;
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Takes it apart: the stream, and what was read beyond the last frame.
    pub(crate) fn into_parts(self) -> (R, Vec<u8>) {
        let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
        (self.inner, rest.to_vec())
    }

    /// Continues on `inner` behind bytes that were read of it before.
    pub(crate) fn resume(inner: R, before: &[u8]) -> Self {
        let mut frames = Self::new(inner);
        if frames.buffer.len() < before.len() {
            frames.buffer = before.to_vec().into_boxed_slice();
        } else if let Some(front) = frames.buffer.get_mut(..before.len()) {
            front.copy_from_slice(before);
        }
        frames.end = before.len();
        frames
    }
}

/// Writes frames, each of them whole: what a call that is given up half-way leaves of a frame goes out
/// before the next one. At most one frame is held.
#[derive(Debug)]
pub(crate) struct FrameWriter<W> {
    inner: W,
    /// A frame that has begun, and how much of it has gone out.
    begun: Vec<u8>,
    sent: usize,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self {
            inner,
            begun: Vec::new(),
            sent: 0,
        }
    }

    /// Writes whole frames at once. A call that is dropped has written all of them or none, as seen
    /// by the next call.
    pub(crate) async fn write(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        self.write_rest().await?;
        let first = poll_fn(|cx| Pin::new(&mut self.inner).poll_write(cx, &bytes));
        self.sent = first.await?;
        self.begun = bytes;
        self.write_rest().await?;
        self.inner.flush().await
    }

    /// Writes what is left of the last frame, and ends the stream.
    pub(crate) async fn end(&mut self) -> io::Result<()> {
        self.write_rest().await?;
        self.inner.shutdown().await
    }

    pub(crate) fn into_inner(self) -> W {
        self.inner
    }

    async fn write_rest(&mut self) -> io::Result<()> {
        while let Some(rest) = self.begun.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let count = poll_fn(|cx| Pin::new(&mut self.inner).poll_write(cx, rest)).await?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.sent = self.sent.saturating_add(count);
        }
        self.begun = Vec::new();
        self.sent = 0;
        Ok(())
    }
}

/// Writes one message.
pub(crate) async fn write<M: Message, W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &M,
) -> Result<(), ClientError> {
    write_bytes(writer, &encode(message)?).await
}

/// Writes whole frames at once: every write of its own is a packet of its own.
pub(crate) async fn write_bytes<W: AsyncWrite + Unpin>(
    writer: &mut W,
    bytes: &[u8],
) -> Result<(), ClientError> {
    let written = async {
        writer.write_all(bytes).await?;
        writer.flush().await
    };
    written
        .await
        .map_err(|error: io::Error| ClientError::lost(error))
}

/// A message as a frame.
pub(crate) fn encode<M: Message>(message: &M) -> Result<Vec<u8>, ClientError> {
    let body = protocol::message::encode_body(message)
        .map_err(|error| ClientError::Unsendable(error.to_string()))?;
    framed(M::KIND, &body)
}

pub(crate) fn framed(kind: Kind, body: &[u8]) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN.saturating_add(body.len()));
    frame::append(&mut bytes, kind, body).map_err(|_| {
        ClientError::Unsendable(format!("{} bytes; at most {MAX_BODY} fit", body.len()))
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_frame_that_was_given_up_half_way_is_ended_before_the_next_one() {
        let (near, far) = tokio::io::duplex(100);
        let mut writer = FrameWriter::new(near);
        let long = framed(Kind::STDIN, &[1; 1000]).unwrap();
        for _ in 0..3 {
            // The first begins, and the others wait behind it and never do.
            assert!(writer.write(long.clone()).now_or_never().is_none());
        }
        let mut frames = Frames::new(far);
        let reading = tokio::spawn(async move {
            let first = frames.next().await.unwrap().unwrap();
            let second = frames.next().await.unwrap().unwrap();
            assert!(frames.next().await.unwrap().is_none());
            (first, second)
        });
        let next = framed(Kind::STDIN_END, &[]).unwrap();
        writer.write(next).await.unwrap();
        writer.end().await.unwrap();
        let (first, second) = reading.await.unwrap();
        assert_eq!(first.body, [1; 1000]);
        assert_eq!(second.kind, Kind::STDIN_END);
    }
}
