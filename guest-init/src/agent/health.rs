//! How the machine does, in one message. Everything is read anew at each question; nothing is
//! watched in between.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use nix::time::{ClockId, clock_gettime};
use protocol::agent::HealthReport;

use super::Agent;

/// Longest file of the kernel that is read here.
const MAX_FILE: usize = 16 << 10;

/// Asks the kernel. What it does not say is zero.
pub(super) fn report(agent: &Agent) -> HealthReport {
    let proc = agent.proc.as_fd();
    let memory = read(proc, "meminfo").unwrap_or_default();
    let load = read(proc, "loadavg").unwrap_or_default();
    let disk = statvfs("/").ok();
    let blocks = |count: u64| {
        let size = disk.as_ref().map_or(0, |disk| disk.fragment_size());
        count.saturating_mul(size)
    };
    HealthReport {
        uptime_ms: uptime_ms().unwrap_or(0),
        load_milli: load_milli(&load),
        memory_bytes: kib(&memory, "MemTotal:"),
        memory_available_bytes: kib(&memory, "MemAvailable:"),
        disk_bytes: blocks(disk.as_ref().map_or(0, |disk| disk.blocks())),
        disk_available_bytes: blocks(disk.as_ref().map_or(0, |disk| disk.blocks_available())),
        disk_free_files: disk.as_ref().map_or(0, |disk| disk.files_available()),
        processes: processes(proc).unwrap_or(0),
        unix_ns: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|time| u64::try_from(time.as_nanos()).ok())
            .unwrap_or(0),
        agent_bytes: kib(&read(proc, "self/status").unwrap_or_default(), "VmRSS:"),
        streams: u32::try_from(agent.streams.load(Ordering::Acquire)).unwrap_or(u32::MAX),
    }
}

/// A file of the kernel's, whatever is mounted over /proc.
fn read(proc: BorrowedFd<'_>, name: &str) -> Result<String, Errno> {
    let file = openat(
        proc,
        name,
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut bytes = vec![0; MAX_FILE];
    let mut filled: usize = 0;
    loop {
        let room = bytes.get_mut(filled..).unwrap_or_default();
        match nix::unistd::read(&file, room) {
            Ok(0) => break,
            Ok(count) => filled = filled.saturating_add(count),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    bytes.truncate(filled);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn uptime_ms() -> Option<u64> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
    let seconds = u64::try_from(time.tv_sec()).ok()?;
    let nanos = u64::try_from(time.tv_nsec()).ok()?;
    seconds.checked_mul(1000)?.checked_add(nanos / 1_000_000)
}

/// A line `key  123 kB` in bytes.
fn kib(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// `0.52 1.00 12.34 1/200 4711` in thousandths.
fn load_milli(text: &str) -> [u32; 3] {
    let mut words = text.split_ascii_whitespace();
    [(); 3].map(|()| {
        let word = words.next().unwrap_or_default();
        let (whole, fraction) = word.split_once('.').unwrap_or((word, ""));
        let whole: u32 = whole.parse().unwrap_or(0);
        let fraction: String = fraction.chars().chain("000".chars()).take(3).collect();
        let fraction: u32 = fraction.parse().unwrap_or(0);
        whole.saturating_mul(1000).saturating_add(fraction)
    })
}

/// Processes of users: those that have memory of their own.
fn processes(proc: BorrowedFd<'_>) -> Result<u32, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = openat(proc, ".", flags, Mode::empty())?;
    let mut entries = super::file::Entries::new(directory);
    let mut count: u32 = 0;
    while let Some(name) = entries.next_number()? {
        // The kernel's own threads have an empty list of pages.
        let pages = read(proc, &format!("{name}/statm")).unwrap_or_default();
        if !pages.is_empty() && !pages.starts_with("0 ") {
            count = count.saturating_add(1);
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        assert_eq!(
            load_milli("0.52 1.00 12.3 1/200 4711\n"),
            [520, 1000, 12_300]
        );
        assert_eq!(load_milli(""), [0; 3]);
        let text = "MemTotal:       16 kB\nMemAvailable:   3 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), 3072);
        assert_eq!(kib(text, "Nothing:"), 0);
    }
}
