//! The mounts of a virtual machine: a /dev to find the disk with, the disk as root, and what
//! programs expect in it. After [`enter_root`] every path is one of the user's, which is why what
//! the agent needs later it opens here and in time.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::log;

const NEW_ROOT: &str = "/newroot";

/// Why a mount is missing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// The kernel refused.
    #[error("cannot mount {what} at {place}: {errno}")]
    Refused {
        /// The file system or device.
        what: String,
        /// Where.
        place: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// The directory cannot be made.
    #[error("cannot make directory {place}: {cause}")]
    Directory {
        /// Which one.
        place: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// The disk cannot become the root.
    #[error("cannot enter the root file system ({step}): {errno}")]
    Enter {
        /// At which step.
        step: &'static str,
        /// Why not.
        errno: Errno,
    },
}

struct Mount {
    kind: &'static str,
    place: &'static str,
    flags: MsFlags,
    options: &'static str,
    /// Whether the machine is of no use without it.
    needed: bool,
}

/// No programs, devices or changed users in it.
const STRICT: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

const LATE: [Mount; 8] = [
    Mount {
        kind: "proc",
        place: "/proc",
        flags: STRICT,
        options: "",
        needed: true,
    },
    Mount {
        kind: "sysfs",
        place: "/sys",
        flags: STRICT,
        options: "",
        needed: true,
    },
    Mount {
        kind: "devtmpfs",
        place: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
        needed: true,
    },
    Mount {
        kind: "devpts",
        place: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0620,gid=5,ptmxmode=0666",
        needed: false,
    },
    Mount {
        kind: "tmpfs",
        place: "/dev/shm",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        options: "mode=1777",
        needed: false,
    },
    Mount {
        kind: "mqueue",
        place: "/dev/mqueue",
        flags: STRICT,
        options: "",
        needed: false,
    },
    Mount {
        kind: "tmpfs",
        place: "/run",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        options: "mode=0755",
        needed: false,
    },
    Mount {
        kind: "cgroup2",
        place: "/sys/fs/cgroup",
        flags: STRICT,
        options: "nsdelegate",
        needed: true,
    },
];

/// Mounts what finding the disk needs.
pub(crate) fn early() -> Result<(), MountError> {
    make_directory(Path::new("/dev"))?;
    mount_one(
        "devtmpfs",
        "devtmpfs",
        Path::new("/dev"),
        MsFlags::MS_NOSUID,
        "mode=0755",
    )
}

/// Mounts the disk and makes it the root of this process. The initramfs stays below, with the
/// program that is running.
pub(crate) fn enter_root(device: &Path) -> Result<(), MountError> {
    let root = Path::new(NEW_ROOT);
    make_directory(root)?;
    let source = device.display().to_string();
    // Freed blocks go back to the host.
    mount_one(&source, "ext4", root, MsFlags::MS_NOATIME, "discard")?;
    let failed = |step| move |errno| MountError::Enter { step, errno };
    nix::unistd::chdir(root).map_err(failed("chdir"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed("move"))?;
    nix::unistd::chroot(".").map_err(failed("chroot"))?;
    nix::unistd::chdir("/").map_err(failed("chdir to the new root"))
}

/// Mounts what programs expect, and makes the directories they expect.
pub(crate) fn late() -> Result<(), MountError> {
    for one in &LATE {
        let place = Path::new(one.place);
        let done = make_directory(place)
            .and_then(|()| mount_one(one.kind, one.kind, place, one.flags, one.options));
        match done {
            Err(error) if one.needed => return Err(error),
            Err(error) => log::warn(format_args!("event=mount_missing error=\"{error}\"")),
            Ok(()) => {}
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if let Err(error) = symlink(target, link)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            log::warn(format_args!(
                "event=link_missing link={link} error=\"{error}\""
            ));
        }
    }
    for (directory, mode) in [
        ("/run/lock", 0o1777),
        ("/tmp", 0o1777),
        ("/workspace", 0o755),
    ] {
        if let Err(error) = make_missing(Path::new(directory), mode) {
            log::warn(format_args!("event=directory_missing error=\"{error}\""));
        }
    }
    // As containers expect it: what is mounted here is seen in the mount namespaces below.
    let shared = MsFlags::MS_REC | MsFlags::MS_SHARED;
    if let Err(errno) = mount(None::<&str>, "/", None::<&str>, shared, None::<&str>) {
        log::warn(format_args!("event=mounts_not_shared error={errno}"));
    }
    Ok(())
}

fn mount_one(
    source: &str,
    kind: &str,
    place: &Path,
    flags: MsFlags,
    options: &str,
) -> Result<(), MountError> {
    match mount(Some(source), place, Some(kind), flags, Some(options)) {
        // The kernel can mount /dev itself.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(MountError::Refused {
            what: if source == kind {
                kind.to_owned()
            } else {
                format!("{kind} on {source}")
            },
            place: place.to_path_buf(),
            errno,
        }),
    }
}

fn make_directory(place: &Path) -> Result<(), MountError> {
    fs::create_dir_all(place).map_err(|cause| MountError::Directory {
        place: place.to_path_buf(),
        cause,
    })
}

/// Makes a directory with this mode; one that exists keeps its own.
fn make_missing(place: &Path, mode: u32) -> Result<(), MountError> {
    if place.is_dir() {
        return Ok(());
    }
    make_directory(place)?;
    fs::set_permissions(place, fs::Permissions::from_mode(mode)).map_err(|cause| {
        MountError::Directory {
            place: place.to_path_buf(),
            cause,
        }
    })
}
