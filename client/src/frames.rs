//! Frames off a stream and onto it. At most one frame and one read's bytes are held.

use std::future::poll_fn;
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
        .map_err(|error: std::io::Error| ClientError::lost(error))
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
