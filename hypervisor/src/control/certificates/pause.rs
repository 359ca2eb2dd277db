//! How long no certificate is ordered after orders that failed: longer each time, and kept over
//! restarts, because authorities allow few failures an hour.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::super::store::{read_if_there, write_replacing};

const FIRST: Duration = Duration::from_secs(5 * 60);
const LONGEST: Duration = Duration::from_secs(12 * 60 * 60);

#[derive(Debug)]
pub(super) struct Pause {
    /// Failures and when the pause began, in seconds of Unix time.
    file: PathBuf,
    failures: u32,
    since: SystemTime,
}

impl Pause {
    /// As a control before left it.
    pub(super) fn read(file: PathBuf, now: SystemTime) -> Self {
        // What cannot be read is no pause.
        let text = read_if_there(&file).ok().flatten().unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let read = || {
            let (failures, since) = text.trim().split_once(' ')?;
            let since = Duration::from_secs(since.parse().ok()?);
            Some((
                failures.parse().ok()?,
                SystemTime::UNIX_EPOCH.checked_add(since)?,
            ))
        };
        let (failures, since) = read().unwrap_or((0, now));
        Self {
            file,
            failures,
            since,
        }
    }

    /// Until when; none for now.
    pub(super) fn until(&self, now: SystemTime) -> Option<SystemTime> {
        let factor = 2_u32.saturating_pow(self.failures.checked_sub(1)?.min(16));
        let pause = FIRST.saturating_mul(factor).min(LONGEST);
        let until = self.since.checked_add(pause)?;
        // A clock that was set back does not make it longer.
        (self.since <= now && until > now).then_some(until)
    }

    /// An order is begun: until it goes well it counts as failed, be it that nobody lives to say so.
    pub(super) fn begun(&mut self, now: SystemTime) {
        self.failures = self.failures.saturating_add(1);
        self.failed(now);
    }

    /// An order that was begun has failed: the pause is counted from now on.
    pub(super) fn failed(&mut self, now: SystemTime) {
        self.since = now;
        let since = now.duration_since(SystemTime::UNIX_EPOCH);
        let text = format!(
            "{} {}\n",
            self.failures,
            since.unwrap_or_default().as_secs()
        );
        if let Err(error) = write_replacing(&self.file, text.as_bytes(), 0o600) {
            tracing::warn!(%error, "the pause between orders of certificates is not kept");
        }
    }

    pub(super) fn clear(&mut self) {
        self.failures = 0;
        // There may be none.
        let _ = std::fs::remove_file(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_with_each_failure_and_outlives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pause");
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut pause = Pause::read(file.clone(), start);
        assert_eq!(pause.until(start), None);
        let minutes = |count: u64| Duration::from_secs(count * 60);
        for (failure, expected) in [5, 10, 20, 40, 80, 160, 320, 640, 720, 720]
            .into_iter()
            .enumerate()
        {
            pause.begun(start - minutes(1));
            pause.failed(start);
            assert_eq!(
                pause.until(start),
                Some(start + minutes(expected)),
                "{failure}"
            );
        }
        let again = Pause::read(file.clone(), start);
        assert_eq!(again.until(start), Some(start + minutes(720)));
        assert_eq!(again.until(start + minutes(720)), None);
        assert_eq!(
            again.until(start - minutes(1)),
            None,
            "the clock was set back"
        );
        pause.clear();
        assert_eq!(Pause::read(file.clone(), start).until(start), None);
        std::fs::write(&file, "nonsense").unwrap();
        assert_eq!(Pause::read(file, start).until(start), None);
    }
}
