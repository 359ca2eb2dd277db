//! Bytes both ways between a visitor and a guest, once a WebSocket is made. An idle tunnel holds no
//! buffer, so that tens of thousands of them cost little; a slow receiver holds the sender back.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Bytes read at a time.
const PIECE: usize = 8 * 1024;

/// One direction.
#[derive(Debug, Default)]
struct Way {
    /// Read and not yet written, from `at` on.
    rest: Vec<u8>,
    at: usize,
    /// Written and not yet flushed.
    unflushed: bool,
    ended: bool,
    done: bool,
}

/// Carries bytes until both directions have ended, one fails, or the second outlives the first by
/// more than `half_closed`.
pub(crate) async fn run<A, B>(mut a: A, mut b: B, half_closed: Duration) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Way::default(), Way::default());
    let first = poll_fn(|cx| {
        let there_done = there.poll(cx, &mut a, &mut b)?.is_ready();
        let back_done = back.poll(cx, &mut b, &mut a)?.is_ready();
        if there_done || back_done {
            Poll::Ready(Ok::<_, io::Error>(()))
        } else {
            Poll::Pending
        }
    });
    first.await?;
    let second = poll_fn(|cx| {
        let there_done = there.poll(cx, &mut a, &mut b)?.is_ready();
        let back_done = back.poll(cx, &mut b, &mut a)?.is_ready();
        if there_done && back_done {
            Poll::Ready(Ok::<_, io::Error>(()))
        } else {
            Poll::Pending
        }
    });
    let deadline = Instant::now().checked_add(half_closed);
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, second)
            .await
            .unwrap_or(Ok(())),
        None => second.await,
    }
}

impl Way {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        loop {
            while let Some(rest) = self.rest.get(self.at..).filter(|rest| !rest.is_empty()) {
                let count = ready!(Pin::new(&mut *to).poll_write(cx, rest))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.at = self.at.saturating_add(count);
                self.unflushed = true;
            }
            if !self.rest.is_empty() {
                self.rest = Vec::new();
                self.at = 0;
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let mut piece = [0; PIECE];
            let mut read = ReadBuf::new(&mut piece);
            match Pin::new(&mut *from).poll_read(cx, &mut read)? {
                Poll::Ready(()) if read.filled().is_empty() => self.ended = true,
                Poll::Ready(()) => {
                    let bytes = read.filled();
                    let count = match Pin::new(&mut *to).poll_write(cx, bytes)? {
                        Poll::Ready(0) => {
                            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                        }
                        Poll::Ready(count) => count,
                        Poll::Pending => 0,
                    };
                    self.unflushed = true;
                    self.rest = bytes.get(count..).unwrap_or_default().to_vec();
                }
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *to).poll_flush(cx))?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn every_byte_arrives_in_order_also_through_a_narrow_place() {
        let (mut near, a) = duplex(7);
        let (b, mut far) = duplex(5);
        let tunnel = tokio::spawn(run(a, b, Duration::from_secs(60)));
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let sent = bytes.clone();
        let writer = tokio::spawn(async move {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
            let mut answer = String::new();
            near.read_to_string(&mut answer).await.unwrap();
            answer
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        assert!(got == bytes, "{} bytes", got.len());
        far.write_all(b"after the end of the other direction")
            .await
            .unwrap();
        drop(far);
        assert_eq!(
            writer.await.unwrap(),
            "after the end of the other direction"
        );
        tunnel.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn half_a_tunnel_ends_by_its_limit() {
        let (near, a) = duplex(7);
        let (b, _far) = duplex(5);
        let tunnel = tokio::spawn(run(a, b, Duration::from_millis(1)));
        drop(near);
        tunnel.await.unwrap().unwrap();
    }
}
