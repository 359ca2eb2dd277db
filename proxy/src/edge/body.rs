//! Bodies on their way through: chunk by chunk, each as it comes, with back-pressure from the
//! receiver. Nothing here holds more than the chunk in hand.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::task::AtomicWaker;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::headers;
use super::pool::Lease;
use super::service::InFlight;

const SHUT: u8 = 0;
const OPEN: u8 = 1;
const GIVEN_UP: u8 = 2;

/// Holds a body back until the guest asks for it (`Expect: 100-continue`).
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: AtomicU8,
    waker: AtomicWaker,
}

impl Gate {
    /// Lets the body go.
    pub(crate) fn open(&self) {
        self.set(OPEN);
    }

    /// Ends a body that was never asked for.
    fn give_up(&self) {
        self.set(GIVEN_UP);
    }

    fn set(&self, to: u8) {
        let _ = self
            .state
            .compare_exchange(SHUT, to, Ordering::AcqRel, Ordering::Acquire);
        self.waker.wake();
    }
}

/// A request's body, from visitor to guest.
#[derive(Debug)]
pub(crate) struct Upload {
    inner: Option<Incoming>,
    gate: Option<Arc<Gate>>,
}

/// Why a request's body did not go through.
#[derive(Debug)]
pub(crate) enum UploadError {
    /// The visitor ended it.
    Visitor(hyper::Error),
    /// The guest answered without asking for it.
    Unwanted,
}

impl fmt::Display for UploadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Visitor(error) => write!(formatter, "the visitor's body ended: {error}"),
            Self::Unwanted => formatter.write_str("the guest did not ask for the body"),
        }
    }
}

impl Error for UploadError {}

impl Upload {
    pub(crate) fn new(inner: Incoming) -> Self {
        Self {
            inner: (!inner.is_end_stream()).then_some(inner),
            gate: None,
        }
    }

    pub(crate) fn empty() -> Self {
        Self {
            inner: None,
            gate: None,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inner.is_none()
    }

    /// Holds the body back until the gate opens.
    pub(crate) fn gated(mut self, gate: Arc<Gate>) -> Self {
        self.gate = Some(gate);
        self
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        if let Some(gate) = &self.gate {
            gate.waker.register(cx.waker());
            match gate.state.load(Ordering::Acquire) {
                SHUT => return Poll::Pending,
                OPEN => self.gate = None,
                _ => return Poll::Ready(Some(Err(UploadError::Unwanted))),
            }
        }
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(inner).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            let mut frame = frame.map_err(UploadError::Visitor)?;
            if let Some(trailers) = frame.trailers_mut() {
                headers::trailers_to_guest(trailers);
            }
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
    }
}

/// An answer's body, from the guest or the edge itself to the visitor.
#[derive(Debug)]
pub(crate) struct Answer {
    content: Content,
    keep: Option<Box<Keep>>,
}

#[derive(Debug)]
enum Content {
    Whole(Option<Bytes>),
    Streamed(Incoming),
}

/// What lasts as long as an answer.
#[derive(Debug, Default)]
pub(crate) struct Keep {
    request: Option<InFlight>,
    lease: Option<Lease>,
    gate: Option<Arc<Gate>>,
}

impl Keep {
    /// Keeps the connection to the guest, to be used again when the answer has ended well, and a
    /// body that may never be asked for.
    pub(crate) fn new(lease: Option<Lease>, gate: Option<Arc<Gate>>) -> Self {
        Self {
            request: None,
            lease,
            gate,
        }
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            gate.give_up();
        }
    }
}

impl Answer {
    /// Of the edge itself.
    pub(crate) fn whole(bytes: Bytes) -> Self {
        Self {
            content: Content::Whole(Some(bytes).filter(|bytes| !bytes.is_empty())),
            keep: None,
        }
    }

    /// Of the guest.
    pub(crate) fn streamed(inner: Incoming) -> Self {
        Self {
            content: Content::Streamed(inner),
            keep: None,
        }
    }

    /// Keeps something until the answer has ended.
    pub(crate) fn keeping(mut self, keep: Keep) -> Self {
        self.keep = Some(Box::new(keep));
        self.end_if_over();
        self
    }

    /// Keeps the request in flight until the answer has ended.
    pub(crate) fn hold(&mut self, request: InFlight) {
        self.keep.get_or_insert_default().request = Some(request);
    }

    /// hyper does not ask again for what says it is over.
    fn end_if_over(&mut self) {
        let over = match &self.content {
            Content::Whole(_) => false,
            Content::Streamed(inner) => inner.is_end_stream(),
        };
        if over {
            self.end();
        }
    }

    fn end(&mut self) {
        if let Some(keep) = &mut self.keep
            && let Some(lease) = keep.lease.take()
        {
            lease.give_back();
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let inner = match &mut self.content {
            Content::Whole(bytes) => {
                return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes))));
            }
            Content::Streamed(inner) => inner,
        };
        match ready!(Pin::new(inner).poll_frame(cx)) {
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    headers::to_visitor(trailers);
                }
                self.end_if_over();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.keep = None;
                Poll::Ready(Some(Err(error)))
            }
            None => {
                self.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.is_none(),
            Content::Streamed(inner) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Content::Streamed(inner) => inner.size_hint(),
        }
    }
}
