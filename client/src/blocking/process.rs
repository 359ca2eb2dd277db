//! Commands and processes for code that blocks.

use std::time::Duration;

use protocol::id::ProcessId;
use protocol::process::ProcessEnded;
use protocol::processes::ProcessInfo;

use super::thread::Thread;
use super::{Vm, mirror};
use crate::{ClientError, Command, Output, ReadFrom, Record};

impl Vm {
    /// As [`Vm::exec`](crate::Vm::exec).
    pub fn exec(&self, command: Command) -> Result<Execution, ClientError> {
        let inner = self.thread.run(self.inner.exec(command))?;
        let thread = self.thread.clone();
        Ok(Execution {
            inner,
            thread,
            failed: false,
        })
    }

    /// As [`Vm::start`](crate::Vm::start).
    pub fn start(&self, command: Command) -> Result<Process, ClientError> {
        let inner = self.thread.run(self.inner.start(command))?;
        let thread = self.thread.clone();
        Ok(Process { inner, thread })
    }

    /// A process by its id. Nothing is asked yet.
    pub fn process(&self, id: ProcessId) -> Process {
        Process {
            inner: self.inner.process(id),
            thread: self.thread.clone(),
        }
    }

    mirror! {
        "Vm":
        fn processes(&self) -> Vec<ProcessInfo>;
    }
}

/// A command that runs or has run, as an iterator over what happens:
/// [`crate::Execution`] for code that blocks. Nothing follows an error.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut run = vm.exec(client::Command::shell("make"))?;
/// for output in run.by_ref() {
///     println!("{:?}", output?);
/// }
/// println!("{:?}", run.ended());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Execution {
    inner: crate::Execution,
    thread: Thread,
    failed: bool,
}

impl Execution {
    /// The process's identifier, by which it is found again.
    pub fn id(&self) -> ProcessId {
        self.inner.id()
    }

    /// The merged offset of what comes next.
    pub fn offset(&self) -> u64 {
        self.inner.offset()
    }

    /// How it ended, once the iterator has.
    pub fn ended(&self) -> Option<&ProcessEnded> {
        self.inner.ended()
    }

    /// Waits for the end; output that comes meanwhile is dropped.
    pub fn wait(self) -> Result<ProcessEnded, ClientError> {
        self.thread.run(self.inner.wait())
    }

    /// The command's input and signals, which another thread may use meanwhile.
    pub fn input(&self) -> Input {
        Input {
            inner: self.inner.input(),
            thread: self.thread.clone(),
        }
    }
}

impl Iterator for Execution {
    type Item = Result<Output, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.thread.item(&mut self.failed, self.inner.next())
    }
}

/// A command's input and signals: [`crate::Input`] for code that blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let run = vm.exec(client::Command::argv(["sort"]).stdin_pipe())?;
/// run.input().write(b"b\na\n")?;
/// run.input().end()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Input {
    inner: crate::Input,
    thread: Thread,
}

impl Input {
    mirror! {
        "Input":
        fn write(&self, bytes: &[u8]) -> ();
        fn end(&self) -> ();
        fn signal(&self, signal: u8) -> ();
        fn resize(&self, columns: u16, rows: u16) -> ();
    }
}

/// A process in a VM: [`crate::Process`] for code that blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use client::{Command, ReadFrom};
/// let server = vm.start(Command::shell("npm start"))?;
/// for record in server.follow(ReadFrom::Oldest)? {
///     println!("{:?}", record?.output);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Process {
    inner: crate::Process,
    thread: Thread,
}

impl Process {
    /// Its identifier.
    pub fn id(&self) -> ProcessId {
        self.inner.id()
    }

    /// As [`Process::follow`](crate::Process::follow).
    pub fn follow(&self, from: ReadFrom) -> Result<Follow, ClientError> {
        let inner = self.thread.run(self.inner.follow(from))?;
        Ok(self.reader(inner))
    }

    /// As [`Process::replay`](crate::Process::replay).
    pub fn replay(&self, from: ReadFrom) -> Result<Follow, ClientError> {
        let inner = self.thread.run(self.inner.replay(from))?;
        Ok(self.reader(inner))
    }

    fn reader(&self, inner: crate::Follow) -> Follow {
        Follow {
            inner,
            thread: self.thread.clone(),
            failed: false,
        }
    }

    mirror! {
        "Process":
        fn info(&self) -> ProcessInfo;
        fn wait(&self) -> ProcessInfo;
        fn wait_for(&self, time: Duration) -> ProcessInfo;
        fn tail(&self, lines: u32) -> Vec<String>;
        fn stdin(&self, bytes: &[u8]) -> ();
        fn close_stdin(&self) -> ();
        fn signal(&self, signal: u8) -> ();
        fn kill(&self, grace: Option<Duration>) -> ProcessInfo;
        fn resize(&self, columns: u16, rows: u16) -> ();
        fn forget(&self) -> ();
    }
}

/// A reader of a process's output, as an iterator: [`crate::Follow`] for code that blocks. Nothing
/// follows an error until [`Follow::resume`].
///
/// ```no_run
/// # fn example(process: client::blocking::Process) -> Result<(), Box<dyn std::error::Error>> {
/// let mut reader = process.follow(client::ReadFrom::Oldest)?;
/// while let Some(record) = reader.next() {
///     match record {
///         Ok(record) => println!("{:?}", record.output),
///         Err(client::ClientError::Lost { .. }) => reader.resume()?,
///         Err(error) => return Err(error.into()),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Follow {
    inner: crate::Follow,
    thread: Thread,
    failed: bool,
}

impl Follow {
    /// What was known of the process when reading began.
    pub fn info(&self) -> &ProcessInfo {
        self.inner.info()
    }

    /// The merged offset of what comes next.
    pub fn offset(&self) -> u64 {
        self.inner.offset()
    }

    /// How the process ended, once there is nothing more to read and if it has.
    pub fn ended(&self) -> Option<&ProcessEnded> {
        self.inner.ended()
    }

    /// After an error: reads on, on a new stream, where the old one stopped.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.thread.run(self.inner.resume())?;
        self.failed = false;
        Ok(())
    }

    /// The next record if there is one within this time; the outer none says that the time is up.
    pub fn next_within(&mut self, time: Duration) -> Option<Option<Result<Record, ClientError>>> {
        if self.failed {
            return Some(None);
        }
        let next = async { Ok(tokio::time::timeout(time, self.inner.next()).await) };
        let result = match self.thread.run(next) {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => return None,
            Err(error) => Err(error),
        };
        self.failed = result.is_err();
        Some(result.transpose())
    }
}

impl Iterator for Follow {
    type Item = Result<Record, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.thread.item(&mut self.failed, self.inner.next())
    }
}
