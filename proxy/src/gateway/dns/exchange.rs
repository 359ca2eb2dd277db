//! One question to one name server: over UDP from a socket of its own, with a port that the kernel
//! chose at random, and over TCP where UDP cannot carry the answer or cannot be trusted with it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::answer::{Answer, Ask, Received, Sent};

/// Packets that are no answer to the question before TCP is asked instead: somebody is guessing.
const MAX_WRONG: usize = 16;

/// How long one server is listened to; others are asked long before that.
const UDP_PATIENCE: Duration = Duration::from_secs(4);
const TCP_PATIENCE: Duration = Duration::from_secs(4);

/// Longer than what we say that we take, because servers do not all mind that.
const MAX_UDP: usize = 4096;

/// Why one server gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    /// It said so itself.
    #[error("answered {0}")]
    Code(ResponseCode),
    /// It did not answer in time.
    #[error("did not answer")]
    Silent,
    /// What it answered over TCP is not to our question.
    #[error("answered another question")]
    Wrong,
    /// It cannot be reached.
    #[error("cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// The question cannot be written.
    #[error("the question cannot be written")]
    Question,
}

impl ExchangeError {
    /// Whether this says something about the server, not about the name.
    pub(super) fn is_servers(&self) -> bool {
        !matches!(self, Self::Code(_) | Self::Question)
    }
}

/// Asks one server.
pub(super) async fn exchange(server: SocketAddr, ask: &Ask) -> Result<Box<Answer>, ExchangeError> {
    let sent = ask.query().ok_or(ExchangeError::Question)?;
    let udp = timeout(UDP_PATIENCE, over_udp(server, ask, &sent));
    if let Some(answer) = udp.await.map_err(|_| ExchangeError::Silent)?? {
        return Ok(answer);
    }
    // A question of its own: who saw or guessed the other one learned nothing about this.
    let sent = ask.query().ok_or(ExchangeError::Question)?;
    let tcp = timeout(TCP_PATIENCE, over_tcp(server, ask, &sent));
    tcp.await.map_err(|_| ExchangeError::Silent)?
}

/// None when TCP has to be asked.
async fn over_udp(
    server: SocketAddr,
    ask: &Ask,
    sent: &Sent,
) -> Result<Option<Box<Answer>>, ExchangeError> {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel drops what comes from another address or port, and tells when nobody
    // is there.
    socket.connect(server).await?;
    socket.send(&sent.bytes).await?;
    let mut buffer = vec![0; MAX_UDP];
    for _ in 0..MAX_WRONG {
        let length = socket.recv(&mut buffer).await?;
        match ask.receive(sent, buffer.get(..length).unwrap_or_default(), false) {
            Received::Answer(answer) => return Ok(Some(answer)),
            Received::AskOverTcp => return Ok(None),
            Received::Failed(code) => return Err(ExchangeError::Code(code)),
            Received::Wrong => {}
        }
    }
    Ok(None)
}

async fn over_tcp(
    server: SocketAddr,
    ask: &Ask,
    sent: &Sent,
) -> Result<Box<Answer>, ExchangeError> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(sent.bytes.len()).map_err(|_| ExchangeError::Question)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(&sent.bytes);
    stream.write_all(&framed).await?;
    let length = usize::from(stream.read_u16().await?);
    let mut answer = Vec::new();
    // Grows with what comes, not with what was announced.
    (&mut stream)
        .take(length as u64)
        .read_to_end(&mut answer)
        .await?;
    if answer.len() != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    match ask.receive(sent, &answer, true) {
        Received::Answer(answer) => Ok(answer),
        Received::Failed(code) => Err(ExchangeError::Code(code)),
        Received::AskOverTcp | Received::Wrong => Err(ExchangeError::Wrong),
    }
}
