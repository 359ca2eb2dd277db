//! Bytes between a client's stream and the agent's, undecoded, both ways at once. Each way has one
//! bounded buffer and its own end: a half-close passes through, a reset ends both. Nothing here
//! needs control, so a relay outlives it.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::compat::Compat;
use yamux::Stream;

/// Bytes held for each way. A sender's largest data frame fits.
const BUFFER: usize = 64 << 10;

/// Runs until both ways have ended or one has failed.
pub(crate) async fn relay(client: &mut Compat<Stream>, agent: &mut UnixStream) -> io::Result<()> {
    // An agent that has ended may still have something to say: only what it sent ends its way.
    let mut up = Way::new(Refusal::Discards);
    let mut down = Way::new(Refusal::Ends);
    poll_fn(|cx| {
        let up_ended = up.poll(cx, client, agent)?;
        // A reset reads like an end, but leaves the stream closed both ways before we closed ours.
        if client.get_ref().is_closed() && !down.closed {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if up_ended.is_pending() && !up.is_empty() {
            // The agent is slow, so the client is not being read. Reading into no room at all asks
            // to be woken when the client's stream changes, be it by a reset.
            let _ = Pin::new(&mut *client).poll_read(cx, &mut ReadBuf::new(&mut []));
        }
        let down_ended = down.poll(cx, agent, client)?;
        // Nobody takes what the client sends, and it has been told that nothing more comes.
        let deaf = up.discarding && down.closed;
        if down_ended.is_ready() && (up_ended.is_ready() || deaf) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// What a writer that takes no more means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The end of both ways.
    Ends,
    /// What comes for it from then on is thrown away.
    Discards,
}

/// One direction.
struct Way {
    refusal: Refusal,
    /// The writer takes no more.
    discarding: bool,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The reader has nothing more.
    ended: bool,
    /// Bytes were written since the last flush.
    unflushed: bool,
    /// The writer was told that nothing more comes.
    closed: bool,
}

impl Way {
    fn new(refusal: Refusal) -> Self {
        Self {
            refusal,
            discarding: false,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
            unflushed: false,
            closed: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Moves bytes until either side has to be waited for; ready when the end was passed on.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        // Bounds the work of one wake-up, so that a busy stream cannot hold its thread.
        let mut turns = 0_u8;
        loop {
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            turns = turns.saturating_add(1);
            if turns > 16 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.discarding {
                self.start = self.end;
            }
            if !self.is_empty() {
                let waiting = self.buffer.get(self.start..self.end).unwrap_or_default();
                match ready!(Pin::new(&mut *writer).poll_write(cx, waiting)) {
                    Ok(0) => self.refused(io::ErrorKind::WriteZero.into())?,
                    Ok(written) => {
                        self.start = self.start.saturating_add(written);
                        self.unflushed = true;
                    }
                    Err(error) => self.refused(error)?,
                }
            } else if self.ended {
                if !self.discarding
                    && let Err(error) = ready!(Pin::new(&mut *writer).poll_shutdown(cx))
                {
                    self.refused(error)?;
                }
                self.closed = true;
            } else {
                let mut room = ReadBuf::new(&mut self.buffer);
                match Pin::new(&mut *reader).poll_read(cx, &mut room)? {
                    Poll::Ready(()) => {
                        self.start = 0;
                        self.end = room.filled().len();
                        self.ended = self.end == 0;
                    }
                    Poll::Pending => {
                        if self.unflushed && !self.discarding {
                            if let Err(error) = ready!(Pin::new(&mut *writer).poll_flush(cx)) {
                                self.refused(error)?;
                            }
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn refused(&mut self, error: io::Error) -> io::Result<()> {
        match self.refusal {
            Refusal::Ends => Err(error),
            Refusal::Discards => {
                self.discarding = true;
                Ok(())
            }
        }
    }
}
