//! A command in a VM: its output as it comes, its input, its signals, its end. The last frame ends
//! it; nothing waits for the peer after that.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::Stream;
use protocol::frame::MAX_DATA;
use protocol::id::ProcessId;
use protocol::process::{
    OutputGap, OutputMode, ProcessEnded, ProcessStarted, ResizeTerminal, SignalProcess,
    StartProcess, TerminalSize,
};
use protocol::{Frame, Kind};
use tokio::sync::Mutex;

use crate::agent::{AgentStream, Replies, Requests, out_of_order};
use crate::command::Command;
use crate::error::ClientError;
use crate::output::Output;
use crate::typing::InputWriter;
use crate::vm::Vm;

/// How often a start whose connection was lost is sent again. Its id makes that harmless.
pub(crate) const REPEATS: u32 = 2;

impl Vm {
    /// Runs a command whose output comes to us and is never lost: while we do not read it, the
    /// command is held back.
    pub async fn exec(&self, command: Command) -> Result<Execution, ClientError> {
        let repeat = command.repeat();
        let request = command.into_request(OutputMode::Follow)?;
        let mut left = REPEATS;
        loop {
            match self.begin(&request).await {
                Ok((replies, requests)) => {
                    return Ok(Execution::on(request.id, replies, requests));
                }
                Err(ClientError::Lost { .. }) if left > 0 => left = left.saturating_sub(1),
                Err(error) => return Err(repeat.mark(error)),
            }
        }
    }
}

/// A command that runs or has run. Dropping it leaves the command to the agent, and
/// [`Vm::process`] finds it again.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use client::{Command, Output};
/// let mut run = vm.exec(Command::shell("make")).await?;
/// while let Some(output) = run.next().await? {
///     if let Output::Stdout(bytes) | Output::Stderr(bytes) = output {
///         print!("{}", String::from_utf8_lossy(&bytes));
///     }
/// }
/// println!("ended with {:?}", run.ended().map(|ended| ended.exit_code));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Execution {
    id: ProcessId,
    replies: Replies,
    input: Input,
    started: bool,
    ended: Option<ProcessEnded>,
    offset: u64,
    failed: bool,
}

impl Execution {
    /// Starts the command on an agent's stream.
    pub async fn start(stream: AgentStream, request: &StartProcess) -> Result<Self, ClientError> {
        let (replies, mut requests) = stream.split();
        requests.send(request).await?;
        Ok(Self::on(request.id, replies, requests))
    }

    /// The command whose request was sent on this stream already.
    fn on(id: ProcessId, replies: Replies, requests: Requests) -> Self {
        Self {
            id,
            replies,
            input: Input::new(requests),
            started: false,
            ended: None,
            offset: 0,
            failed: false,
        }
    }

    /// The process's identifier, by which it is found again.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// The merged offset of what comes next: where to follow on after a broken connection.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What happens next; none when the command has ended: see [`Execution::ended`]. Dropping the
    /// call loses nothing.
    pub async fn next(&mut self) -> Result<Option<Output>, ClientError> {
        std::future::poll_fn(|cx| self.poll_output(cx)).await
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Output>, ClientError>> {
        loop {
            if self.ended.is_some() {
                return Poll::Ready(Ok(None));
            }
            // To run it again would be to run it twice; it is to be followed on.
            let frame = ready!(self.replies.poll_next(cx))?;
            match frame.kind {
                Kind::PROCESS_STARTED if !self.started => {
                    let started: ProcessStarted = protocol::decode(&frame)?;
                    self.started = true;
                    return Poll::Ready(Ok(Some(Output::Started { pid: started.pid })));
                }
                Kind::PROCESS_ENDED => self.ended = Some(protocol::decode(&frame)?),
                kind if is_output(kind) && !self.started => {
                    return Poll::Ready(Err(out_of_order(&frame)));
                }
                Kind::PROCESS_STARTED => return Poll::Ready(Err(out_of_order(&frame))),
                _ => {
                    if let Some(output) = output(frame)? {
                        self.offset = self.offset.saturating_add(output.length());
                        return Poll::Ready(Ok(Some(output)));
                    }
                }
            }
        }
    }

    /// How it ended, once [`Execution::next`] has given none.
    pub fn ended(&self) -> Option<&ProcessEnded> {
        self.ended.as_ref()
    }

    /// Waits for the end; output that comes meanwhile is dropped.
    pub async fn wait(mut self) -> Result<ProcessEnded, ClientError> {
        while self.next().await?.is_some() {}
        self.ended.ok_or(ClientError::AgentGone)
    }

    /// The command's input and signals.
    pub fn input(&self) -> Input {
        self.input.clone()
    }
}

/// The same as [`Execution::next`]; nothing follows an error.
impl Stream for Execution {
    type Item = Result<Output, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_output(cx));
        self.failed = result.is_err();
        Poll::Ready(result.transpose())
    }
}

pub(crate) fn is_output(kind: Kind) -> bool {
    matches!(kind, Kind::STDOUT | Kind::STDERR | Kind::OUTPUT_GAP)
}

/// The output in a frame; a newer agent may say more than we know.
pub(crate) fn output(frame: Frame) -> Result<Option<Output>, ClientError> {
    Ok(Some(match frame.kind {
        Kind::STDOUT => Output::Stdout(frame.body),
        Kind::STDERR => Output::Stderr(frame.body),
        Kind::OUTPUT_GAP => Output::Gap {
            bytes: protocol::decode::<OutputGap>(&frame)?.bytes,
        },
        _ => return Ok(None),
    }))
}

/// A command's input and signals. Clones write to the same command, one frame at a time; a signal
/// waits for input that was written before it.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let run = vm.exec(client::Command::argv(["sort"]).stdin_pipe()).await?;
/// run.input().write(b"b\na\n").await?;
/// run.input().end().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Input(Arc<Mutex<Requests>>);

impl Input {
    pub(crate) fn new(requests: Requests) -> Self {
        Self(Arc::new(Mutex::new(requests)))
    }

    /// Writes bytes to the standard input, waiting while the command does not read. A call that is
    /// dropped has sent some first part of them, and what is written next comes behind that part.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ClientError> {
        for chunk in bytes.chunks(MAX_DATA) {
            self.0.lock().await.send_raw(Kind::STDIN, chunk).await?;
        }
        Ok(())
    }

    /// The same as a writer.
    pub fn writer(&self) -> InputWriter {
        InputWriter::new(self.clone())
    }

    /// Says that no more standard input comes.
    pub async fn end(&self) -> Result<(), ClientError> {
        self.0.lock().await.send_raw(Kind::STDIN_END, &[]).await
    }

    /// Sends a signal to the command's process group, by its number on Linux x86-64.
    pub async fn signal(&self, signal: u8) -> Result<(), ClientError> {
        self.0.lock().await.send(&SignalProcess { signal }).await
    }

    /// Changes the size of its terminal.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), ClientError> {
        let size = TerminalSize { columns, rows };
        self.0.lock().await.send(&ResizeTerminal { size }).await
    }

    /// Sends what has no place here: the answer is `Unsupported`, and tells that everything before
    /// it has been taken.
    pub(crate) async fn ask_for_an_answer(&self) -> Result<(), ClientError> {
        self.0.lock().await.send_raw(Kind::HELLO, &[]).await
    }
}
