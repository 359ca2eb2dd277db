//! Changes of files in a VM as they happen. At most one message of them is held; whoever is slow is
//! told that some were lost.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use protocol::Kind;
use protocol::file::watch::{FileEvent, FileEvents, WatchFiles, WatchStarted};

use crate::agent::{Replies, Requests};
use crate::error::ClientError;
use crate::vm::Vm;

/// Changes of a file or a directory; without an end of its own.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut changes = vm.watch("src", true).await?;
/// loop {
///     let change = changes.next().await?;
///     println!("{:?} {}", change.change, String::from_utf8_lossy(&change.path));
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Watch {
    replies: Replies,
    // The agent takes the end of our half for our leaving.
    _requests: Requests,
    watched: u32,
    events: VecDeque<FileEvent>,
    failed: bool,
}

impl Vm {
    /// Watches a file or a directory; with `recursive` also what is below it, and what comes
    /// later. Everything that happens from its return on is told.
    pub async fn watch(
        &self,
        path: impl AsRef<[u8]>,
        recursive: bool,
    ) -> Result<Watch, ClientError> {
        let path = path.as_ref().to_vec();
        let begun = async {
            let (mut replies, requests) = self.begin(&WatchFiles { path, recursive }).await?;
            let started: WatchStarted = replies.answer().await?;
            Ok((replies, requests, started.watched))
        };
        let (replies, _requests, watched) = begun.await.map_err(ClientError::repeatable)?;
        Ok(Watch {
            replies,
            _requests,
            watched,
            events: VecDeque::new(),
            failed: false,
        })
    }
}

impl Watch {
    /// How many directories were watched at the beginning.
    pub fn watched(&self) -> u32 {
        self.watched
    }

    /// The next change. Dropping the call loses nothing.
    pub async fn next(&mut self) -> Result<FileEvent, ClientError> {
        poll_fn(|cx| self.poll_event(cx)).await
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<FileEvent, ClientError>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            let frame = ready!(self.replies.poll_next(cx)).map_err(ClientError::repeatable)?;
            if frame.kind == Kind::FILE_EVENTS {
                let events: FileEvents = protocol::decode(&frame)?;
                self.events = events.events.into();
            }
        }
    }
}

/// The same as [`Watch::next`]; ends after an error.
impl Stream for Watch {
    type Item = Result<FileEvent, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_event(cx));
        self.failed = result.is_err();
        Poll::Ready(Some(result))
    }
}
