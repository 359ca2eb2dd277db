//! Standard input as a writer: at most one frame waits while the process does not read.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use protocol::frame::MAX_DATA;
use tokio::io::AsyncWrite;

use crate::error::ClientError;
use crate::exec::Input;

type Sending = Pin<Box<dyn Future<Output = Result<(), ClientError>> + Send>>;

/// A command's standard input as [`AsyncWrite`], made by [`Input::writer`]. To shut it down closes
/// the input; to drop it does not. It takes one frame ahead of what was sent: flush it before
/// dropping it, or the last 64 KiB may not arrive.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio::io::AsyncWriteExt;
/// let run = vm.exec(client::Command::shell("tar x").stdin_pipe()).await?;
/// let mut archive = tokio::fs::File::open("site.tar").await?;
/// let mut input = run.input().writer();
/// tokio::io::copy(&mut archive, &mut input).await?;
/// input.shutdown().await?;
/// # Ok(())
/// # }
/// ```
pub struct InputWriter {
    input: Input,
    sending: Option<Sending>,
    ended: bool,
}

impl fmt::Debug for InputWriter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("InputWriter")
            .finish_non_exhaustive()
    }
}

impl InputWriter {
    pub(crate) fn new(input: Input) -> Self {
        Self {
            input,
            sending: None,
            ended: false,
        }
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(sending) = &mut self.sending {
            let sent = ready!(sending.as_mut().poll(cx));
            self.sending = None;
            sent?;
        }
        Poll::Ready(Ok(()))
    }
}

/// An error inside is a [`ClientError`].
impl AsyncWrite for InputWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_sent(cx))?;
        let bytes = bytes.get(..MAX_DATA).unwrap_or(bytes).to_vec();
        let count = bytes.len();
        let input = self.input.clone();
        self.sending = Some(Box::pin(async move { input.write(&bytes).await }));
        // It is taken; what becomes of it is told by the next call.
        match self.poll_sent(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(count)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_sent(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sent(cx))?;
        if !self.ended {
            self.ended = true;
            let input = self.input.clone();
            self.sending = Some(Box::pin(async move { input.end().await }));
        }
        self.poll_sent(cx)
    }
}
