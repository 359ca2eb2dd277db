//! The thread behind the blocking client.

use std::fmt;
use std::io;
use std::sync::Arc;

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
            let reason = "it was called on a thread of an async runtime; use the async client there, or a thread of your own";
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
