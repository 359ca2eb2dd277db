//! The last steps of a virtual machine, when no process but this one is left: everything mounted is
//! unmounted, the root disk is synced and made read-only, and the power goes off. A disk that does not
//! answer must not keep the machine on: every step has a deadline, and the others come nevertheless.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::stat::Mode;
use nix::unistd::syncfs;

use crate::log;
use crate::system::files;

/// Longest table of mounts that is read.
const MAX_TABLE: usize = 4 << 20;
/// The stack of a thread that waits for a disk.
const STACK: usize = 128 << 10;

/// How long all disks may take to store what they have not yet: a slow one with much to do is no
/// broken one.
const SYNC: Duration = Duration::from_secs(60);
/// How long what is mounted may take to be unmounted, each and together.
const UNMOUNT: Duration = Duration::from_secs(3);
const UNMOUNT_ALL: Duration = Duration::from_secs(6);
/// How long the root disk may take to become read-only.
const ROOT: Duration = Duration::from_secs(4);

/// Makes the disks safe, as far as they answer in time, and switches the machine off.
pub(crate) fn disks_and_power() -> ! {
    sync();
    // What the user mounted, latest first. Kernel file systems need no unmounting.
    let table = files::read(Path::new("/proc/self/mounts"), MAX_TABLE).unwrap_or_default();
    let now = Instant::now();
    let deadline = now.checked_add(UNMOUNT_ALL).unwrap_or(now);
    for place in disk_mounts(&table).into_iter().rev() {
        let left = deadline.saturating_duration_since(Instant::now());
        within("unmount", UNMOUNT.min(left), move || unmount(&place));
    }
    within("make_root_read_only", ROOT, make_root_read_only);
    power_off()
}

/// Stores what the disks do not have yet, if they answer in time.
pub(super) fn sync() {
    within("sync", SYNC, nix::unistd::sync);
}

/// Switches the machine off as it is.
pub(super) fn power_off() -> ! {
    // On success this does not return; without it there is nothing better than to stay.
    let refused: Result<_, Errno> = reboot(RebootMode::RB_POWER_OFF);
    log::error(format_args!("event=power_off_failed error={refused:?}"));
    loop {
        std::thread::park();
    }
}

fn unmount(place: &[u8]) {
    if let Err(errno) = umount2(place, MntFlags::UMOUNT_NOFOLLOW) {
        log::warn(format_args!(
            "event=not_unmounted place={} error={errno}",
            String::from_utf8_lossy(place)
        ));
    }
}

fn make_root_read_only() {
    // Another disk may have held up the sync of all.
    let synced = open("/", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).and_then(syncfs);
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let mounted = mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>);
    if let Err(errno) = synced.and(mounted) {
        // Its journal was synced above; the next mount replays it.
        log::warn(format_args!("event=root_not_read_only error={errno}"));
    }
}

/// Does something that a disk which does not answer may hold up for ever, on a thread that is then
/// left to itself. Whether it was done in time.
fn within(what: &'static str, limit: Duration, work: impl Fn() + Send + Sync + 'static) -> bool {
    let work = Arc::new(work);
    let (done, ended) = mpsc::sync_channel(1);
    let theirs = Arc::clone(&work);
    let started = std::thread::Builder::new()
        .name(what.to_owned())
        .stack_size(STACK)
        .spawn(move || {
            theirs();
            // Nobody may be waiting any more.
            let _ = done.send(());
        });
    if let Err(error) = started {
        log::warn(format_args!("event=no_deadline what={what} error={error}"));
        work();
        return true;
    }
    let in_time = ended.recv_timeout(limit).is_ok();
    if !in_time {
        log::warn(format_args!(
            "event=disk_not_safe what={what} waited_ms={}",
            limit.as_millis()
        ));
    }
    in_time
}

/// Where the table of mounts says that something on a device is mounted, except the root.
fn disk_mounts(table: &[u8]) -> Vec<Vec<u8>> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let source = fields.next()?;
            let place = unescape(fields.next()?);
            (source.starts_with(b"/dev/") && place != b"/").then_some(place)
        })
        .collect()
}

/// The table writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let code = after.first_chunk::<3>().filter(|_| *first == b'\\');
        match code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok())
        {
            Some(byte) => {
                plain.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_answer_holds_up_nothing_behind_it() {
        let (_never, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let hangs = move || {
            let _ = wait.lock().unwrap().recv();
        };
        assert!(!within("hangs", Duration::from_millis(20), hangs));
        let (done, seen) = mpsc::sync_channel(1);
        let works = move || done.send(()).unwrap();
        assert!(within("works", Duration::from_secs(60), works));
        seen.try_recv().unwrap();
        let panics = || panic!("injected");
        assert!(!within("panics", Duration::from_secs(60), panics));
    }

    #[test]
    fn only_what_lies_on_a_device_is_unmounted() {
        let table = b"/dev/root / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/loop0 /mnt/a\\040b ext4 rw 0 0\n";
        assert_eq!(disk_mounts(table), [b"/mnt/a b".to_vec()]);
    }
}
