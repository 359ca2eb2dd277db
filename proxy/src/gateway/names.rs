//! Questions for names: datagrams and streams to port 53 of the gateway, handed to the VM's
//! resolver. They wait beside the stack, never in it, and only so many at a time.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dns::{Resolver, Transport};
use super::pipe::Far;

/// The port.
pub(super) const PORT: u16 = 53;

/// Datagrams of one VM that wait for their answers.
pub(super) const MAX_QUERIES: usize = 128;

/// Streams of one VM.
pub(super) const MAX_STREAMS: usize = 32;

/// How long a stream may be silent.
const IDLE: Duration = Duration::from_secs(10);

/// What came of a question.
pub(super) enum Answer {
    /// To a datagram from this port of the guest to this address of the gateway.
    Datagram {
        guest_port: u16,
        gateway: SocketAddr,
        answer: Option<Vec<u8>>,
    },
    /// A stream has ended.
    Stream,
}

/// A question under way.
pub(super) type Question = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Answers one datagram.
pub(super) fn datagram(
    resolver: &Arc<Resolver>,
    query: &[u8],
    guest_port: u16,
    gateway: SocketAddr,
) -> Question {
    let resolver = Arc::clone(resolver);
    let query = query.to_vec();
    Box::pin(async move {
        Answer::Datagram {
            guest_port,
            gateway,
            answer: resolver.answer(query, Transport::Udp).await,
        }
    })
}

/// Answers what comes on a stream, one after the other.
pub(super) fn stream(resolver: &Arc<Resolver>, stream: Far) -> Question {
    let resolver = Arc::clone(resolver);
    Box::pin(async move {
        // How it ended is the guest's matter.
        let _ = converse(&resolver, stream).await;
        Answer::Stream
    })
}

async fn converse(resolver: &Resolver, mut stream: Far) -> std::io::Result<()> {
    loop {
        let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(length)];
        tokio::time::timeout(IDLE, stream.read_exact(&mut query)).await??;
        let Some(answer) = resolver.answer(query, Transport::Tcp).await else {
            return Ok(());
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let message = [&length.to_be_bytes(), answer.as_slice()].concat();
        tokio::time::timeout(IDLE, stream.write_all(&message)).await??;
    }
}
