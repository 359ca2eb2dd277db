//! What a connection is doing: nothing, sending a request's head, or having requests answered. From
//! this follows how long it may go on. A body, an answer and a WebSocket may take as long as they
//! like; a head may not, and neither may silence.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// One connection's activity.
#[derive(Debug)]
pub(crate) struct Activity {
    /// A head may come in while requests are answered, as by HTTP/2. Otherwise it is one that came
    /// early, whose time has not begun.
    interleaved: bool,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Requests that are being answered.
    busy: u32,
    /// Since when a head has been coming in.
    head_since: Option<Instant>,
    /// When something last happened.
    last: Instant,
    answered: u64,
    cancelled: u64,
    /// Whether the watcher waits for a change rather than for a deadline.
    parked: bool,
}

/// Why a connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// No request for long.
    Idle,
    /// A head that takes too long.
    SlowHead,
    /// Requests that are given up again and again.
    Abuse,
}

/// What [`Activity::watch`] goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) head: Duration,
    pub(crate) idle: Duration,
    pub(crate) cancelled: u32,
}

impl Activity {
    pub(crate) fn new(interleaved: bool) -> Self {
        Self {
            interleaved,
            state: Mutex::new(State {
                busy: 0,
                head_since: None,
                last: Instant::now(),
                answered: 0,
                cancelled: 0,
                parked: false,
            }),
            changed: Notify::new(),
        }
    }

    /// A part of a head is there and the rest is not.
    pub(crate) fn head_began(&self) {
        let mut state = self.lock();
        if state.head_since.is_none() {
            state.head_since = Some(Instant::now());
            drop(state);
            self.changed.notify_one();
        }
    }

    /// The head is complete.
    pub(crate) fn head_ended(&self) {
        let mut state = self.lock();
        state.head_since = None;
        state.last = Instant::now();
    }

    /// Bytes of an answer went out.
    pub(crate) fn wrote(&self) {
        self.lock().last = Instant::now();
    }

    /// A request is being answered from now on.
    pub(crate) fn request_began(&self) {
        let mut state = self.lock();
        state.busy = state.busy.saturating_add(1);
    }

    /// A request is done with; `answered` says whether its answer began.
    pub(crate) fn request_ended(&self, answered: bool) {
        let mut state = self.lock();
        state.busy = state.busy.saturating_sub(1);
        state.last = Instant::now();
        if !self.interleaved {
            // The time of a head that came early begins now.
            state.head_since = state.head_since.map(|_| Instant::now());
        }
        if answered {
            state.answered = state.answered.saturating_add(1);
        } else {
            state.cancelled = state.cancelled.saturating_add(1);
        }
        if state.parked || !answered {
            state.parked = false;
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Resolves when the connection has to end.
    pub(crate) async fn watch(&self, patience: Patience) -> End {
        loop {
            let (deadline, end) = {
                let mut state = self.lock();
                if state.cancelled >= u64::from(patience.cancelled)
                    && state.cancelled > state.answered
                {
                    return End::Abuse;
                }
                let since = |start: Instant, limit| start.checked_add(limit);
                state.parked = false;
                let head = state
                    .head_since
                    .filter(|_| self.interleaved || state.busy == 0);
                if let Some(start) = head {
                    (since(start, patience.head), End::SlowHead)
                } else if state.busy > 0 {
                    state.parked = true;
                    (None, End::Idle)
                } else {
                    (since(state.last, patience.idle), End::Idle)
                }
            };
            match deadline {
                Some(deadline) if deadline <= Instant::now() => return end,
                Some(deadline) => {
                    tokio::select! {
                        () = self.changed.notified() => {}
                        () = tokio::time::sleep_until(deadline) => {}
                    }
                }
                None => self.changed.notified().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
