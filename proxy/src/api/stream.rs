//! One stream of a client: a request, its answer, and after `OPENED` the agent's bytes. The first
//! one carries `Hello`. Every wait here has a deadline except two that are the client's own: for
//! control's answer and for the agent's bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use protocol::frame::{HEADER_LEN, Header};
use protocol::hello::{GENERATION, Hello, MAX_TOKEN};
use protocol::vm::MAX_REQUEST;
use protocol::{ErrorBody, ErrorCode, Frame, FrameError, Kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::Stream;

use super::desk::Answer;
use super::quiet::Quiet;
use super::relay::relay;
use super::session::{Greeting, Session};

/// How long a client may take to send a stream's first frame.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// How long a client may take to make room for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Kinds from here on are spoken between the host's processes only.
const FIRST_HOST_KIND: u16 = 0x8000;

/// Why a stream ended before its time. Nothing is owed to the client any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The stream or the agent's socket failed.
    #[error("stream: {0}")]
    Io(#[from] io::Error),
    /// The client took longer than it may.
    #[error("client took longer than {0:?}")]
    TooSlow(Duration),
    /// The client ended the stream inside its first frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The client left before control had answered.
    #[error("client left before the answer")]
    Abandoned,
}

/// Serves the first stream of a connection: `Hello`, and the end of the connection if it is refused.
pub(crate) async fn serve_first(stream: Stream, session: &Session) -> Result<(), StreamError> {
    let mut stream = stream.compat();
    let result = greet(&mut stream, session).await;
    let greeting = match result {
        Ok(Ok((token, frame))) => {
            // Open the gate before the client can know that it is open.
            session.greet(Greeting::Accepted(token));
            return respond(&mut stream, &frame).await;
        }
        Ok(Err(refusal)) => {
            log_refusal(session, &refusal);
            let told = respond_error(&mut stream, &refusal).await;
            session.greet(Greeting::Refused(refusal));
            return told;
        }
        Err(error) => error,
    };
    session.greet(Greeting::Refused(hello_required()));
    Err(greeting)
}

/// Serves any later stream.
pub(crate) async fn serve(stream: Stream, session: &Session) -> Result<(), StreamError> {
    let mut stream = stream.compat();
    let Some(seat) = session.seat().await else {
        let error = ErrorBody::caller(
            ErrorCode::TooManyStreams,
            format!(
                "this connection has {} streams open and may have no more; end one first or open \
                 another connection",
                session.max_streams
            ),
        );
        log_refusal(session, &error);
        return respond_error(&mut stream, &error).await;
    };
    let (answer, seat) = match request(&mut stream, session).await? {
        Some(Ok(answer)) => (answer, seat),
        Some(Err(refusal)) => {
            // The client counts a stream as ended when it has the answer.
            drop(seat);
            log_refusal(session, &refusal);
            return respond_error(&mut stream, &refusal).await;
        }
        None => return Ok(()),
    };
    let Some(agent) = answer.stream else {
        drop(seat);
        return respond(&mut stream, &answer.frame).await;
    };
    let agent = std::os::unix::net::UnixStream::from(agent);
    agent.set_nonblocking(true)?;
    let mut agent = UnixStream::from_std(agent)?;
    write_frame(&mut stream, &answer.frame).await?;
    relay(&mut stream, &mut agent).await?;
    Ok(())
}

/// Reads the request and asks control. None: the client opened the stream and sent nothing.
async fn request(
    stream: &mut Compat<Stream>,
    session: &Session,
) -> Result<Option<Result<Answer, ErrorBody>>, StreamError> {
    let token = match session.token().await {
        Ok(token) => token,
        Err(refusal) => return Ok(Some(Err(refusal))),
    };
    let frame = match first_frame(stream, MAX_REQUEST).await? {
        Some(Ok(frame)) => frame,
        Some(Err(refusal)) => return Ok(Some(Err(refusal))),
        None => return Ok(None),
    };
    #[cfg(test)]
    tests::injected_panic(&frame);
    let refusal = match frame.kind {
        Kind::HELLO => ErrorBody::caller(
            ErrorCode::InvalidArgument,
            "this connection's Hello was accepted already; open another for another token",
        ),
        Kind(number) if number >= FIRST_HOST_KIND => ErrorBody::caller(
            ErrorCode::Unsupported,
            format!("kind {} is not known here", frame.kind),
        ),
        _ => return ask(stream, session, &token, frame).await.map(Some),
    };
    Ok(Some(Err(refusal)))
}

type Accepted = (Arc<str>, Frame);

/// Reads the `Hello` and has control check it.
async fn greet(
    stream: &mut Compat<Stream>,
    session: &Session,
) -> Result<Result<Accepted, ErrorBody>, StreamError> {
    // A token and a number fit well within this.
    let frame = match first_frame(stream, MAX_TOKEN.saturating_mul(4)).await? {
        Some(Ok(frame)) => frame,
        Some(Err(refusal)) => return Ok(Err(refusal)),
        None => return Ok(Err(hello_required())),
    };
    if frame.kind != Kind::HELLO {
        return Ok(Err(hello_required()));
    }
    let hello: Hello = match protocol::decode(&frame) {
        Ok(hello) => hello,
        Err(error) => return Ok(Err(error.into())),
    };
    if hello.generation < GENERATION {
        return Ok(Err(ErrorBody::caller(
            ErrorCode::GenerationUnsupported,
            format!(
                "the client speaks generation {}, this appliance {GENERATION}; update the client",
                hello.generation
            ),
        )));
    }
    if hello.token.len() > MAX_TOKEN {
        return Ok(Err(ErrorBody::caller(
            ErrorCode::Unauthenticated,
            format!("the token is longer than {MAX_TOKEN} bytes"),
        )));
    }
    session.greet(Greeting::Asked);
    let token: Arc<str> = hello.token.into();
    let answer = match ask(stream, session, &token, frame).await? {
        Ok(answer) => answer.frame,
        Err(refusal) => return Ok(Err(refusal)),
    };
    Ok(match answer.kind {
        Kind::HELLO_OK => Ok((token, answer)),
        Kind::ERROR => match protocol::message::decode_body(&answer.body) {
            Ok(refusal) => Err(refusal),
            Err(error) => Err(ErrorBody::host(ErrorCode::Internal, error.to_string())),
        },
        kind => Err(ErrorBody::host(
            ErrorCode::Internal,
            format!("control answered Hello with kind {kind}"),
        )),
    })
}

/// Waits for control's answer, or for the client to leave.
async fn ask(
    stream: &mut Compat<Stream>,
    session: &Session,
    token: &str,
    frame: Frame,
) -> Result<Result<Answer, ErrorBody>, StreamError> {
    tokio::select! {
        biased;
        result = session.desk.ask(token.to_owned(), frame.kind, frame.body) => Ok(result),
        () = reset(stream) => Err(StreamError::Abandoned),
    }
}

/// Waits until the client has reset the stream. That it sends no more is no reason to leave.
async fn reset(stream: &mut Compat<Stream>) {
    std::future::poll_fn(|cx| {
        // Reading into no room takes nothing, but asks to be woken when the stream changes.
        let _ = Pin::new(&mut *stream).poll_read(cx, &mut ReadBuf::new(&mut []));
        if stream.get_ref().is_closed() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Reads exactly one frame and not a byte more: what follows may be the agent's.
async fn first_frame(
    stream: &mut Compat<Stream>,
    most: usize,
) -> Result<Option<Result<Frame, ErrorBody>>, StreamError> {
    tokio::time::timeout(FIRST_FRAME, read_frame(stream, most))
        .await
        .unwrap_or(Err(StreamError::TooSlow(FIRST_FRAME)))
}

async fn read_frame(
    stream: &mut Compat<Stream>,
    most: usize,
) -> Result<Option<Result<Frame, ErrorBody>>, StreamError> {
    let mut head = [0; HEADER_LEN];
    let mut taken = 0_usize;
    while taken < HEADER_LEN {
        let count = stream
            .read(head.get_mut(taken..).unwrap_or_default())
            .await?;
        if count == 0 && taken == 0 {
            return Ok(None);
        }
        if count == 0 {
            let missing = HEADER_LEN.saturating_sub(taken);
            return Err(FrameError::Truncated { missing }.into());
        }
        taken = taken.saturating_add(count);
    }
    let too_large = |kind, length| {
        let message =
            format!("request of kind {kind} announces {length} bytes; at most {most} fit");
        Ok(Some(Err(ErrorBody::caller(
            ErrorCode::FrameTooLarge,
            message,
        ))))
    };
    let header = match Header::parse(head) {
        Ok(header) => header,
        Err(FrameError::TooLarge { kind, length }) => return too_large(kind, length),
        Err(error) => return Err(error.into()),
    };
    let length = header.length as usize;
    if length > most {
        return too_large(header.kind, header.length);
    }
    let mut body = Vec::with_capacity(length);
    let limit = u64::from(header.length);
    (&mut *stream).take(limit).read_to_end(&mut body).await?;
    if body.len() < length {
        let missing = length.saturating_sub(body.len());
        return Err(FrameError::Truncated { missing }.into());
    }
    Ok(Some(Ok(Frame {
        kind: header.kind,
        flags: header.flags,
        body,
    })))
}

async fn respond_error(stream: &mut Compat<Stream>, error: &ErrorBody) -> Result<(), StreamError> {
    // An error body is strings and integers: encoding it cannot fail.
    let body = protocol::message::encode_body(error).unwrap_or_default();
    let frame = Frame {
        kind: Kind::ERROR,
        flags: 0,
        body,
    };
    respond(stream, &frame).await
}

/// Writes the answer and ends the stream.
async fn respond(stream: &mut Compat<Stream>, frame: &Frame) -> Result<(), StreamError> {
    write_frame(stream, frame).await?;
    stream.shutdown().await?;
    Ok(())
}

async fn write_frame(stream: &mut Compat<Stream>, frame: &Frame) -> Result<(), StreamError> {
    // At once: every write of its own is a packet of its own.
    let mut bytes = Vec::with_capacity(HEADER_LEN.saturating_add(frame.body.len()));
    protocol::frame::append(&mut bytes, frame.kind, &frame.body)?;
    let write = async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    };
    match tokio::time::timeout(ANSWER, write).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(StreamError::TooSlow(ANSWER)),
    }
}

/// What control refuses it logs itself, but it does not know from whom it came.
fn log_refusal(session: &Session, refusal: &ErrorBody) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(
            peer = session.peer,
            code = ?refusal.code,
            // Escaped: a client's own text may be in it.
            error = ?refusal.message,
            left_out,
            "refused"
        );
    }
}

fn hello_required() -> ErrorBody {
    ErrorBody::caller(
        ErrorCode::HelloRequired,
        "the first stream of a connection begins with Hello",
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request of this kind stands for a defect that is yet to be found.
    pub(in crate::api) const PANICS: Kind = Kind(0x7fff);

    pub(super) fn injected_panic(frame: &Frame) {
        assert!(frame.kind != PANICS, "injected panic");
    }
}
