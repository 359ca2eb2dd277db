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
        // A reset reads like an end, but leaves the stream closed both ways before we closed ours.
        // It is never passed on as an end: to an agent that means that the input is over.
        let closed = down.closed;
        let is_reset = |client: &Compat<Stream>| client.get_ref().is_closed() && !closed;
        let up_ended = up.poll(cx, client, agent, is_reset)?;
        if is_reset(client) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if up_ended.is_pending() && !up.is_empty() {
            // The agent is slow, so the client is not being read. Reading into no room at all asks
            // to be woken when the client's stream changes, be it by a reset.
            let _ = Pin::new(&mut *client).poll_read(cx, &mut ReadBuf::new(&mut []));
        }
        let down_ended = down.poll(cx, agent, client, |_| false)?;
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

    /// Moves bytes until either side has to be waited for; ready when the end was passed on. Whether
    /// what reads like an end is one `is_reset` says.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        is_reset: impl Fn(&R) -> bool,
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
                        if self.ended && is_reset(reader) {
                            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                        }
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// How a way goes whose reader has ended, and whether its writer was told of an end.
    async fn ends(is_reset: bool) -> (io::Result<()>, bool) {
        let (mut reader, far) = tokio::io::duplex(64);
        drop(far);
        let (writer, mut agent) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        writer.set_nonblocking(true).expect("non-blocking");
        agent.set_nonblocking(true).expect("non-blocking");
        let mut writer = UnixStream::from_std(writer).expect("a stream");
        let mut way = Way::new(Refusal::Discards);
        let result = poll_fn(|cx| way.poll(cx, &mut reader, &mut writer, |_| is_reset)).await;
        // An end reads as nothing; while there is none, reading would block.
        (result, agent.read(&mut [0]).is_ok())
    }

    #[tokio::test]
    async fn a_reset_is_never_passed_on_as_the_end_of_the_input() {
        let (result, told) = ends(false).await;
        assert!(result.is_ok() && told);
        let (result, told) = ends(true).await;
        assert!(result.is_err() && !told);
    }
}
