//! What the streams of one connection share: who the client turned out to be, and how many streams
//! it may have. A stream waits here for the `Hello` of the first one and for a seat.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use protocol::ErrorBody;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::desk::Desk;
use super::gate::Gate;

/// Streams beyond the maximum that yamux takes in, so that each can be told why it is refused.
pub(crate) const SPARE_STREAMS: u32 = 64;

/// The most that a connection's maximum may be: with the spare ones, yamux's usual limit of 512.
pub(crate) const MOST_STREAMS: u32 = 512 - SPARE_STREAMS;

/// How long a stream over the maximum waits for a seat. A client that ends one stream and begins
/// the next is ahead of us by the time our side of the old one takes to notice.
const SEAT_WAIT: Duration = Duration::from_secs(1);

/// How far the connection's greeting has come.
#[derive(Clone, Debug)]
pub(crate) enum Greeting {
    /// No `Hello` yet.
    Awaited,
    /// Control has it.
    Asked,
    /// The client is who its token says.
    Accepted(Arc<str>),
    /// The connection is about to end.
    Refused(ErrorBody),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) desk: Arc<Desk>,
    /// Who it is, for the log.
    pub(crate) peer: String,
    greeting: watch::Sender<Greeting>,
    gate: Gate,
    seats: Arc<Semaphore>,
    standing: AtomicUsize,
    pub(crate) max_streams: u32,
}

impl Session {
    pub(crate) fn new(desk: Arc<Desk>, peer: String, gate: Gate, max_streams: u32) -> Self {
        let seats = usize::try_from(max_streams).unwrap_or(1);
        Self {
            desk,
            peer,
            greeting: watch::Sender::new(Greeting::Awaited),
            gate,
            seats: Arc::new(Semaphore::new(seats)),
            standing: AtomicUsize::new(0),
            max_streams,
        }
    }

    /// Says how far the greeting has come; accepting it lets the client's bytes in.
    pub(crate) fn greet(&self, greeting: Greeting) {
        if matches!(greeting, Greeting::Accepted(_)) {
            self.gate.open();
        }
        self.greeting.send_replace(greeting);
    }

    /// To follow the greeting with.
    pub(crate) fn greeting(&self) -> watch::Receiver<Greeting> {
        self.greeting.subscribe()
    }

    /// Waits until the client is known; gives its token.
    pub(crate) async fn token(&self) -> Result<Arc<str>, ErrorBody> {
        let mut greeting = self.greeting.subscribe();
        loop {
            match &*greeting.borrow_and_update() {
                Greeting::Accepted(token) => return Ok(Arc::clone(token)),
                Greeting::Refused(error) => return Err(error.clone()),
                Greeting::Awaited | Greeting::Asked => {}
            }
            // The sender lives as long as the session.
            let _ = greeting.changed().await;
        }
    }

    /// A place among the open streams; none when there are too many.
    pub(crate) async fn seat(&self) -> Option<OwnedSemaphorePermit> {
        let seats = Arc::clone(&self.seats);
        if let Ok(seat) = Arc::clone(&seats).try_acquire_owned() {
            return Some(seat);
        }
        let _standing = Standing::enter(&self.standing)?;
        match tokio::time::timeout(SEAT_WAIT, seats.acquire_owned()).await {
            Ok(Ok(seat)) => Some(seat),
            _ => None,
        }
    }
}

/// One stream that waits for a seat; half of the spare ones may.
struct Standing<'a>(&'a AtomicUsize);

impl<'a> Standing<'a> {
    fn enter(count: &'a AtomicUsize) -> Option<Self> {
        let before = count.fetch_add(1, Ordering::Relaxed);
        let standing = Self(count);
        (before < SPARE_STREAMS as usize / 2).then_some(standing)
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
