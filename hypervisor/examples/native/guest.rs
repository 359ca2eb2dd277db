//! The guest: its agent as process 1 of PID, mount and host-name namespaces of its own. Its root is
//! the directory `root` beside the VM's disk, where it keeps what it writes; programs, libraries and
//! `/etc` are this machine's, and cannot be written. The network is this machine's too.

use std::fs;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use protocol::host::vmm::Ending;

/// Where the agent listens, from the VM's directory on: the whole path may be too long for a socket.
const SOCKET: &str = "root/.agent";

/// Runs in the new namespaces, in the VM's directory. The copy of the agent keeps its path short and
/// lets a build replace the file that it came from.
const SCRIPT: &str = r#"set -e
name=$1 agent=$2
echo "$name" > /proc/sys/kernel/hostname
mkdir -p root && cd root
mount --bind . . && cd "$PWD"
for one in usr bin sbin lib lib32 lib64 libx32 etc opt; do
    if [ -L "/$one" ]; then
        [ -L "$one" ] || cp -P "/$one" "$one"
    elif [ -d "/$one" ]; then
        mkdir -p "$one"
        mount --bind "/$one" "$one"
        mount -o remount,bind,ro "$one"
    fi
done
mkdir -p proc dev tmp root home run var/tmp var/lib mnt srv workspace
chmod 1777 tmp var/tmp
chmod 700 root
mount -t proc none proc
mount --rbind /dev dev
rm -rf .agent run/* tmp/*
cp "$agent" .guest-init
exec chroot . /.guest-init agent --socket /.agent --workspace /workspace --logs /var/lib/supvm/processes
"#;

/// A guest that was started. Killing it kills all of its processes.
pub(crate) struct Guest {
    pub(crate) child: Child,
}

/// Starts the guest of the VM whose disk this is; its agent's log is the console.
pub(crate) fn start(
    disk: &fs::File,
    console: OwnedFd,
    hostname: &str,
    agent: &Path,
) -> io::Result<Guest> {
    std::env::set_current_dir(directory_of(disk)?)?;
    // One that an earlier run left must not be taken for the new one's.
    match fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // As the monitor does: on behind what earlier runs have said.
    let mut console = fs::File::from(console);
    console.seek(SeekFrom::End(0))?;
    let console = OwnedFd::from(console);
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--mount", "--uts", "--ipc", "--fork"])
        .args(["--kill-child", "--", "sh", "-c", SCRIPT, "sh", hostname])
        .arg(agent)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console);
    // SAFETY: prctl(2) is a system call on numbers; nothing is allocated between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // The machine goes with its monitor.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok(Guest { child })
}

fn directory_of(disk: &fs::File) -> io::Result<PathBuf> {
    use std::os::fd::AsRawFd;
    let path = fs::read_link(format!("/proc/self/fd/{}", disk.as_raw_fd()))?;
    path.parent()
        .map(Path::to_owned)
        .ok_or_else(|| io::Error::other("the disk is in no directory"))
}

/// A stream to the agent; an error while it does not listen.
pub(crate) fn connect() -> io::Result<UnixStream> {
    UnixStream::connect(SOCKET)
}

/// What the end of the agent would have been the end of a machine by: a kernel panics without its
/// first process, and reboot(2) in a PID namespace is a signal to it. A guest that never came up is
/// this program's own failure. (`unshare` exits with an error where SIGKILL ended its child.)
pub(crate) fn ending(status: ExitStatus, came_up: bool) -> Ending {
    match (status.code(), status.signal()) {
        (Some(0), _) | (None, Some(libc::SIGINT)) => Ending::PoweredOff,
        (None, Some(libc::SIGHUP)) => Ending::Reset,
        _ if came_up => Ending::GuestPanic,
        _ => Ending::Failed,
    }
}
