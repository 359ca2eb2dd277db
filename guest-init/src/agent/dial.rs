//! A stream becomes a connection to a TCP port of the machine's own loopback interface. Bytes go
//! through two buffers of fixed size, one for each direction; the end of one direction is passed on
//! and the other goes on. Nothing but loopback is ever connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage, connect, getsockopt,
    recv, send, setsockopt, shutdown, socket, sockopt,
};
use protocol::agent::{AGENT_PORT, Dial, Dialed};
use protocol::{ErrorBody, ErrorCode, Frame};

use super::poll::{self, Interest};
use super::stream::{Stream, StreamError};

/// How long a port that does not answer at all is waited for: its queue may be full.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a server may take for the last bytes of a client that has gone.
const LAST: Duration = Duration::from_secs(10);
/// Bytes on their way, in each direction.
const BUFFER: usize = 64 << 10;

/// Serves a dial to the end of the connection.
pub(super) fn serve(
    request: &Dial,
    mut stream: Stream,
    early: &[Frame],
) -> Result<(), StreamError> {
    let port = request.port;
    if port == 0 || u32::from(port) == AGENT_PORT {
        let message = format!("port {port} cannot be dialed: it is none, or the agent's own");
        return stream.refuse(&ErrorBody::caller(ErrorCode::InvalidArgument, message));
    }
    if !early.is_empty() || stream.reader().finish().is_err() {
        let message = "wait for the answer before you send the connection's own bytes";
        return stream.refuse(&ErrorBody::caller(ErrorCode::InvalidArgument, message));
    }
    let addresses = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    let mut refusals = addresses.map(|address| (address, Errno::UnknownErrno));
    for refusal in &mut refusals {
        match dial(SocketAddr::new(refusal.0, port), &stream) {
            Ok(connection) => {
                stream.queue(&Dialed {})?;
                stream.send_all(&[])?;
                return Relay::new(stream.socket(), connection.as_fd()).run();
            }
            Err(Failure::Refused(errno)) => refusal.1 = errno,
            Err(Failure::Stream(error)) => return Err(error),
        }
    }
    let reasons = refusals.map(|(address, errno)| format!("{address}: {errno:?}"));
    let message = format!(
        "nothing takes connections to port {port} in the VM; start the server, or see on which port \
         it listens"
    );
    let error = ErrorBody::guest(ErrorCode::ConnectionRefused, message);
    stream.refuse(&error.with_detail(reasons.join("\n")))
}

enum Failure {
    Refused(Errno),
    Stream(StreamError),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno)
    }
}

fn dial(address: SocketAddr, stream: &Stream) -> Result<OwnedFd, Failure> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connection = socket(family, SockType::Stream, flags, None)?;
    let now = Instant::now();
    let deadline = now.checked_add(CONNECT).unwrap_or(now);
    match connect(connection.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => loop {
            let mut interests = [
                Interest::new(connection.as_fd(), false, true),
                stream.interest(false),
            ];
            poll::wait(&mut interests, Some(deadline))?;
            let [done, client] = interests;
            if client.hung_up() {
                return Err(Failure::Stream(StreamError::Gone(Errno::EPIPE)));
            }
            if done.writable() || done.hung_up() {
                match getsockopt(&connection, sockopt::SocketError)? {
                    0 => break,
                    number => return Err(Errno::from_raw(number).into()),
                }
            }
            if Instant::now() >= deadline {
                return Err(Errno::ETIMEDOUT.into());
            }
        },
        Err(errno) => return Err(errno.into()),
    }
    // Whoever writes in small pieces has a reason to.
    setsockopt(&connection, sockopt::TcpNoDelay, &true)?;
    Ok(connection)
}

/// One direction.
struct Half {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The sender has said its last, or cannot be heard any more.
    ended: bool,
    /// The receiver has been told, or takes nothing any more.
    closed: bool,
}

impl Half {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
            closed: false,
        }
    }

    /// Whether bytes wait for the receiver, and it still takes some.
    fn pending(&self) -> bool {
        self.start < self.end && !self.closed
    }

    /// Whether bytes of the sender are wanted now.
    fn listens(&self) -> bool {
        !self.pending() && !self.ended && !self.closed
    }

    /// Takes what the sender has.
    fn read(&mut self, from: BorrowedFd<'_>) {
        match recv(from.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
            Ok(0) => self.ended = true,
            Ok(count) => (self.start, self.end) = (0, count),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.ended = true,
        }
    }

    /// Gives the receiver what it takes, and the end when there is no more.
    fn write(&mut self, to: BorrowedFd<'_>) {
        while self.pending() {
            let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
            match send(to.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => self.start = self.start.saturating_add(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => self.closed = true,
            }
        }
        if self.ended && !self.closed {
            self.closed = true;
            // One that has gone meanwhile need not be told.
            let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
        }
    }
}

struct Relay<'a> {
    client: BorrowedFd<'a>,
    server: BorrowedFd<'a>,
    up: Half,
    down: Half,
    /// Until when the server may take the last bytes of a client that has gone.
    gone: Option<Instant>,
}

impl<'a> Relay<'a> {
    fn new(client: BorrowedFd<'a>, server: BorrowedFd<'a>) -> Self {
        Self {
            client,
            server,
            up: Half::new(),
            down: Half::new(),
            gone: None,
        }
    }

    fn run(mut self) -> Result<(), StreamError> {
        loop {
            self.up.write(self.server);
            self.down.write(self.client);
            // A receiver that takes nothing more ends its direction; with both ended, all is over.
            if self.up.closed && self.down.closed {
                return Ok(());
            }
            if self.gone.is_some_and(|last| Instant::now() >= last) {
                return Ok(());
            }
            let (up, down) = (&self.up, &self.down);
            let mut interests = [
                // Its leaving alone is of interest once it has said its last; before, it shows in
                // what is read or written.
                if up.listens() || down.pending() || up.ended {
                    Interest::new(self.client, up.listens(), down.pending())
                } else {
                    Interest::NONE
                },
                if down.listens() || up.pending() {
                    Interest::new(self.server, down.listens(), up.pending())
                } else {
                    Interest::NONE
                },
            ];
            poll::wait(&mut interests, self.gone).map_err(StreamError::Gone)?;
            let [client, server] = interests;
            if self.up.listens() && client.readable() {
                self.up.read(self.client);
            }
            if self.down.listens() && server.readable() {
                self.down.read(self.server);
            }
            if client.hung_up() {
                // What it sent still goes to the server, as long as that takes some of it.
                self.gone = Instant::now().checked_add(LAST);
                if self.up.ended {
                    self.down.closed = true;
                }
            }
        }
    }
}
