//! The file systems of the appliance: the kernel's own at the start, the disks when they appear,
//! and all of them away again at the end.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A file system could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {what} at {at}: {cause}")]
pub(super) struct MountError {
    what: String,
    at: String,
    cause: io::Error,
}

/// Mounts `what`, a device or a name, at `at`, which is made when missing.
pub(super) fn mount_at(
    what: &str,
    at: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), MountError> {
    let failed = |cause: io::Error| MountError {
        what: format!("{what} ({kind})"),
        at: at.to_owned(),
        cause,
    };
    fs::create_dir_all(at).map_err(failed)?;
    mount(Some(what), at, Some(kind), flags, Some(options)).map_err(|error| failed(error.into()))
}

/// Mounts what the kernel offers. What fails is told; the rest is mounted all the same.
pub(super) fn mount_kernel() -> Vec<MountError> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let devices = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let files = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let table = [
        ("proc", "/proc", "proc", plain, ""),
        ("sysfs", "/sys", "sysfs", plain, ""),
        ("devtmpfs", "/dev", "devtmpfs", devices, "mode=0755"),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            devices,
            "mode=0620,ptmxmode=0666",
        ),
        ("run", "/run", "tmpfs", files, "mode=0755"),
        ("tmp", "/tmp", "tmpfs", files, "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", plain, ""),
    ];
    let failed = table
        .into_iter()
        .filter_map(|(what, at, kind, flags, options)| {
            mount_at(what, at, kind, flags, options).err()
        });
    failed.collect()
}

/// Writes everything out and takes the disks away.
pub(super) fn unmount_disks() {
    nix::unistd::sync();
    for at in ["/system", "/data"] {
        if !is_mounted(at) {
            continue;
        }
        if let Err(error) = umount2(at, MntFlags::empty()) {
            tracing::warn!(at, %error, "still in use; making it read-only");
            let again = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            if let Err(error) = mount(None::<&str>, at, None::<&str>, again, None::<&str>) {
                tracing::error!(at, %error, "not unmounted");
            }
        }
    }
    nix::unistd::sync();
}

/// Whether something is mounted there.
pub(super) fn is_mounted(at: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    match (device(Path::new(at)), device(Path::new("/"))) {
        (Ok(there), Ok(here)) => there != here,
        _ => false,
    }
}
