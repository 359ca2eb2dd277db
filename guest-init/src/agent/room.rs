//! Room for long frames that have not come whole yet. A frame of the size that bulk data has needs no
//! room of its own; a longer one takes one of a few places, so that a client which begins one on every
//! stream there is and ends none of them does not take the machine's memory. Nobody waits for anybody.

use std::sync::atomic::{AtomicUsize, Ordering};

use protocol::frame::MAX_DATA;
use protocol::{ErrorBody, ErrorCode};

/// Long frames that may be under way at once.
const MAX_LONG: usize = 8;
/// So much of a frame every stream may hold.
const FREE: usize = MAX_DATA;

static LONG: AtomicUsize = AtomicUsize::new(0);

/// There is no place for one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_LONG} frames over {FREE} bytes are under way on other streams; send this one again when \
     one of them has come"
)]
pub(crate) struct Crowded;

impl From<Crowded> for ErrorBody {
    fn from(error: Crowded) -> Self {
        Self::caller(ErrorCode::TooManyLongFrames, error.to_string()).retryable_after_ms(1000)
    }
}

/// One of the places, or none.
#[derive(Debug, Default)]
pub(crate) struct Room {
    taken: bool,
}

impl Room {
    /// So many bytes of a frame are held: takes a place when they are many, and gives it back.
    pub(crate) fn hold(&mut self, bytes: usize) -> Result<(), Crowded> {
        if bytes <= FREE {
            self.give_back();
        } else if !self.taken {
            let add = |count: usize| count.checked_add(1).filter(|count| *count <= MAX_LONG);
            LONG.fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
                .map_err(|_| Crowded)?;
            self.taken = true;
        }
        Ok(())
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.taken) {
            LONG.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.give_back();
    }
}
