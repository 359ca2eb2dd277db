//! What to run in a VM, and how.

use std::time::Duration;

use protocol::id::ProcessId;
use protocol::process::{CommandMode, OutputMode, StartProcess, StdinMode, TerminalSize};

use crate::error::ClientError;
use crate::vm::Repeat;

/// What to run.
///
/// ```
/// use client::Command;
/// let build = Command::shell("make -j2").cwd("project").env("CC", "clang");
/// let server = Command::argv(["node", "server.js"]).user("www-data");
/// # let _ = (build, server);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    id: Option<ProcessId>,
    mode: CommandMode,
    command: Vec<Vec<u8>>,
    cwd: Vec<u8>,
    env: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    stdin: StdinMode,
    user: Vec<u8>,
    deadline_ms: Option<u64>,
    memory_bytes: Option<u64>,
    terminal: Option<TerminalSize>,
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
            id: None,
            mode,
            command,
            cwd: Vec::new(),
            env: Vec::new(),
            stdin: StdinMode::Null,
            user: Vec::new(),
            deadline_ms: None,
            memory_bytes: None,
            terminal: None,
        }
    }

    /// The process's identifier; without this one is made up. A second start with the same one
    /// attaches to the process instead of starting another.
    #[must_use]
    pub fn id(mut self, id: ProcessId) -> Self {
        self.id = Some(id);
        self
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

    /// Gives it a standard input that [`Input::write`](crate::Input::write) writes to; without this it is /dev/null.
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

    /// Gives it a terminal of this size; then everything it writes is standard output, and what
    /// is written to it are keys.
    #[must_use]
    pub fn terminal(mut self, columns: u16, rows: u16) -> Self {
        self.terminal = Some(TerminalSize { columns, rows });
        self
    }

    /// Without an id of the caller's a repeat would be another process.
    pub(crate) fn repeat(&self) -> Repeat {
        if self.id.is_some() {
            Repeat::Safe
        } else {
            Repeat::Unsafe
        }
    }

    pub(crate) fn into_request(self, output: OutputMode) -> Result<StartProcess, ClientError> {
        let id = match self.id {
            Some(id) => id,
            None => new_process_id()?,
        };
        Ok(StartProcess {
            id,
            mode: self.mode,
            command: self.command,
            cwd: self.cwd,
            env: self.env,
            stdin: self.stdin,
            output,
            user: self.user,
            deadline_ms: self.deadline_ms,
            memory_bytes: self.memory_bytes,
            terminal: self.terminal,
        })
    }
}

/// A fresh identifier for a process.
pub fn new_process_id() -> Result<ProcessId, ClientError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(ClientError::Random)?;
    Ok(ProcessId(id))
}
