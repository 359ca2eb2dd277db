//! The thread behind the blocking client, and readers of the caller's own for it.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::error::ClientError;

/// A runtime with one thread. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub(super) struct Thread(Arc<Inner>);

struct Inner(Option<Runtime>);

impl Drop for Inner {
    fn drop(&mut self) {
        // Waiting for it would be a panic where async code drops the last client.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Thread {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Thread")
    }
}

impl Thread {
    pub(super) fn start() -> Result<Self, ClientError> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("supvm-client")
            .enable_all()
            .build()
            .map_err(|error| ClientError::Blocking(error.to_string()))?;
        Ok(Self(Arc::new(Inner(Some(runtime)))))
    }

    /// Waits for the result on the caller's own thread.
    pub(super) fn run<T>(
        &self,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        if Handle::try_current().is_ok() {
            let reason = "it was called from async code; use the async client there";
            return Err(ClientError::Blocking(reason.into()));
        }
        match &self.0.0 {
            Some(runtime) => runtime.block_on(work),
            None => Err(ClientError::Blocking("its thread has ended".into())),
        }
    }

    /// The next item of an iterator, which ends with its first error.
    pub(super) fn item<T>(
        &self,
        failed: &mut bool,
        next: impl Future<Output = Result<Option<T>, ClientError>>,
    ) -> Option<Result<T, ClientError>> {
        if *failed {
            return None;
        }
        let result = self.run(next);
        *failed = result.is_err();
        result.transpose()
    }

    /// [`Thread::run`] for readers and writers.
    pub(super) fn run_io<T>(&self, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        Ok(self.run(async { Ok(work.await?) })?)
    }
}

/// A reader that blocks, for futures that are waited for on the caller's own thread: it holds up
/// nobody else.
pub(super) struct Own<R> {
    inner: R,
    at: u64,
}

impl<R> Own<R> {
    pub(super) fn new(inner: R) -> Self {
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
