//! Streams to the agent of a VM: what it says, frame by frame, and what is said to it. An early end
//! is told apart: either the connection to the appliance was lost, or this stream alone ended.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use protocol::vm::Opened;
use protocol::{ErrorBody, Frame, Kind, Message};
use tokio::io::{ReadHalf, WriteHalf};
use tokio_util::compat::Compat;

use crate::connection::Place;
use crate::error::ClientError;
use crate::frames::{self, FrameWriter, Frames};

pub(crate) type Io = Compat<yamux::Stream>;

/// A stream to a VM's agent.
///
/// ```no_run
/// # async fn example(client: client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let stream = client.vm("web".parse()?).open().await?;
/// println!("{:?}", stream.opened);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AgentStream {
    /// Which VM, and which of its runs.
    pub opened: Opened,
    pub(crate) io: Io,
    pub(crate) before: Vec<u8>,
    pub(crate) place: Place,
}

impl AgentStream {
    /// Its two directions.
    pub(crate) fn split(self) -> (Replies, Requests) {
        let (read, write) = tokio::io::split(self.io);
        let place = Arc::new(self.place);
        let replies = Replies {
            frames: Frames::resume(read, &self.before),
            place: Arc::clone(&place),
            why: None,
        };
        let write = FrameWriter::new(write);
        (replies, Requests { write, place })
    }
}

type Why = Pin<Box<dyn Future<Output = ClientError> + Send>>;

/// The frames of an agent.
pub(crate) struct Replies {
    frames: Frames<ReadHalf<Io>>,
    place: Arc<Place>,
    /// The stream has ended and this finds out why.
    why: Option<Why>,
}

impl fmt::Debug for Replies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Replies").finish_non_exhaustive()
    }
}

impl Replies {
    /// The next frame. An error frame is an error, and so is an end: the agent's last frame says
    /// that it is the last. Dropping the call loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Frame, ClientError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, ClientError>> {
        loop {
            if let Some(why) = &mut self.why {
                let error = ready!(why.as_mut().poll(cx));
                self.why = None;
                return Poll::Ready(Err(error));
            }
            let otherwise = match ready!(self.frames.poll_next(cx)) {
                Ok(Some(frame)) if frame.kind == Kind::ERROR => {
                    let body: ErrorBody = protocol::message::decode_body(&frame.body)?;
                    return Poll::Ready(Err(ClientError::refused(body)));
                }
                Ok(Some(frame)) => return Poll::Ready(Ok(frame)),
                Ok(None) | Err(ClientError::Lost { .. }) => ClientError::AgentGone,
                // An end inside a frame may be the connection's, too.
                Err(error) => error,
            };
            let place = Arc::clone(&self.place);
            self.why = Some(Box::pin(async move { place.why(otherwise).await }));
        }
    }

    /// The next frame, which has to be an `A`.
    pub(crate) async fn answer<A: Message>(&mut self) -> Result<A, ClientError> {
        Ok(protocol::decode(&self.next().await?)?)
    }

    /// Whatever else the stream carries, as raw bytes, and what of it was read already.
    pub(crate) fn into_raw(self) -> (ReadHalf<Io>, Vec<u8>) {
        self.frames.into_parts()
    }
}

/// What is said to an agent.
#[derive(Debug)]
pub(crate) struct Requests {
    write: FrameWriter<WriteHalf<Io>>,
    place: Arc<Place>,
}

impl Requests {
    pub(crate) async fn send<M: Message>(&mut self, message: &M) -> Result<(), ClientError> {
        let bytes = frames::encode(message)?;
        self.send_bytes(bytes).await
    }

    pub(crate) async fn send_raw(&mut self, kind: Kind, body: &[u8]) -> Result<(), ClientError> {
        let bytes = frames::framed(kind, body)?;
        self.send_bytes(bytes).await
    }

    /// Whole frames. Dropping the call leaves the stream in order: they are sent to their end
    /// before the next ones, or not at all.
    pub(crate) async fn send_bytes(&mut self, bytes: Vec<u8>) -> Result<(), ClientError> {
        match self.write.write(bytes).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.place.why(ClientError::AgentGone).await),
        }
    }

    /// Nothing more will be said.
    pub(crate) async fn end(&mut self) -> Result<(), ClientError> {
        match self.write.end().await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.place.why(ClientError::AgentGone).await),
        }
    }

    pub(crate) fn into_raw(self) -> (WriteHalf<Io>, Arc<Place>) {
        (self.write.into_inner(), self.place)
    }
}

/// Says something long while listening: an agent may refuse in the middle of it. Gives the first
/// frame that matters; `is_aside` are those that do not.
pub(crate) async fn converse(
    replies: &mut Replies,
    saying: impl Future<Output = Result<(), ClientError>>,
    is_aside: impl Fn(&Frame) -> bool,
) -> Result<Frame, ClientError> {
    let mut saying = std::pin::pin!(saying);
    let mut said = None;
    loop {
        tokio::select! {
            biased;
            frame = replies.next() => match frame {
                Ok(frame) if is_aside(&frame) => {}
                // Our own trouble comes first: the agent only saw us stop.
                result => return match said {
                    Some(Err(error)) if result.is_err() && !is_answer(&result) => Err(error),
                    _ => result,
                },
            },
            result = &mut saying, if said.is_none() => match result {
                // What the agent does not take any more is explained by what it answers.
                Err(error @ (ClientError::AgentGone | ClientError::Lost { .. })) => {
                    said = Some(Err(error));
                }
                Err(error) => return Err(error),
                Ok(()) => said = Some(Ok(())),
            },
        }
    }
}

fn is_answer(result: &Result<Frame, ClientError>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => error.body().is_some(),
    }
}

/// A frame that has no place where it came.
pub(crate) fn out_of_order(frame: &Frame) -> ClientError {
    ClientError::Broken(format!("the agent sent kind {} out of order", frame.kind))
}
