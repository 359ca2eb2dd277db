//! A command in a VM: its output as it comes, its input, its signals, its end. The last frame ends
//! it; nothing waits for the peer after that.

use std::sync::Arc;
use std::time::Duration;

use protocol::frame::MAX_DATA;
use protocol::id::ProcessId;
use protocol::process::{
    CommandMode, OutputMode, ProcessEnded, ProcessStarted, SignalProcess, StartProcess, StdinMode,
};
use protocol::{ErrorBody, Kind};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::Mutex;
use tokio_util::compat::Compat;

use crate::api::AgentStream;
use crate::connection::Place;
use crate::error::ClientError;
use crate::frames::{self, Frames};

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    mode: CommandMode,
    command: Vec<Vec<u8>>,
    cwd: Vec<u8>,
    env: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    stdin: StdinMode,
    user: Vec<u8>,
    deadline_ms: Option<u64>,
    memory_bytes: Option<u64>,
}

impl Command {
    /// A program and its arguments, without a shell.
    pub fn argv<T: Into<Vec<u8>>>(arguments: impl IntoIterator<Item = T>) -> Self {
        Self::new(
            CommandMode::Argv,
            arguments.into_iter().map(Into::into).collect(),
        )
    }

    /// One line for `sh -c`.
    pub fn shell(line: impl Into<Vec<u8>>) -> Self {
        Self::new(CommandMode::Shell, vec![line.into()])
    }

    fn new(mode: CommandMode, command: Vec<Vec<u8>>) -> Self {
        Self {
            mode,
            command,
            cwd: Vec::new(),
            env: Vec::new(),
            stdin: StdinMode::Null,
            user: Vec::new(),
            deadline_ms: None,
            memory_bytes: None,
        }
    }

    /// Where to run it; a relative directory starts at /workspace.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<Vec<u8>>) -> Self {
        self.cwd = directory.into();
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        self.env.push((key.into(), Some(value.into())));
        self
    }

    /// Takes a variable away.
    #[must_use]
    pub fn env_remove(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.env.push((key.into(), None));
        self
    }

    /// Gives it a standard input that [`Input::write`] writes to; without this it is /dev/null.
    #[must_use]
    pub fn stdin_pipe(mut self) -> Self {
        self.stdin = StdinMode::Pipe;
        self
    }

    /// Runs it as a user of the VM, by name or number; without this as root.
    #[must_use]
    pub fn user(mut self, user: impl Into<Vec<u8>>) -> Self {
        self.user = user.into();
        self
    }

    /// Ends it after so long, first with SIGTERM; without this it may take for ever.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline_ms = Some(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// How many bytes of memory it and what it starts may use together.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory_bytes = Some(bytes);
        self
    }

    pub(crate) fn into_request(self) -> Result<StartProcess, ClientError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(ClientError::Random)?;
        Ok(StartProcess {
            id: ProcessId(id),
            mode: self.mode,
            command: self.command,
            cwd: self.cwd,
            env: self.env,
            stdin: self.stdin,
            output: OutputMode::Follow,
            user: self.user,
            deadline_ms: self.deadline_ms,
            memory_bytes: self.memory_bytes,
            terminal: None,
        })
    }
}

/// Something that happened to a running command.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// It runs, with this process identifier inside the VM.
    Started {
        /// For people; it may be reused.
        pid: u32,
    },
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
}

/// A command that runs or has run. Dropping it leaves the command to the agent.
#[derive(Debug)]
pub struct Execution {
    frames: Frames<ReadHalf<Io>>,
    input: Input,
    started: bool,
    ended: Option<ProcessEnded>,
    _place: Place,
}

type Io = Compat<yamux::Stream>;

impl Execution {
    /// Starts the command on an agent's stream.
    pub async fn start(
        mut stream: AgentStream,
        request: &StartProcess,
    ) -> Result<Self, ClientError> {
        frames::write(&mut stream.io, request).await?;
        Ok(Self::on(stream))
    }

    /// The command whose request was sent on this stream already.
    pub(crate) fn on(stream: AgentStream) -> Self {
        let (read, write) = tokio::io::split(stream.io);
        Self {
            frames: Frames::resume(read, &stream.before),
            input: Input(Arc::new(Mutex::new(write))),
            started: false,
            ended: None,
            _place: stream.place,
        }
    }

    /// What happens next; none when the command has ended: see [`Execution::ended`]. Dropping the
    /// call loses nothing.
    pub async fn next(&mut self) -> Result<Option<Output>, ClientError> {
        loop {
            if self.ended.is_some() {
                return Ok(None);
            }
            let Some(frame) = self.frames.next().await.map_err(gone)? else {
                return Err(ClientError::AgentGone);
            };
            match frame.kind {
                Kind::PROCESS_STARTED if !self.started => {
                    let started: ProcessStarted = protocol::decode(&frame)?;
                    self.started = true;
                    return Ok(Some(Output::Started { pid: started.pid }));
                }
                Kind::STDOUT if self.started => return Ok(Some(Output::Stdout(frame.body))),
                Kind::STDERR if self.started => return Ok(Some(Output::Stderr(frame.body))),
                Kind::PROCESS_ENDED => self.ended = Some(protocol::decode(&frame)?),
                Kind::ERROR => {
                    let error: ErrorBody = protocol::decode(&frame)?;
                    return Err(ClientError::Refused(error));
                }
                Kind::PROCESS_STARTED | Kind::STDOUT | Kind::STDERR => {
                    return Err(ClientError::Broken(format!(
                        "the agent sent kind {} out of order",
                        frame.kind
                    )));
                }
                // A newer agent may say more than we know.
                _ => {}
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

/// An end inside a frame or a failed read: whichever it was, the stream into the VM is gone.
fn gone(error: ClientError) -> ClientError {
    match error {
        ClientError::Lost(_) => ClientError::AgentGone,
        other => other,
    }
}

/// A command's input and signals. Clones write to the same command, one frame at a time; a signal
/// waits for input that was written before it.
#[derive(Clone, Debug)]
pub struct Input(Arc<Mutex<WriteHalf<Io>>>);

impl Input {
    /// Writes bytes to the standard input, waiting while the command does not read.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ClientError> {
        for chunk in bytes.chunks(MAX_DATA) {
            frames::write_raw(&mut *self.0.lock().await, Kind::STDIN, chunk).await?;
        }
        Ok(())
    }

    /// Says that no more standard input comes.
    pub async fn end(&self) -> Result<(), ClientError> {
        frames::write_raw(&mut *self.0.lock().await, Kind::STDIN_END, &[]).await
    }

    /// Sends a signal to the command's process group, by its number on Linux x86-64.
    pub async fn signal(&self, signal: u8) -> Result<(), ClientError> {
        frames::write(&mut *self.0.lock().await, &SignalProcess { signal }).await
    }
}
