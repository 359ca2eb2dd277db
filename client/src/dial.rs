//! A TCP connection inside a VM: bytes both ways, half-closes pass through.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};

use crate::agent::{Io, Replies, Requests};
use crate::connection::Place;

/// A connection to a port inside a VM, made by [`Vm::dial`](crate::Vm::dial).
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// let mut web = vm.dial(3000).await?;
/// web.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
/// let mut answer = Vec::new();
/// web.take(1 << 20).read_to_end(&mut answer).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Dialogue {
    read: ReadHalf<Io>,
    write: WriteHalf<Io>,
    /// Read beyond the agent's last frame.
    before: Vec<u8>,
    _place: Arc<Place>,
}

impl Dialogue {
    pub(crate) fn new(replies: Replies, requests: Requests) -> Self {
        let (read, before) = replies.into_raw();
        let (write, _place) = requests.into_raw();
        Self {
            read,
            write,
            before,
            _place,
        }
    }
}

impl AsyncRead for Dialogue {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.before.is_empty() {
            return Pin::new(&mut self.read).poll_read(cx, buffer);
        }
        let count = self.before.len().min(buffer.remaining());
        let bytes: Vec<u8> = self.before.drain(..count).collect();
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Dialogue {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}
