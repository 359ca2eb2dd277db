//! The server behind: answers requests with a few bytes, and WebSockets with what they say.

use std::net::SocketAddr;
use std::os::fd::FromRawFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Type: text/plain\r\n\r\nhello world\n";

/// The answer to the one key that the clients here send.
const UPGRADE: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
      Connection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// The process that serves what it was given as descriptors, until it is ended.
pub(crate) fn run(listeners: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for number in listeners.split(',') {
            let number = number.parse().unwrap();
            // SAFETY: the descriptor was left open for this process, and nothing else here has it.
            let listener = unsafe { std::net::TcpListener::from_raw_fd(number) };
            listener.set_nonblocking(true).unwrap();
            tokio::spawn(accept(TcpListener::from_std(listener).unwrap()));
        }
        std::future::pending::<()>().await;
    });
}

async fn accept(listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(async move { drop(serve(stream).await) });
    }
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    loop {
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let upgrade = head
            .windows(10)
            .any(|bytes| bytes.eq_ignore_ascii_case(b"\r\nupgrade:"));
        if upgrade {
            break;
        }
        head.clear();
        stream.write_all(ANSWER).await?;
    }
    drop(head);
    stream.write_all(UPGRADE).await?;
    // Messages of less than 126 bytes, masked with zeros (RFC 6455 section 5.2).
    let mut message = [0; 6];
    loop {
        stream.read_exact(&mut message).await?;
        let length = message[1] & 0x7f;
        let mut said = vec![0x81, length];
        said.resize(2 + usize::from(length), 0);
        stream.read_exact(&mut said[2..]).await?;
        stream.write_all(&said).await?;
    }
}

/// Begins a connection and takes it back.
pub(crate) fn syn(to: SocketAddr) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    if let Ok(socket) = socket(AddressFamily::Inet, SockType::Stream, flags, None) {
        let _ = connect(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            &SockaddrStorage::from(to),
        );
    }
}
