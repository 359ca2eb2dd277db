//! The appliance's serial console, as QEMU writes it into a file. Waits here are woken by the file
//! growing (inotify) and end at a deadline; nothing looks at the file on a tick.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// How much of the console a failure shows.
const TAIL: u64 = 6 << 10;

/// Why the console did not say what was waited for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    /// The file cannot be watched or read.
    #[error("console log {}: {cause}", path.display())]
    Io {
        /// The log.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The time was up.
    #[error("the console did not show {wanted} in time")]
    Deadline {
        /// What was waited for.
        wanted: &'static str,
    },
}

/// The log of one boot.
#[derive(Clone, Debug)]
pub(crate) struct Console {
    path: PathBuf,
}

impl Console {
    /// The console whose log is at `path`.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The log's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All that was written so far.
    pub(crate) fn text(&self) -> Result<String, ConsoleError> {
        let bytes = std::fs::read(&self.path).map_err(|cause| self.io(cause))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last few KiB, for a failure; what went wrong instead when they cannot be read.
    pub(crate) fn tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
        };
        read().unwrap_or_else(|cause| format!("(console log {}: {cause})", self.path.display()))
    }

    /// Waits until `find` finds something in the log's text.
    pub(crate) async fn wait_for<T>(
        &self,
        wanted: &'static str,
        deadline: Instant,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<T, ConsoleError> {
        let growth = Growth::watch(&self.path).map_err(|cause| self.io(cause))?;
        loop {
            if let Some(found) = find(&self.text()?) {
                return Ok(found);
            }
            timeout_at(deadline, growth.next())
                .await
                .map_err(|_| ConsoleError::Deadline { wanted })?
                .map_err(|cause| self.io(cause))?;
        }
    }

    fn io(&self, cause: io::Error) -> ConsoleError {
        ConsoleError::Io {
            path: self.path.clone(),
            cause,
        }
    }
}

/// Says when a file was written to, or when something was made in a directory.
pub(crate) struct Growth {
    inotify: AsyncFd<Watch>,
}

struct Watch(Inotify);

impl std::os::fd::AsRawFd for Watch {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Growth {
    /// Begins to watch.
    pub(crate) fn watch(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let changes = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE;
        inotify.add_watch(path, changes)?;
        // SAFETY: the registration owns the descriptor, which stays the same and open in it.
        let inotify =
            unsafe { AsyncFd::register_with_interest(Watch(inotify), Interest::READABLE) }?;
        Ok(Self { inotify })
    }

    /// Returns after the next change, or at once when there was one since the last call.
    pub(crate) async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let read = ready.try_io(|watch| Ok(watch.get_ref().0.read_events()?));
            match read {
                Ok(events) => return events.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

/// The fingerprint in the line with which control shows its certificate authority.
pub(crate) fn authority_fingerprint(text: &str) -> Option<[u8; 32]> {
    const MARK: &str = "certificate authority sha256:";
    // The last one counts: the log may span a restart of control.
    let start = text.rfind(MARK)? + MARK.len();
    let digits = text.get(start..start.checked_add(64)?)?;
    // A line still being written would end in the middle of the digits; what follows proves that
    // it does not, and that there are no more of them.
    let next = text.get(start + 64..)?.chars().next()?;
    if next.is_ascii_hexdigit() {
        return None;
    }
    let bytes = HEXLOWER.decode(digits.as_bytes()).ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_fingerprint_is_read_only_from_a_whole_line() {
        let hex = "0123456789abcdef".repeat(4);
        let line = format!("x INFO certificate authority sha256:{hex}\r\n");
        let expected: [u8; 32] = HEXLOWER.decode(hex.as_bytes()).unwrap().try_into().unwrap();
        assert_eq!(authority_fingerprint(&line), Some(expected));
        for end in 0..line.len() - 2 {
            assert_eq!(authority_fingerprint(&line[..end]), None, "{end}");
        }
        assert_eq!(authority_fingerprint(&line.replace("ab", "zz")), None);
        let longer = line.replace("\r\n", "0\r\n");
        assert_eq!(authority_fingerprint(&longer), None);
    }

    #[tokio::test]
    async fn a_wait_is_woken_by_what_is_written_and_ends_at_its_deadline() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let console = Console::new(file.path());
        let find = |text: &str| text.contains("ready").then_some(());
        let soon = Instant::now() + Duration::from_millis(50);
        assert!(matches!(
            console.wait_for("ready", soon, find).await,
            Err(ConsoleError::Deadline { .. })
        ));
        let mut writer = file.reopen().unwrap();
        let later = Instant::now() + Duration::from_secs(60);
        let waiting = tokio::spawn(async move { console.wait_for("ready", later, find).await });
        tokio::task::yield_now().await;
        writer.write_all(b"rea").unwrap();
        writer.write_all(b"dy\n").unwrap();
        waiting.await.unwrap().unwrap();
    }
}
