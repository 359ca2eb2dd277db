//! Process 1 of a virtual machine: from the initramfs to a served agent. Every step that fails is
//! named on the console and ends in a power-off, so that the host sees an end and not a hang.

mod device;
mod mounts;
mod netlink;
mod network;
pub(crate) mod shutdown;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::reboot::set_cad_enabled;
use nix::sys::stat::Mode;

use crate::agent;
use crate::cgroup::{self, Cgroups};
use crate::log;
use crate::system::disk::ROOT_DEVICE;
use crate::system::kernel;

/// How long the disk may take to appear.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
const CGROUPS: &str = "/sys/fs/cgroup";

#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error(transparent)]
    Mount(#[from] mounts::MountError),
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error("cannot {what}: {errno}")]
    System { what: &'static str, errno: Errno },
    #[error("the agent cannot serve: {0}")]
    Agent(String),
}

/// Brings the machine up and serves. Never returns: process 1 ends with the machine.
pub(crate) fn run() -> ! {
    match std::panic::catch_unwind(bring_up) {
        Ok(Ok(())) => fatal(format_args!("the agent stopped serving")),
        Ok(Err(error)) => fatal(format_args!("{error}")),
        Err(_) => fatal(format_args!("a panic, see the line above")),
    }
}

fn fatal(reason: std::fmt::Arguments<'_>) -> ! {
    log::error(format_args!("event=boot_failed reason=\"{reason}\""));
    shutdown::sync();
    shutdown::power_off()
}

fn bring_up() -> Result<(), BootError> {
    mounts::early()?;
    if let Ok(kmsg) = open(
        "/dev/kmsg",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    ) {
        log::to_kernel(kmsg);
    }
    log::info(format_args!(
        "event=boot version={}",
        env!("CARGO_PKG_VERSION")
    ));
    leave_console().map_err(|errno| BootError::System {
        what: "open /dev/null",
        errno,
    })?;
    device::wait_for(Path::new(ROOT_DEVICE), DISK_DEADLINE)?;
    mounts::enter_root(Path::new(ROOT_DEVICE))?;
    log::info(format_args!("event=root_entered disk={ROOT_DEVICE}"));
    mounts::late()?;
    log::info(format_args!("event=mounts_done"));

    write_setting("/proc/self/oom_score_adj", "-1000");
    // By itself the kernel takes ten lines of a writer in five seconds; our log has its own bound.
    // This file wants the line's end.
    write_setting("/proc/sys/kernel/printk_devkmsg", "on\n");
    // A key combination is no power switch here; the request comes as a signal.
    if let Err(errno) = set_cad_enabled(false) {
        log::warn(format_args!(
            "event=setting_refused what=ctrl-alt-del error={errno}"
        ));
    }
    // The machine's addresses are its own: nobody else can have them.
    for scope in ["all", "default"] {
        for (key, value) in [("accept_dad", "0"), ("dad_transmits", "0")] {
            write_setting(&format!("/proc/sys/net/ipv6/conf/{scope}/{key}"), value);
        }
    }
    kernel::loopback_up()?;
    network::bring_up();
    let cgroups = control_groups()?;
    log::info(format_args!("event=groups_ready"));
    agent::serve_vsock(cgroups).map_err(|error| BootError::Agent(error.to_string()))
}

/// Standard input, output and error become /dev/null: what a library prints there must not wait for
/// a console that nobody reads.
fn leave_console() -> Result<(), Errno> {
    let null: OwnedFd = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)
}

/// One group for the agent, one for everything that users start.
fn control_groups() -> Result<Cgroups, BootError> {
    let root = Path::new(CGROUPS);
    let missing = cgroup::enable_controllers(root)?;
    if !missing.is_empty() {
        log::warn(format_args!(
            "event=controllers_missing names={}",
            missing.join(",")
        ));
    }
    let own = root.join("agent");
    if let Err(error) = fs::create_dir_all(&own) {
        log::warn(format_args!("event=agent_group_failed error=\"{error}\""));
    }
    write_setting("/sys/fs/cgroup/agent/cgroup.procs", "0");
    let (mut groups, _) = Cgroups::prepare(&root.join("user"))?;
    if let Some(most) = user_tasks()
        && let Err(error) = groups.limit_tasks(most)
    {
        log::warn(format_args!("event=tasks_not_limited error=\"{error}\""));
    }
    Ok(groups)
}

/// How many tasks users may have, so that one that forks without end leaves room for the agent.
fn user_tasks() -> Option<u64> {
    ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"]
        .into_iter()
        .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok())
        .min()
        .map(|most| (most / 10).saturating_mul(9).max(64))
}

/// Sets what is good to have; a kernel without it is logged and lived with.
fn write_setting(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        log::warn(format_args!(
            "event=setting_refused path={path} value={value:?} error=\"{error}\""
        ));
    }
}
