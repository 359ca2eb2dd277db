//! The wish to stop: set once, by Ctrl-C, and seen by whatever waits. It wakes waiters, it never
//! ends anything itself. It knows what they would put away, for whoever does not wait for them.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Shared by whoever may ask for the end and everyone who waits.
///
/// ```
/// use std::time::Duration;
/// let interrupt = client::patch::Interrupt::default();
/// assert!(interrupt.sleep(Duration::from_millis(1)));
/// interrupt.set();
/// assert!(!interrupt.sleep(Duration::from_secs(3600)));
/// ```
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Default)]
struct State {
    set: bool,
    wakers: Vec<Box<dyn Fn() + Send>>,
    /// Directories that end with what waits.
    rooms: Vec<PathBuf>,
}

impl Interrupt {
    /// Asks everyone to stop. Asking twice is quiet.
    pub fn set(&self) {
        let wakers = {
            let mut state = self.state();
            state.set = true;
            std::mem::take(&mut state.wakers)
        };
        self.0.woken.notify_all();
        for wake in wakers {
            wake();
        }
    }

    /// Whether someone asked.
    pub fn is_set(&self) -> bool {
        self.state().set
    }

    /// Runs `wake` when someone asks; at once when someone already did.
    pub fn on_set(&self, wake: impl Fn() + Send + 'static) {
        let mut state = self.state();
        if state.set {
            drop(state);
            wake();
        } else {
            state.wakers.push(Box::new(wake));
        }
    }

    /// Names a directory that whoever waits would remove in the end.
    pub(super) fn leaves(&self, room: PathBuf) {
        self.state().rooms.push(room);
    }

    /// Removes the temporary files of everyone who waits: for whoever ends the program without waiting
    /// for them.
    pub fn clear_up(&self) {
        let rooms = std::mem::take(&mut self.state().rooms);
        for room in rooms {
            // Somebody may be writing there in this moment; the second time there is less to do.
            if std::fs::remove_dir_all(&room).is_err() {
                let _ = std::fs::remove_dir_all(&room);
            }
        }
    }

    /// Sleeps; false when the sleep was cut short.
    pub fn sleep(&self, time: Duration) -> bool {
        let end = Instant::now().checked_add(time);
        let mut state = self.state();
        while !state.set {
            let left = match end {
                Some(end) => end.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if left.is_zero() {
                return true;
            }
            state = match self.0.woken.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        false
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
