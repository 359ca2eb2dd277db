//! Who may have large buffers. A few streams at once get room for speed; the others work with as
//! little as serves them, so that a client which opens every stream there is and reads none of them
//! does not take the machine's memory. Nobody waits for anybody.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Streams with large buffers at once.
const MAX_LARGE: usize = 16;

static LARGE: AtomicUsize = AtomicUsize::new(0);

/// One of the places for streams with large buffers, or none of them.
#[derive(Debug)]
pub(super) struct Budget {
    large: bool,
}

impl Budget {
    /// Takes a place if there is one.
    pub(super) fn take() -> Self {
        let add = |count: usize| count.checked_add(1).filter(|count| *count <= MAX_LARGE);
        let taken = LARGE.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        Self {
            large: taken.is_ok(),
        }
    }

    /// How much this stream gets.
    pub(super) fn choose(&self, large: usize, small: usize) -> usize {
        if self.large { large } else { small }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        if self.large {
            LARGE.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_have_large_buffers_and_places_come_back() {
        // Other tests of this process may have some, too.
        let all: Vec<_> = (0..100).map(|_| Budget::take()).collect();
        let large = all.iter().map(|one| one.choose(1, 0)).sum::<usize>();
        assert!(large <= MAX_LARGE);
        drop(all);
        let again = (0..1000).any(|_| {
            std::thread::yield_now();
            Budget::take().choose(1, 0) == 1
        });
        assert!(again);
    }
}
