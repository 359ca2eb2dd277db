//! What a child gives up before it becomes a role. Everything here runs in the child of a process
//! that may have threads, between fork and exec: system calls only, nothing that allocates.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, chroot, setgroups, setresgid, setresuid};

/// A Linux capability's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capability(u32);

impl Capability {
    /// To listen on ports below 1024.
    pub(crate) const NET_BIND_SERVICE: Self = Self(10);
    /// To use packet sockets.
    pub(crate) const NET_RAW: Self = Self(13);
}

/// What to give up. The default gives up nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Confinement<'a> {
    /// User and group to become; zero changes neither and keeps all capabilities.
    pub(crate) uid: u32,
    /// The one capability to keep when the user changes.
    pub(crate) capability: Option<Capability>,
    /// A network namespace to enter.
    pub(crate) network: Option<BorrowedFd<'a>>,
    /// The directory to be locked into, in mount and IPC namespaces of its own.
    pub(crate) root: Option<&'a CStr>,
    /// `cgroup.procs` of the group to join, open for writing.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// Most open descriptors; zero leaves the limit alone.
    pub(crate) max_descriptors: u64,
    /// May never gain rights, not even by running a set-user-ID program.
    pub(crate) no_new_privileges: bool,
}

/// A step on the way to exec, as a number that fits the pipe back to the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Session = 1,
    Terminal,
    Descriptors,
    Cgroup,
    Limits,
    Namespaces,
    Root,
    User,
    Capabilities,
    Privileges,
    Exec,
}

impl Step {
    /// What the step does, for a person.
    pub(super) fn name(number: u8) -> &'static str {
        match number {
            1 => "start a session",
            2 => "take the terminal",
            3 => "hand over descriptors",
            4 => "join its control group",
            5 => "set resource limits",
            6 => "enter namespaces",
            7 => "change the root directory",
            8 => "change user",
            9 => "drop capabilities",
            10 => "forbid new privileges",
            11 => "execute",
            _ => "start",
        }
    }
}

impl Confinement<'_> {
    /// Gives up what is to be given up. Child only.
    pub(super) fn apply(&self) -> Result<(), (Step, nix::Error)> {
        if let Some(cgroup) = self.cgroup {
            nix::unistd::write(cgroup, b"0").map_err(|error| (Step::Cgroup, error))?;
        }
        self.limit().map_err(|error| (Step::Limits, error))?;
        self.namespaces()
            .map_err(|error| (Step::Namespaces, error))?;
        if let Some(root) = self.root {
            chroot(root)
                .and_then(|()| chdir(c"/"))
                .map_err(|error| (Step::Root, error))?;
        }
        if self.uid != 0 {
            become_user(self.uid, self.capability)?;
        }
        if self.no_new_privileges {
            prctl::set_no_new_privs().map_err(|error| (Step::Privileges, error))?;
        }
        Ok(())
    }

    fn limit(&self) -> nix::Result<()> {
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        if self.max_descriptors != 0 {
            let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?;
            let limit = self.max_descriptors.min(hard);
            setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
        }
        Ok(())
    }

    fn namespaces(&self) -> nix::Result<()> {
        if let Some(network) = self.network {
            setns(network, CloneFlags::CLONE_NEWNET)?;
        }
        if self.root.is_some() {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&CStr>, c"/", None::<&CStr>, private, None::<&CStr>)?;
        }
        Ok(())
    }
}

fn become_user(uid: u32, keep: Option<Capability>) -> Result<(), (Step, nix::Error)> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    prctl::set_keepcaps(keep.is_some()).map_err(|error| (Step::Capabilities, error))?;
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|error| (Step::User, error))?;
    set_capabilities(keep).map_err(|error| (Step::Capabilities, error))
}

/// The header of capset(2), version 3.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// One half of the sets of capset(2), version 3.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set_capabilities(keep: Option<Capability>) -> nix::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    const RAISE_AMBIENT: libc::c_ulong = 2;
    let header = CapabilityHeader {
        version: VERSION_3,
        pid: 0,
    };
    let mask = keep.map_or(0, |capability| 1_u32 << capability.0);
    let low = CapabilitySets {
        effective: mask,
        permitted: mask,
        inheritable: mask,
    };
    let sets = [low, CapabilitySets::default()];
    // SAFETY: both pointers are to live values laid out as capset(2), version 3, reads them.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    nix::Error::result(set)?;
    let Some(capability) = keep else {
        return Ok(());
    };
    let number = libc::c_ulong::from(capability.0);
    // SAFETY: PR_CAP_AMBIENT takes numbers only.
    let raised = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, RAISE_AMBIENT, number, 0, 0) };
    nix::Error::result(raised).map(drop)
}

/// Makes the terminal on `descriptor` the child's controlling one and its standard streams.
pub(super) fn take_terminal(descriptor: RawFd) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes a number; a descriptor that is no terminal is an error.
    nix::Error::result(unsafe { libc::ioctl(descriptor, libc::TIOCSCTTY, 1) })?;
    for stream in 0..=2 {
        copy(descriptor, stream)?;
    }
    Ok(())
}

/// dup2(2), which leaves the copy open across exec.
pub(super) fn copy(from: RawFd, to: RawFd) -> nix::Result<()> {
    // SAFETY: runs in the child, where nobody owns the number `to` any more; what it was is
    // meant to be replaced.
    nix::Error::result(unsafe { libc::dup2(from, to) }).map(drop)
}

/// Makes a network namespace with nothing in it, not even a loopback that is up.
pub(super) fn empty_network() -> std::io::Result<std::os::fd::OwnedFd> {
    // Only the calling thread moves, so a thread of its own leaves the caller where it is.
    let made = std::thread::spawn(|| -> std::io::Result<std::os::fd::OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
    });
    made.join()
        .unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
}

/// The raw number of a descriptor that may be absent.
pub(super) fn number(descriptor: Option<BorrowedFd<'_>>) -> RawFd {
    descriptor.map_or(-1, |descriptor| descriptor.as_raw_fd())
}
