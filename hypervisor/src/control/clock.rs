//! Waits by the clock on the wall, which somebody may set: a host without a battery begins in the
//! past. Whoever waits looks at the clock again when a wait is over, because setting the clock ends
//! it, too.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, SystemTime};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

/// How long is waited at most where the kernel does not tell that the clock was set.
const BLIND: Duration = Duration::from_secs(60 * 60);

/// Waits until this time, or until the clock is set, whichever is first.
pub(crate) async fn until(at: SystemTime) {
    let Ok(left) = at.duration_since(SystemTime::now()) else {
        return;
    };
    match timer(at) {
        // An error of the wait is that the clock was set, or no worse.
        Ok(timer) => drop(timer.readable().await),
        Err(error) => {
            tracing::warn!(%error, "no timer that tells when the clock is set");
            tokio::time::sleep(left.min(BLIND)).await;
        }
    }
}

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn timer(at: SystemTime) -> std::io::Result<AsyncFd<Timer>> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    // Zero would be no timer at all.
    let since = since.unwrap_or_default().max(Duration::from_nanos(1));
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, flags)?;
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(TimeSpec::from_duration(since)), flags)?;
    // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
    // dropped: nothing here takes it out again.
    unsafe { AsyncFd::register(Timer(timer)) }.map_err(std::io::Error::from)
}

#[cfg(test)]
mod tests {
    use nix::libc;

    use super::*;

    /// Puts the clock forward by so many nanoseconds, which nobody notices.
    fn set_clock(nanoseconds: i64) {
        // SAFETY: a zeroed `timex` is a valid one.
        let mut request: libc::timex = unsafe { std::mem::zeroed() };
        request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        request.time.tv_sec = nanoseconds.div_euclid(1_000_000_000);
        request.time.tv_usec = nanoseconds.rem_euclid(1_000_000_000);
        // SAFETY: the call reads and writes one `timex`, which we own.
        let set = unsafe { libc::adjtimex(&raw mut request) };
        assert!(set >= 0, "{}", std::io::Error::last_os_error());
    }

    #[tokio::test]
    async fn a_wait_ends_at_its_time_and_when_the_clock_is_set() {
        let soon = SystemTime::now() + Duration::from_millis(20);
        until(soon).await;
        assert!(SystemTime::now() >= soon);
        until(SystemTime::UNIX_EPOCH).await;
        let next_year = SystemTime::now() + Duration::from_secs(365 * 86_400);
        let wait = tokio::spawn(until(next_year));
        let quiet = Duration::from_millis(50);
        tokio::time::sleep(quiet).await;
        assert!(!wait.is_finished());
        set_clock(1);
        set_clock(-1);
        let ended = tokio::time::timeout(Duration::from_secs(20), wait).await;
        ended.expect("the wait goes on").unwrap();
    }
}
