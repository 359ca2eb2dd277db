//! The last steps of a virtual machine, when no process but this one is left: everything mounted is
//! unmounted, the root disk is synced and made read-only, and the power goes off, also where a disk
//! or a file system does not answer.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};

use crate::log;
use crate::system::files;

/// Longest table of mounts that is read.
const MAX_TABLE: usize = 4 << 20;

/// How long the disks may take.
const DISKS: Duration = Duration::from_secs(60);

/// Makes the disks safe and switches the machine off.
pub(crate) fn disks_and_power() -> ! {
    if !within(DISKS, make_safe) {
        log::error(format_args!(
            "event=disks_not_safe reason=\"not done within {} s\"",
            DISKS.as_secs()
        ));
    }
    // On success this does not return.
    let refused: Result<_, Errno> = reboot(RebootMode::RB_POWER_OFF);
    log::error(format_args!("event=power_off_failed error={refused:?}"));
    loop {
        thread::park();
    }
}

/// Does the work in a thread of its own, or here where there can be none; says whether it was done
/// in time.
fn within(limit: Duration, work: fn()) -> bool {
    let (done, is_done) = mpsc::channel();
    let other = thread::Builder::new().spawn(move || {
        work();
        // Whoever waited may have given up.
        let _ = done.send(());
    });
    match other {
        Ok(_) => is_done.recv_timeout(limit).is_ok(),
        Err(_) => {
            work();
            true
        }
    }
}

fn make_safe() {
    // The root first: what a user mounted may never answer.
    let synced = File::open("/").map(nix::unistd::syncfs);
    if !matches!(synced, Ok(Ok(()))) {
        log::warn(format_args!("event=root_not_synced error={synced:?}"));
    }
    // What the user mounted, latest first. Kernel file systems need no unmounting.
    let table = files::read(Path::new("/proc/self/mounts"), MAX_TABLE).unwrap_or_default();
    for place in disk_mounts(&table).into_iter().rev() {
        if let Err(errno) = umount2(place.as_slice(), MntFlags::UMOUNT_NOFOLLOW) {
            log::warn(format_args!(
                "event=not_unmounted place={} error={errno}",
                String::from_utf8_lossy(&place)
            ));
        }
    }
    nix::unistd::sync();
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(errno) = mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>) {
        // Its journal was synced above; the next mount replays it.
        log::warn(format_args!("event=root_not_read_only error={errno}"));
    }
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
    fn a_disk_that_does_not_answer_does_not_keep_the_machine_on() {
        assert!(within(Duration::from_secs(60), || {}));
        assert!(!within(Duration::from_millis(10), || loop {
            thread::park();
        }));
    }

    #[test]
    fn only_what_lies_on_a_device_is_unmounted() {
        let table = b"/dev/root / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/loop0 /mnt/a\\040b ext4 rw 0 0\n";
        assert_eq!(disk_mounts(table), [b"/mnt/a b".to_vec()]);
    }
}
