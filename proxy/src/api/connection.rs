//! One client's connection: yamux over whatever carried it here, one task per stream, all of them
//! ended with the connection. A panic in a stream ends that stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use protocol::frame::MAX_DATA;
use tokio::io::{AsyncRead, AsyncWrite, BufWriter};
use tokio::task::{JoinError, JoinSet};
use tokio_util::compat::TokioAsyncReadCompatExt;
use yamux::{Config, ConnectionError, DEFAULT_CREDIT, Mode};

use super::gate::{Gate, Gated};
use super::quiet::Quiet;
use super::session::{Greeting, MOST_STREAMS, SPARE_STREAMS, Session};
use super::strangers::Stranger;
use super::{Shared, stream};

/// How long a client may take until its `Hello` is here.
const HELLO: Duration = Duration::from_secs(10);

/// How long a connection that was refused may take to read why.
const FAREWELL: Duration = Duration::from_secs(5);

/// Bytes that are read of a client before its `Hello` was accepted.
const BEFORE_HELLO: usize = 128 << 10;

/// The longest yamux frame: the protocol's longest data frame fits with its header. Yamux flushes
/// after each of its frames.
const YAMUX_FRAME: usize = MAX_DATA + 4096;

/// A yamux frame and its header are one write, and records of TLS are full.
const WRITES: usize = YAMUX_FRAME + 4096;

/// What the windows of a connection's streams may grow by, all together.
const SPARE_WINDOW: usize = 4 << 20;

/// Serves one client until it leaves or breaks the rules. It is a stranger until its `Hello` was
/// accepted.
pub(crate) async fn serve<S>(
    socket: S,
    peer: String,
    stranger: Option<Stranger>,
    shared: Arc<Shared>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let max_streams = shared.max_streams().clamp(1, MOST_STREAMS);
    let gate = Gate::new(stranger);
    let gated = Gated::new(socket, gate.clone(), BEFORE_HELLO);
    let gated = BufWriter::with_capacity(WRITES, gated);
    let mut connection = yamux::Connection::new(gated.compat(), config(max_streams), Mode::Server);
    let session = Arc::new(Session::new(
        Arc::clone(&shared.desk),
        peer.clone(),
        gate,
        max_streams,
    ));
    let mut greeting = session.greeting();
    let mut streams = JoinSet::new();
    let mut first = true;
    let mut leaving = false;
    let deadline = tokio::time::sleep(HELLO);
    tokio::pin!(deadline);
    loop {
        let state = greeting.borrow_and_update().clone();
        if matches!(state, Greeting::Refused(_)) && streams.is_empty() {
            break;
        }
        if matches!(state, Greeting::Refused(_)) && !leaving {
            leaving = true;
            deadline.set(tokio::time::sleep(FAREWELL));
        }
        let limited = matches!(state, Greeting::Awaited | Greeting::Refused(_));
        tokio::select! {
            inbound = poll_fn(|cx| connection.poll_next_inbound(cx)) => match inbound {
                Some(Ok(stream)) => {
                    let session = Arc::clone(&session);
                    let is_first = std::mem::take(&mut first);
                    streams.spawn(async move {
                        if is_first {
                            stream::serve_first(stream, &session).await
                        } else {
                            stream::serve(stream, &session).await
                        }
                    });
                }
                Some(Err(error)) => {
                    log_broken(&peer, &error, streams.len());
                    return;
                }
                None => return,
            },
            Some(ended) = streams.join_next() => log_stream(&peer, ended, &shared),
            _ = greeting.changed() => {}
            () = &mut deadline, if limited => {
                log_slow(&peer);
                break;
            }
        }
    }
    let close = poll_fn(|cx| connection.poll_close(cx));
    // Whoever does not take the farewell in time goes without it.
    let _ = tokio::time::timeout(FAREWELL, close).await;
}

/// Each stream has yamux's window of 256 KiB. Those that are used up faster than word of it comes back
/// grow by [`SPARE_WINDOW`], all together, so what one connection can make us hold is (max_streams +
/// [`SPARE_STREAMS`]) * 256 KiB and that, however a client behaves. Yamux's own maximum of streams,
/// which ends the connection, lies above ours, which is answered.
fn config(max_streams: u32) -> Config {
    let streams = max_streams.saturating_add(SPARE_STREAMS) as usize;
    let mut config = Config::default();
    config.set_max_num_streams(streams);
    config.set_split_send_size(YAMUX_FRAME);
    config.set_max_connection_receive_window(Some(
        streams
            .saturating_mul(DEFAULT_CREDIT as usize)
            .saturating_add(SPARE_WINDOW),
    ));
    config
}

