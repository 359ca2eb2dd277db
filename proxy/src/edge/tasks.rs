//! Tasks of the edge. A panic in one ends that task alone; it is counted and logged.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt;

use crate::Quiet;

/// Starts tasks and counts those that panicked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tasks(Arc<AtomicU64>);

impl Tasks {
    /// How many tasks panicked.
    pub(crate) fn panics(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Runs a future until its end.
    pub(crate) fn spawn<T>(&self, future: impl Future<Output = T> + Send + 'static) {
        let panics = Arc::clone(&self.0);
        // An async block would hold the future twice: as what it was given, and as what it awaits.
        let guarded = AssertUnwindSafe(future).catch_unwind();
        tokio::spawn(guarded.map(move |ended| {
            if ended.is_err() {
                let panics = panics.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                static QUIET: Quiet = Quiet::new();
                if let Some(left_out) = QUIET.allow() {
                    tracing::error!(panics, left_out, "a task of the edge panicked");
                }
            }
        }));
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        self.spawn(future);
    }
}
