//! Sockets of this process, without blocking: what the guest's connections and flows become. It
//! knows nothing of the guest.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockProtocol, SockType, SockaddrStorage, connect,
    getsockopt, recv, send as send_to, setsockopt, shutdown, socket, sockopt,
};

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);

/// Seconds without a byte until the other end is asked whether it is still there, between such
/// questions, and how many may stay unanswered.
const KEEP_ALIVE: (u32, u32, u32) = (60, 30, 6);

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// How an attempt to connect stands.
pub(super) type Attempt = Result<Option<()>, Errno>;

/// Begins a TCP connection: done, or under way (none).
pub(super) fn tcp(to: SocketAddr) -> Result<(OwnedFd, Option<()>), Errno> {
    let socket = socket(family(to.ip()), SockType::Stream, FLAGS, SockProtocol::Tcp)?;
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEP_ALIVE.0)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEP_ALIVE.1)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &KEEP_ALIVE.2)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => Ok((socket, Some(()))),
        Err(Errno::EINPROGRESS | Errno::EAGAIN) => Ok((socket, None)),
        Err(error) => Err(error),
    }
}

/// How the connection attempt of a socket ended that became writable.
pub(super) fn outcome(socket: BorrowedFd<'_>) -> Attempt {
    let error = getsockopt(&socket, sockopt::SocketError)?;
    if error != 0 {
        return Err(Errno::from_raw(error));
    }
    // Writable without an error is connected; one that is still on its way has no peer.
    match nix::sys::socket::getpeername::<SockaddrStorage>(socket.as_raw_fd()) {
        Ok(_) => Ok(Some(())),
        Err(Errno::ENOTCONN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A UDP socket that exchanges datagrams with one peer alone.
pub(super) fn udp(to: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = socket(
        family(to.ip()),
        SockType::Datagram,
        FLAGS,
        SockProtocol::Udp,
    )?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(socket)
}

/// A socket for echo requests to one peer and their replies. The kernel gives it an identifier;
/// whether this process may have it is decided by the sysctl `net.ipv4.ping_group_range`.
pub(super) fn ping(to: IpAddr) -> Result<OwnedFd, Errno> {
    let protocol = match to {
        IpAddr::V4(_) => SockProtocol::Icmp,
        IpAddr::V6(_) => SockProtocol::IcmpV6,
    };
    let socket = socket(family(to), SockType::Datagram, FLAGS, protocol)?;
    connect(
        socket.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(to, 0)),
    )?;
    Ok(socket)
}

pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    send_to(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
}

/// The length that a datagram has, also where it is larger than the buffer; zero at the end of a
/// stream.
pub(super) fn receive_datagram(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, Errno> {
    recv(socket.as_raw_fd(), into, MsgFlags::MSG_TRUNC)
}

pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize, Errno> {
    recv(socket.as_raw_fd(), into, MsgFlags::empty())
}

/// Says to the other end that nothing more comes.
pub(super) fn finish(socket: BorrowedFd<'_>) {
    // Fails when the other end is gone, which the next read tells.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
}

/// Closes so that the other end learns that the connection was reset.
pub(super) fn reset(socket: OwnedFd) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // Fails for sockets other than TCP, whose peers are told in another way.
    let _ = setsockopt(&socket.as_fd(), sockopt::Linger, &linger);
    drop(socket);
}

/// Sets a descriptor to not block.
pub(super) fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
