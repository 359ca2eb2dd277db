//! A way to a port of a VM through its agent, for servers that listen on the VM's loopback only. It
//! turns a stream to the agent into the connection's own; the agent's answer is a stranger's and
//! never longer than an error may be.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use protocol::agent::{Dial, Dialed};
use protocol::frame::{FrameError, HEADER_LEN, Header};
use protocol::message::MessageError;
use protocol::{ErrorBody, ErrorCode, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How long the agent may take to answer. It connects to its own loopback: that is done at once or
/// not at all.
const PATIENCE: Duration = Duration::from_secs(15);

/// The longest answer, in bytes: an error with a message of any reasonable length.
const MAX_ANSWER: u32 = 16 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// Nobody listens on the port.
    #[error("nobody listens on the port")]
    Refused,
    /// The agent does not connect to this port, or cannot.
    #[error("the VM's agent refused: {0}")]
    Agent(ErrorBody),
    /// What it said is no answer.
    #[error("the VM's agent answered wrongly: {0}")]
    Malformed(MessageError),
    /// The answer is too long.
    #[error("the VM's agent announced an answer of {0} bytes")]
    TooLong(u32),
    /// The header is none.
    #[error("the VM's agent answered wrongly: {0}")]
    Frame(#[from] FrameError),
    /// The stream ended or failed.
    #[error("the stream to the VM's agent failed: {0}")]
    Io(#[from] io::Error),
    /// No answer.
    #[error("the VM's agent did not answer within {} s", PATIENCE.as_secs())]
    Silent,
}

/// Asks for a port on a new stream to the agent; what comes back is the connection.
pub(crate) async fn dial(stream: OwnedFd, port: u16) -> Result<UnixStream, DialError> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    match tokio::time::timeout(PATIENCE, ask(&mut stream, port)).await {
        Ok(result) => result.map(|()| stream),
        Err(_) => Err(DialError::Silent),
    }
}

async fn ask(stream: &mut UnixStream, port: u16) -> Result<(), DialError> {
    let request = protocol::encode(&Dial { port }).map_err(DialError::Malformed)?;
    stream.write_all(&request).await?;
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await?;
    let Header {
        length,
        kind,
        flags,
    } = Header::parse(header)?;
    if length > MAX_ANSWER {
        return Err(DialError::TooLong(length));
    }
    // No byte beyond the answer is read: it would be the connection's.
    let mut body = Vec::new();
    let read = stream
        .take(u64::from(length))
        .read_to_end(&mut body)
        .await?;
    if u64::try_from(read) != Ok(u64::from(length)) {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    match protocol::decode::<Dialed>(&Frame { kind, flags, body }) {
        Ok(Dialed {}) => Ok(()),
        Err(MessageError::Refused(error)) if error.code == ErrorCode::ConnectionRefused => {
            Err(DialError::Refused)
        }
        Err(MessageError::Refused(error)) => Err(DialError::Agent(error)),
        Err(error) => Err(DialError::Malformed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dials an agent that answers with these bytes.
    async fn dialed(answer: &[u8]) -> (Result<UnixStream, DialError>, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut theirs = UnixStream::from_std(theirs).unwrap();
        theirs.write_all(answer).await.unwrap();
        (dial(ours.into(), 3000).await, theirs)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_connections() {
        let mut answer = protocol::encode(&Dialed {}).unwrap();
        answer.extend_from_slice(b"first bytes");
        let (stream, mut agent) = dialed(&answer).await;
        let mut stream = stream.unwrap();
        let mut got = [0; 11];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"first bytes");
        let request = protocol::encode(&Dial { port: 3000 }).unwrap();
        let mut said = vec![0; request.len()];
        agent.read_exact(&mut said).await.unwrap();
        assert_eq!(said, request);
    }

    #[tokio::test]
    async fn refusals_and_nonsense_have_names() {
        let refusal = |code| protocol::encode(&ErrorBody::guest(code, "no")).unwrap();
        let (refused, _) = dialed(&refusal(ErrorCode::ConnectionRefused)).await;
        assert!(matches!(refused, Err(DialError::Refused)), "{refused:?}");
        let (own, _) = dialed(&refusal(ErrorCode::InvalidArgument)).await;
        assert!(matches!(own, Err(DialError::Agent(_))), "{own:?}");
        let (long, _) = dialed(b"\xff\xff\x0f\0\x89\x01\0").await;
        assert!(matches!(long, Err(DialError::TooLong(0xfffff))), "{long:?}");
        let (giant, _) = dialed(&[0xff; 7]).await;
        assert!(matches!(giant, Err(DialError::Frame(_))), "{giant:?}");
        let (other, _) = dialed(b"\0\0\0\0\x01\0\0").await;
        assert!(matches!(other, Err(DialError::Malformed(_))), "{other:?}");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(theirs);
        let gone = dial(ours.into(), 3000).await;
        assert!(matches!(gone, Err(DialError::Io(_))), "{gone:?}");
    }
}
