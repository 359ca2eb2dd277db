//! Waiting for the disk: the kernel announces devices on a netlink socket, and a deadline ends the
//! waiting. The socket is there before the first look, so that no announcement is missed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The multicast group of the kernel's own announcements.
const KERNEL_EVENTS: u32 = 1;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// It did not appear.
    #[error(
        "no disk: {path} did not appear within {seconds} s; does the machine have a virtio disk?"
    )]
    Missing {
        /// The device.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// Something else has its name.
    #[error("{0} is no block device")]
    NotADisk(PathBuf),
    /// The kernel's announcements cannot be received.
    #[error("cannot wait for devices: {0}")]
    Events(#[from] Errno),
    /// Looking failed.
    #[error("cannot look at {path}: {cause}")]
    Look {
        /// At what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

/// Returns when the block device is there.
pub(crate) fn wait_for(path: &Path, patience: Duration) -> Result<(), DeviceError> {
    let events = listen()?;
    let start = Instant::now();
    loop {
        match std::fs::metadata(path) {
            Ok(about) if about.file_type().is_block_device() => return Ok(()),
            Ok(_) => return Err(DeviceError::NotADisk(path.to_path_buf())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => {
                return Err(DeviceError::Look {
                    path: path.to_path_buf(),
                    cause,
                });
            }
        }
        let left = patience.saturating_sub(start.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => {
                return Err(DeviceError::Missing {
                    path: path.to_path_buf(),
                    seconds: patience.as_secs(),
                });
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            // Which device came does not matter: the next look tells. An overrun says the same.
            Ok(_) => drain(&events),
        }
    }
}

fn listen() -> Result<OwnedFd, Errno> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
    Ok(socket)
}

fn drain(events: &OwnedFd) {
    let mut event = [0; 4096];
    // Bounded: a kernel that announces without end must not keep this from looking.
    for _ in 0..64 {
        match recv(events.as_raw_fd(), &mut event, MsgFlags::empty()) {
            Ok(_) | Err(Errno::ENOBUFS) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_come_is_named() {
        let error =
            wait_for(Path::new("/dev/no-such-disk"), Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("/dev/no-such-disk"), "{error}");
    }

    #[test]
    fn a_file_in_the_disks_place_is_no_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = wait_for(file.path(), Duration::ZERO).unwrap_err();
        assert!(matches!(error, DeviceError::NotADisk(_)), "{error}");
    }
}
