//! Readers of the caller's own, on the caller's own thread.

use std::io::{self, Read, Seek, SeekFrom};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};

/// A reader that blocks, for futures that are waited for on the caller's own thread: it holds up
/// nobody else.
pub(crate) struct Own<R> {
    inner: R,
    at: u64,
}

impl<R> Own<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, at: 0 }
    }
}

impl<R: Read + Unpin> AsyncRead for Own<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buffer.initialize_unfilled();
        let most = room.len();
        let count = loop {
            match self.inner.read(room) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        if count > most {
            return Poll::Ready(Err(io::Error::other("a reader read more than it could")));
        }
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<R: Seek + Unpin> AsyncSeek for Own<R> {
    fn start_seek(mut self: Pin<&mut Self>, to: SeekFrom) -> io::Result<()> {
        self.at = self.inner.seek(to)?;
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.at))
    }
}
