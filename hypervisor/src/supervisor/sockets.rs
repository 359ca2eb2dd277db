//! The sockets that outlive the processes which use them: bound once, handed to every incarnation.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket, socketpair,
};

/// The longest path of a Unix socket, in bytes.
const LONGEST_PATH: usize = 107;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel takes no longer path.
    #[error(
        "socket path {} has {} bytes; at most {LONGEST_PATH} are possible: use a shorter --state directory",
        .0.display(), .0.as_os_str().len()
    )]
    PathTooLong(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}: {cause}", .path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The system refused a socket pair.
    #[error("cannot make a socket pair: {0}")]
    Pair(io::Error),
}

/// Listens at `path`, in place of whatever an earlier run left there.
pub(super) fn listen_at(path: &Path, kind: SockType) -> Result<OwnedFd, SocketError> {
    check_length(path)?;
    let failed = |cause: io::Error| SocketError::Listen {
        path: path.to_owned(),
        cause,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = || -> nix::Result<OwnedFd> {
        let socket = socket(AddressFamily::Unix, kind, flags, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::MAXCONN)?;
        Ok(socket)
    };
    made().map_err(|error| failed(error.into()))
}

/// Refuses a path that the kernel would refuse with a less helpful message.
pub(super) fn check_length(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().as_bytes().len() > LONGEST_PATH {
        return Err(SocketError::PathTooLong(path.to_owned()));
    }
    Ok(())
}

/// Two ends of a packet socket: ours does not block, the child's does.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), SocketError> {
    let made = || -> nix::Result<(OwnedFd, OwnedFd)> {
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags)?;
        let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&ours, nonblocking)?;
        Ok((ours, theirs))
    };
    made().map_err(|error| SocketError::Pair(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_too_long_is_refused_by_name() {
        let path = PathBuf::from(format!("/{}", "x".repeat(LONGEST_PATH)));
        let error = listen_at(&path, SockType::Stream).unwrap_err();
        assert!(error.to_string().contains("108 bytes"), "{error}");
        assert!(error.to_string().contains("--state"), "{error}");
    }

    #[test]
    fn what_an_earlier_run_left_does_not_stop_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        let first = listen_at(&path, SockType::SeqPacket).unwrap();
        drop(first);
        listen_at(&path, SockType::SeqPacket).unwrap();
    }
}
