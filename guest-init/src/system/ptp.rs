//! The host's clock as the guest sees it, the kernel's "KVM virtual PTP" device, and the corrections
//! of the guest's own clock by it. Says what is and does what it is told; when to do what is decided
//! in `agent::clock`.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};

/// What the kernel calls the host's clock.
const NAME: &str = "KVM virtual PTP";
/// Comparisons of which the quickest counts: any of them may have been interrupted.
const ATTEMPTS: usize = 5;

/// Why the clock cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PtpError {
    /// A system call failed.
    #[error("cannot {what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// The device cannot be opened.
    #[error("cannot open {path}: {errno}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// A clock is at no time that there is.
    #[error("a clock says that it is {0:?}")]
    Time(TimeSpec),
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> PtpError {
    move |errno| PtpError::System { what, errno }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The time has passed.
    Due,
    /// Somebody has set the clock.
    ClockSet,
}

/// The file of the host's clock, if this machine has one. `sys` is where the kernel shows devices.
pub(crate) fn find(sys: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(sys.join("class/ptp")).ok()?;
    let is_host = |name: String| name.trim_end() == NAME;
    entries
        .filter_map(Result::ok)
        .find(|one| fs::read_to_string(one.path().join("clock_name")).is_ok_and(is_host))
        .map(|one| Path::new("/dev").join(one.file_name()))
}

/// The host's clock, the guest's, and a timer that ends early when somebody sets the guest's.
pub(crate) struct HostClock {
    device: OwnedFd,
    timer: TimerFd,
}

impl HostClock {
    pub(crate) fn open(path: &Path) -> Result<Self, PtpError> {
        let device = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let timer = TimerFd::new(timerfd::ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC);
        Ok(Self {
            device: device.map_err(|errno| PtpError::Open {
                path: path.to_owned(),
                errno,
            })?,
            timer: timer.map_err(system("make a timer"))?,
        })
    }

    /// By how many nanoseconds the host's clock is ahead of the guest's.
    pub(crate) fn offset(&self) -> Result<i64, PtpError> {
        // The clock behind a descriptor has its number as the kernel's `FD_TO_CLOCKID` makes it.
        let host = ClockId::from_raw((!self.device.as_raw_fd() << 3) | 3);
        let mut samples = [(0, 0, 0); ATTEMPTS];
        for sample in &mut samples {
            *sample = (
                now(ClockId::CLOCK_REALTIME)?,
                now(host)?,
                now(ClockId::CLOCK_REALTIME)?,
            );
        }
        Ok(offset_of(&samples))
    }

    /// Lets the clock go faster or slower, by 500 parts in a million, until it has made good so many
    /// microseconds. Takes the place of an earlier request; setting the clock ends it.
    pub(crate) fn slew(&self, microseconds: i64) -> Result<(), PtpError> {
        let mut request = timex();
        request.modes = libc::ADJ_OFFSET_SINGLESHOT;
        request.offset = microseconds;
        adjust(&mut request).map_err(system("slew the clock"))
    }

    /// Puts the clock forward by so many nanoseconds.
    pub(crate) fn step(&self, nanoseconds: i64) -> Result<(), PtpError> {
        let mut request = timex();
        request.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        request.time.tv_sec = nanoseconds.div_euclid(1_000_000_000);
        // Nanoseconds: that is what `ADJ_NANO` means.
        request.time.tv_usec = nanoseconds.rem_euclid(1_000_000_000);
        adjust(&mut request).map_err(system("step the clock"))
    }

    /// Begins a wait, and says whether somebody has set the clock since the last one ended. From here
    /// on nobody sets it unnoticed.
    pub(crate) fn arm(&self, after: Duration) -> Result<bool, PtpError> {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).map_err(system("read the clock"))?;
        let at = TimeSpec::from_duration(Duration::from(now).saturating_add(after));
        let flags =
            TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        match self.timer.set(Expiration::OneShot(at), flags) {
            Ok(()) => Ok(false),
            // The timer is set all the same.
            Err(Errno::ECANCELED) => Ok(true),
            Err(errno) => Err(system("set a timer")(errno)),
        }
    }

    /// Waits for the end of what [`arm`](Self::arm) began.
    pub(crate) fn wait(&self) -> Result<Woken, PtpError> {
        let mut count = [0; 8];
        loop {
            match nix::unistd::read(&self.timer, &mut count) {
                Ok(_) => return Ok(Woken::Due),
                Err(Errno::ECANCELED) => return Ok(Woken::ClockSet),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(system("wait for a timer")(errno)),
            }
        }
    }
}

/// The offset from readings of the guest's clock, the host's, and the guest's again.
fn offset_of(samples: &[(i64, i64, i64)]) -> i64 {
    let offset = |(before, host, after): (i64, i64, i64)| {
        let between = before.saturating_add(after.saturating_sub(before) / 2);
        host.saturating_sub(between)
    };
    samples
        .iter()
        .copied()
        // The clock may also have been set back between two readings.
        .min_by_key(|(before, _, after)| after.saturating_sub(*before).unsigned_abs())
        .map_or(0, offset)
}

/// What a clock says, in nanoseconds.
fn now(clock: ClockId) -> Result<i64, PtpError> {
    let time = clock_gettime(clock).map_err(system("read a clock"))?;
    time.tv_sec()
        .checked_mul(1_000_000_000)
        .and_then(|seconds| seconds.checked_add(time.tv_nsec()))
        .ok_or(PtpError::Time(time))
}

fn timex() -> libc::timex {
    // SAFETY: all zeroes is a valid value of this plain structure.
    unsafe { std::mem::zeroed() }
}

fn adjust(request: &mut libc::timex) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes one `timex`, which lives across the call.
    Errno::result(unsafe { libc::adjtimex(request) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_clock_is_told_from_a_network_cards() {
        let sys = tempfile::tempdir().unwrap();
        assert_eq!(find(sys.path()), None);
        for (name, clock) in [
            ("ptp0", "ena-ptp-05\n"),
            ("ptp1", "KVM virtual PTP\n"),
            ("ptp2", "ena-ptp-06\n"),
        ] {
            let directory = sys.path().join("class/ptp").join(name);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("clock_name"), clock).unwrap();
        }
        assert_eq!(find(sys.path()), Some(PathBuf::from("/dev/ptp1")));
    }

    #[test]
    fn a_comparison_that_was_interrupted_does_not_count() {
        let samples = [
            (1000, 1_000_000, 900_000),
            (2000, 2550, 2100),
            (3000, 3900, 3900),
        ];
        assert_eq!(offset_of(&samples), 500);
        assert_eq!(offset_of(&[(i64::MAX, i64::MIN, 0)]), i64::MIN);
        assert_eq!(offset_of(&[]), 0);
    }

    #[test]
    fn a_device_that_is_no_clock_is_an_error_and_a_wait_ends_with_its_time() {
        // The device is anything that can be opened; the timer is real.
        let clock = HostClock::open(Path::new("/dev/null")).unwrap();
        assert!(matches!(clock.offset(), Err(PtpError::System { .. })));
        assert!(!clock.arm(Duration::from_millis(1)).unwrap());
        assert_eq!(clock.wait().unwrap(), Woken::Due);
    }
}
