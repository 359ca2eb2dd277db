//! A reader that hands out only so many bytes until it is opened: what a stranger can make us hold
//! before control has accepted the `Hello` is bounded by it, whatever yamux would take. Their place
//! among the strangers is given back when it opens.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::strangers::Stranger;

/// Opens a [`Gated`] for good.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    open: AtomicBool,
    reader: AtomicWaker,
    stranger: Mutex<Option<Stranger>>,
}

impl Gate {
    pub(crate) fn new(stranger: Option<Stranger>) -> Self {
        Self(Arc::new(Shared {
            stranger: Mutex::new(stranger),
            ..Shared::default()
        }))
    }

    pub(crate) fn open(&self) {
        self.0.open.store(true, Ordering::Release);
        self.0.reader.wake();
        let mut stranger = self
            .0
            .stranger
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *stranger = None;
    }
}

/// A socket behind a [`Gate`]; writes pass freely.
#[derive(Debug)]
pub(crate) struct Gated<T> {
    inner: T,
    gate: Gate,
    /// Bytes that may still be read while the gate is shut.
    left: usize,
}

impl<T> Gated<T> {
    pub(crate) fn new(inner: T, gate: Gate, allowance: usize) -> Self {
        Self {
            inner,
            gate,
            left: allowance,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gated<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.gate.0.open.load(Ordering::Acquire) {
            return Pin::new(&mut this.inner).poll_read(cx, buffer);
        }
        if this.left == 0 {
            this.gate.0.reader.register(cx.waker());
            // Opened between the first look and the registration?
            if !this.gate.0.open.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            return Pin::new(&mut this.inner).poll_read(cx, buffer);
        }
        let allowed = this.left.min(buffer.remaining());
        let mut room = ReadBuf::new(buffer.initialize_unfilled_to(allowed));
        ready!(Pin::new(&mut this.inner).poll_read(cx, &mut room))?;
        let count = room.filled().len();
        buffer.advance(count);
        this.left = this.left.saturating_sub(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gated<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn no_more_than_the_allowance_passes_before_the_gate_opens() {
        let (mut far, near) = tokio::io::duplex(64);
        let gate = Gate::default();
        let mut gated = Gated::new(near, gate.clone(), 5);
        far.write_all(b"hello world").await.unwrap();
        let mut buffer = [0; 32];
        assert_eq!(gated.read(&mut buffer).await.unwrap(), 5);
        let waiting = tokio::spawn(async move {
            let mut rest = [0; 6];
            gated.read_exact(&mut rest).await.unwrap();
            rest
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        gate.open();
        assert_eq!(&waiting.await.unwrap(), b" world");
    }
}
