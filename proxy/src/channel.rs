//! Host channels for asynchronous code: packets with descriptors over `SOCK_SEQPACKET` sockets, a
//! wait instead of `WouldBlock`. It must never block its thread, and a call that is dropped has
//! sent or received either a whole packet or nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, accept4, connect, socket, socketpair,
};
use protocol::Message;
use protocol::host::channel::{self, ChannelError, Packet};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One end of a connected `SOCK_SEQPACKET` socket. Sending and receiving may go on at the same
/// time; each packet goes to one receiver.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes a connected socket. It is set to non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        set_nonblocking(socket.as_fd())?;
        register(socket).map(Self)
    }

    /// Connects to the listening socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        register(socket).map(Self)
    }

    /// Two channels that are connected to each other.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self::new(one)?, Self::new(other)?))
    }

    /// Sends one message with descriptors, waiting until the peer has room for it.
    pub async fn send<M: Message>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = protocol::encode(message)?;
        self.ready(Interest::WRITABLE, |socket| {
            channel::send_bytes(socket, &bytes, descriptors)
        })
        .await
    }

    /// Receives one packet; none means that the peer has closed.
    pub async fn receive(&self) -> Result<Option<Packet>, ChannelError> {
        self.ready(Interest::READABLE, channel::receive).await
    }

    /// Runs `attempt` each time the socket is ready until it does more than not being ready.
    async fn ready<T>(
        &self,
        interest: Interest,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> Result<T, ChannelError>,
    ) -> Result<T, ChannelError> {
        loop {
            let mut guard = self.0.ready(interest).await?;
            match attempt(self.0.get_ref().as_fd()) {
                Err(error) if error.would_block() => guard.clear_ready(),
                result => return result,
            }
        }
    }
}

/// A listening `SOCK_SEQPACKET` socket.
#[derive(Debug)]
pub struct ChannelListener(AsyncFd<OwnedFd>);

impl ChannelListener {
    /// Takes a socket that listens already. It is set to non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        set_nonblocking(socket.as_fd())?;
        register(socket).map(Self)
    }

    /// The next peer that connects.
    pub async fn accept(&self) -> io::Result<Channel> {
        loop {
            let mut guard = self.0.readable().await?;
            match accept4(
                self.0.get_ref().as_raw_fd(),
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            ) {
                Ok(number) => return Channel::new(own(number)),
                Err(nix::Error::EAGAIN) => guard.clear_ready(),
                Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
    // dropped: nothing here takes it out again.
    unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
}

fn own(number: std::os::fd::RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept4 just made this descriptor for us; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use protocol::host::proxy::{ApiAbandoned, ApiReply};

    use super::*;

    #[tokio::test]
    async fn a_full_peer_makes_the_sender_wait_and_loses_nothing() {
        let (ours, theirs) = Channel::pair().unwrap();
        let count = 2_000_u64;
        let sender = tokio::spawn(async move {
            for ticket in 0..count {
                let reply = ApiReply {
                    ticket,
                    kind: 0,
                    body: vec![0; 2000],
                };
                ours.send(&reply, &[]).await.unwrap();
            }
        });
        // Runs on this thread: the sender has filled the socket before the first receive.
        tokio::task::yield_now().await;
        for ticket in 0..count {
            let packet = theirs.receive().await.unwrap().unwrap();
            let reply: ApiReply = protocol::decode(&packet.frame).unwrap();
            assert_eq!(reply.ticket, ticket);
        }
        sender.await.unwrap();
        assert!(theirs.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn descriptors_come_through_an_accepted_channel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(4).unwrap()).unwrap();
        let listener = ChannelListener::new(socket).unwrap();
        let client = Channel::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        let stdin = io::stdin();
        client
            .send(&ApiAbandoned { ticket: 9 }, &[stdin.as_fd()])
            .await
            .unwrap();
        let packet = server.receive().await.unwrap().unwrap();
        assert_eq!(packet.descriptors.len(), 1);
    }
}
