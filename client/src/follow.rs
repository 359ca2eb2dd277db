//! Reading a process's output from any place in it, while it runs or afterwards. A reader that
//! follows holds the process back when it is slow, and goes on by itself where a lost connection
//! left it if it is asked to.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use protocol::Kind;
use protocol::process::ProcessEnded;
use protocol::processes::{AttachProcess, OutputReplayed, ProcessAttached, ProcessInfo};

use crate::agent::{Replies, out_of_order};
use crate::error::ClientError;
use crate::exec::{Input, is_output, output};
use crate::output::{ReadFrom, Record};
use crate::process::Process;

/// A reader of a process's output: [`Process::follow`] or [`Process::replay`].
///
/// ```no_run
/// # async fn example(server: client::Process) -> Result<(), Box<dyn std::error::Error>> {
/// let mut reader = server.follow(client::ReadFrom::Oldest).await?;
/// while let Some(record) = reader.next().await? {
///     println!("at {}: {:?}", record.offset, record.output);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Follow {
    process: Process,
    follows: bool,
    info: ProcessInfo,
    replies: Replies,
    input: Input,
    offset: u64,
    over: bool,
    failed: bool,
    ended: Option<ProcessEnded>,
}

impl Follow {
    pub(crate) async fn begin(
        process: Process,
        from: ReadFrom,
        follows: bool,
    ) -> Result<Self, ClientError> {
        let (from, value) = from.on_the_wire();
        let request = AttachProcess {
            id: process.id(),
            from,
            value,
            follow: follows,
        };
        let begun = async {
            let (mut replies, requests) = process.vm().begin(&request).await?;
            let attached: ProcessAttached = replies.answer().await?;
            Ok((replies, requests, attached))
        };
        let (replies, requests, attached) = begun.await.map_err(ClientError::repeatable)?;
        Ok(Self {
            process,
            follows,
            info: attached.process,
            replies,
            input: Input::new(requests),
            offset: attached.offset,
            over: false,
            failed: false,
            ended: None,
        })
    }

    /// What was known of the process when reading began.
    pub fn info(&self) -> &ProcessInfo {
        &self.info
    }

    /// The merged offset of what comes next.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How the process ended, once there is nothing more to read and if it has.
    pub fn ended(&self) -> Option<&ProcessEnded> {
        self.ended.as_ref()
    }

    /// The process's input and signals, on the same stream; only of use while it is followed.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// What comes next; none at the end: of the process for those who follow, else of what was
    /// there at the time of asking. Dropping the call loses nothing.
    pub async fn next(&mut self) -> Result<Option<Record>, ClientError> {
        std::future::poll_fn(|cx| self.poll_record(cx)).await
    }

    /// After an error: reads on, on a new stream, where the old one stopped.
    pub async fn resume(&mut self) -> Result<(), ClientError> {
        if !self.over {
            let from = ReadFrom::Offset(self.offset);
            *self = Self::begin(self.process.clone(), from, self.follows).await?;
        }
        Ok(())
    }

    fn poll_record(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Record>, ClientError>> {
        while !self.over {
            let frame = ready!(self.replies.poll_next(cx)).map_err(ClientError::repeatable)?;
            match frame.kind {
                Kind::PROCESS_ENDED => {
                    self.ended = Some(protocol::decode(&frame)?);
                    self.over = true;
                }
                Kind::OUTPUT_REPLAYED => {
                    let replayed: OutputReplayed = protocol::decode(&frame)?;
                    if self.follows || replayed.offset != self.offset {
                        return Poll::Ready(Err(out_of_order(&frame)));
                    }
                    self.over = true;
                }
                kind if is_output(kind) => {
                    if let Some(output) = output(frame)? {
                        let offset = self.offset;
                        self.offset = offset.saturating_add(output.length());
                        return Poll::Ready(Ok(Some(Record { offset, output })));
                    }
                }
                _ => {}
            }
        }
        Poll::Ready(Ok(None))
    }
}

/// The same as [`Follow::next`]; nothing follows an error.
impl Stream for Follow {
    type Item = Result<Record, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_record(cx));
        self.failed = result.is_err();
        Poll::Ready(result.transpose())
    }
}
