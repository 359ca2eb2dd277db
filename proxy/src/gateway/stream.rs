//! A connection to a port of the guest, as the edge holds it. The stack has the other end of its pipe,
//! so that what the guest does reaches the holder as it would over a network: an end, a reset, silence.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pipe::Far;

/// Why a port of the guest was not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens there.
    #[error("the VM refused the connection: nothing listens on this port of its address")]
    Refused,
    /// The guest did not answer.
    #[error("the VM did not answer within {} s", super::tcp::CONNECT.as_secs())]
    TimedOut,
    /// Too many connections to this VM are open.
    #[error("too many connections to this VM are open; try again later")]
    TooMany,
    /// The stack has ended.
    #[error("the VM's network has ended")]
    Gone,
}

/// A connection to the guest. Shutting it down ends this direction alone; dropping it ends both.
#[derive(Debug)]
pub struct GuestStream {
    stream: Far,
    was_reset: Arc<AtomicBool>,
}

impl GuestStream {
    pub(super) fn new(stream: Far, was_reset: Arc<AtomicBool>) -> Self {
        Self { stream, was_reset }
    }

    fn reset(&self) -> Option<io::Error> {
        self.was_reset
            .load(Ordering::Acquire)
            .then(|| io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = std::task::ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        // The end of a pipe looks the same whether the guest finished or reset.
        if result.is_ok()
            && buffer.filled().len() == before
            && buffer.remaining() > 0
            && let Some(error) = self.reset()
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