fn log_stream(
    peer: &str,
    ended: Result<Result<(), stream::StreamError>, JoinError>,
    shared: &Shared,
) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error @ (stream::StreamError::Frame(_) | stream::StreamError::TooSlow(_)))) => {
            static QUIET: Quiet = Quiet::new();
            if let Some(left_out) = QUIET.allow() {
                tracing::info!(peer, %error, left_out, "stream ended early");
            }
        }
        Ok(Err(error)) => tracing::debug!(peer, %error, "stream ended early"),
        Err(error) if error.is_panic() => {
            let panics = shared
                .panics
                .fetch_add(1, Ordering::Relaxed)
                .saturating_add(1);
            static QUIET: Quiet = Quiet::new();
            if let Some(left_out) = QUIET.allow() {
                tracing::error!(peer, panics, left_out, "a stream's task panicked");
            }
        }
        Err(_) => {}
    }
}

fn log_broken(peer: &str, error: &ConnectionError, streams: usize) {
    static QUIET: Quiet = Quiet::new();
    if vanished(error) {
        // An end without a goodbye matters only where something was under way.
        if streams == 0 {
            tracing::debug!(peer, "client went away");
        } else if let Some(left_out) = QUIET.allow() {
            tracing::info!(peer, streams, left_out, "client vanished with streams open");
        }
        return;
    }
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(peer, %error, left_out, "connection broken");
    }
}

/// Whether the client is simply gone, as one that was killed is, rather than against the rules.
fn vanished(error: &ConnectionError) -> bool {
    use std::io::ErrorKind;
    let cause = match error {
        ConnectionError::Io(cause) => cause,
        ConnectionError::Decode(yamux::FrameDecodeError::Io(cause)) => cause,
        _ => return false,
    };
    matches!(
        cause.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

fn log_slow(peer: &str) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(peer, left_out, "connection closed at its deadline");
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt};
    use protocol::frame::header_for;
    use protocol::hello::{GENERATION, Hello, HelloOk, Limits};
    use protocol::host::proxy::ApiReply;
    use protocol::{Kind, Message};

    use super::super::desk::Outgoing;
    use super::super::stream::tests::PANICS;
    use super::*;

    async fn exchange(
        connection: &mut yamux::Connection<impl futures::AsyncRead + futures::AsyncWrite + Unpin>,
        request: &[u8],
    ) -> Vec<u8> {
        let mut stream = poll_fn(|cx| connection.poll_new_outbound(cx))
            .await
            .unwrap();
        let talk = async move {
            stream.write_all(request).await.unwrap();
            stream.close().await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            answer
        };
        tokio::select! {
            answer = talk => answer,
            _ = poll_fn(|cx| connection.poll_next_inbound(cx)) => panic!("connection ended"),
        }
    }

    fn start(
        shared: &Arc<Shared>,
    ) -> yamux::Connection<tokio_util::compat::Compat<tokio::io::DuplexStream>> {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(serve(near, "test".into(), None, Arc::clone(shared)));
        yamux::Connection::new(far.compat(), Config::default(), Mode::Client)
    }

    #[tokio::test]
    async fn a_panic_ends_its_own_stream_is_counted_and_leaves_the_rest() {
        let shared = Arc::new(Shared::new());
        let incarnation = shared.desk.connected();
        let desk = Arc::clone(&shared.desk);
        tokio::spawn(async move {
            while let Some(Outgoing::Request(request)) = desk.next(incarnation).await {
                let limits = Limits {
                    max_streams: 8,
                    max_body: 1,
                    max_cpus: 1,
                    max_memory_mib: 1,
                    max_disk_mib: 1,
                };
                let ok = HelloOk {
                    generation: GENERATION,
                    limits,
                };
                let reply = ApiReply {
                    ticket: request.ticket,
                    kind: HelloOk::KIND.0,
                    body: protocol::message::encode_body(&ok).unwrap(),
                };
                desk.answered(reply, Vec::new());
            }
        });
        let hello = protocol::encode(&Hello {
            generation: GENERATION,
            token: "t".into(),
        })
        .unwrap();
        let mut client = start(&shared);
        assert!(!exchange(&mut client, &hello).await.is_empty());
        let injected = header_for(PANICS, 0).unwrap();
        assert!(exchange(&mut client, &injected).await.is_empty());
        let request = header_for(Kind::GET_VM, 0).unwrap();
        assert!(!exchange(&mut client, &request).await.is_empty());
        assert!(!exchange(&mut start(&shared), &hello).await.is_empty());
        assert_eq!(shared.panics.load(Ordering::Relaxed), 1);
    }
}
