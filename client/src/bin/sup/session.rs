//! A person or a pipe at one end, a process in a VM at the other: its output as it comes, our input
//! as it comes, Ctrl-C or every key to the process. It waits for the process's end and for nothing
//! else, least of all for our own standard input.

use std::os::fd::AsFd;
use std::time::Duration;

use client::protocol::process::ProcessEnded;
use client::protocol::vm::VmRef;
use client::{Client, ClientError, Execution, Follow, Input, Output};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::complaint::{Complaint, harmless};
use crate::show::end_reason;
use crate::terminal::{self, Raw};

/// SIGINT on Linux.
const SIGINT: u8 = 2;

/// What a shell returns for a command that SIGINT ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// What a shell returns for a command whose reader went away (128 + SIGPIPE).
pub(crate) const READER_GONE: u8 = 141;

/// 128 + SIGHUP and 128 + SIGTERM.
const HUNG_UP: u8 = 129;
const TERMINATED: u8 = 143;

/// Ctrl-], which leaves a process that one is attached to.
const LEAVE: u8 = 0x1d;

/// Reads of keys that wait while the process takes none.
const TYPED_AHEAD: usize = 64;

/// How long who leaves waits until the process has what was typed before.
const LEAVING: Duration = Duration::from_secs(1);

/// Where the output comes from.
pub(crate) enum Source {
    Started(Execution),
    Attached(Box<Follow>),
}

impl Source {
    async fn next(&mut self) -> Result<Option<Output>, ClientError> {
        match self {
            Self::Started(execution) => execution.next().await,
            Self::Attached(follow) => Ok(follow.next().await?.map(|record| record.output)),
        }
    }

    fn ended(&self) -> Option<&ProcessEnded> {
        match self {
            Self::Started(execution) => execution.ended(),
            Self::Attached(follow) => follow.ended(),
        }
    }

    fn input(&self) -> Input {
        match self {
            Self::Started(execution) => execution.input(),
            Self::Attached(follow) => follow.input(),
        }
    }
}

pub(crate) enum Stop {
    /// Nobody reads our standard output any more.
    ReaderGone,
    /// Our own output could not be written, say because the disk that it goes to is full.
    Unwritten(std::io::Error),
    Client(ClientError),
}

/// What is to be done besides showing output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Manner {
    /// Pass our input on.
    pub(crate) input: bool,
    /// The process has a terminal: ours, if we have one, becomes its.
    pub(crate) terminal: bool,
    /// Ctrl-] leaves it alone.
    pub(crate) may_leave: bool,
}

/// Stays with the process to its end; gives its exit code.
pub(crate) async fn stay(
    client: &Client,
    vm: &VmRef,
    mut source: Source,
    manner: Manner,
    mut interrupts: Interrupts,
) -> Result<u8, Complaint> {
    let input = source.input();
    let raw = enter_raw(manner.terminal)?;
    let mut ends = Ends::new(raw.is_some())?;
    let resizing = manner
        .terminal
        .then(|| tokio::spawn(forward_sizes(input.clone())));
    let keys = manner.may_leave && raw.is_some();
    let (left, mut leaving) = oneshot::channel();
    let forwarding = manner.input.then(|| {
        if keys {
            tokio::spawn(forward_keys(input.clone(), left))
        } else {
            tokio::spawn(forward_stdin(input.clone()))
        }
    });
    let result = tokio::select! {
        result = forward_output(&mut source) => result,
        () = interrupt(&mut interrupts, &input) => return Ok(INTERRUPTED),
        code = ends.next() => return Ok(code),
        () = wait_for(&mut leaving), if keys => {
            drop(raw);
            eprintln!("sup: the process goes on; `sup attach` returns to it");
            return Ok(0);
        }
    };
    drop(raw);
    for task in [forwarding, resizing].into_iter().flatten() {
        task.abort();
    }
    match result {
        Ok(()) => {}
        Err(Stop::ReaderGone) => return Ok(READER_GONE),
        Err(Stop::Unwritten(error)) => return Err(cannot_write(&error)),
        Err(Stop::Client(error)) => return Err(explain(client, vm, &error).await),
    }
    match source.ended() {
        Some(ended) => Ok(report(ended)),
        None => Err(explain(client, vm, &ClientError::AgentGone).await),
    }
}

fn enter_raw(wanted: bool) -> Result<Option<Raw>, Complaint> {
    if !wanted {
        return Ok(None);
    }
    Raw::enter().map_err(|error| Complaint::new("setting up the terminal", error.to_string()))
}

/// Only a message ends this: a sender that was merely dropped does not.
async fn wait_for(leaving: &mut oneshot::Receiver<()>) {
    if leaving.await.is_err() {
        std::future::pending().await
    }
}

pub(crate) async fn forward_output(source: &mut Source) -> Result<(), Stop> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    while let Some(output) = source.next().await.map_err(Stop::Client)? {
        match output {
            Output::Stdout(bytes) => write(&mut stdout, &bytes).await?,
            Output::Stderr(bytes) => write(&mut stderr, &bytes).await?,
            Output::Gap { bytes } => {
                let message = format!("sup: {bytes} bytes of output are no longer kept\n");
                write(&mut stderr, message.as_bytes()).await?;
            }
            _ => {}
        }
    }
    Ok(())
}

async fn write(out: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), Stop> {
    let written = async {
        out.write_all(bytes).await?;
        out.flush().await
    };
    written.await.map_err(unwritten)
}

fn unwritten(error: std::io::Error) -> Stop {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Stop::ReaderGone,
        _ => Stop::Unwritten(error),
    }
}

fn cannot_write(error: &std::io::Error) -> Complaint {
    Complaint::new("writing the command's output", error.to_string())
}

/// Ends with our input or with the command's; either is the command's affair.
async fn forward_stdin(input: Input) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let bytes = read(&mut stdin, &mut buffer).await;
        if bytes.is_empty() {
            let _ = input.end().await;
            return;
        }
        if input.write(bytes).await.is_err() {
            return;
        }
    }
}

/// The same for a terminal's keys, one of which leaves the process: it is seen even while the process
/// takes none of them.
async fn forward_keys(input: Input, left: oneshot::Sender<()>) {
    let (typed, mut waiting) = mpsc::channel::<Vec<u8>>(TYPED_AHEAD);
    let writing = async {
        while let Some(bytes) = waiting.recv().await {
            if input.write(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(writing);
    let leaves = tokio::select! {
        leaves = read_keys(typed) => leaves,
        // The process has ended, or its input.
        () = &mut writing => return,
    };
    if leaves {
        let _ = tokio::time::timeout(LEAVING, writing).await;
        let _ = left.send(());
    } else {
        writing.await;
        let _ = input.end().await;
    }
}

/// Reads keys until the one that leaves, which gives true, or the end. Like a terminal, it drops what
/// is typed too far ahead.
async fn read_keys(typed: mpsc::Sender<Vec<u8>>) -> bool {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 4 << 10];
    loop {
        let bytes = read(&mut stdin, &mut buffer).await;
        let end = bytes.iter().position(|byte| *byte == LEAVE);
        let before = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
        if !before.is_empty() {
            let _ = typed.try_send(before.to_vec());
        }
        if bytes.is_empty() || end.is_some() {
            return end.is_some();
        }
    }
}

/// What our standard input has; nothing at its end.
async fn read<'b>(stdin: &mut tokio::io::Stdin, buffer: &'b mut [u8]) -> &'b [u8] {
    let count = loop {
        match stdin.read(buffer).await {
            Ok(count) => break count,
            // Somebody who has the same descriptor does not want to wait on it.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let _ = tokio::task::spawn_blocking(wait_for_stdin).await;
            }
            Err(error) => {
                eprintln!("sup: reading the input: {error}");
                break 0;
            }
        }
    };
    buffer.get(..count).unwrap_or_default()
}

fn wait_for_stdin() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let stdin = std::io::stdin();
    let mut waits = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    // An error is met again by the read.
    let _ = poll(&mut waits, PollTimeout::NONE);
}

async fn forward_sizes(input: Input) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    // What changed before we listened.
    loop {
        let (columns, rows) = terminal::size();
        if input.resize(columns, rows).await.is_err() || changes.recv().await.is_none() {
            return;
        }
    }
}

/// The first Ctrl-C goes to the command, the second ends us.
async fn interrupt(interrupts: &mut Interrupts, input: &Input) {
    interrupts.next().await;
    let input = input.clone();
    // A command that reads no input can hold this up; the second Ctrl-C does not wait for it.
    tokio::spawn(async move { input.signal(SIGINT).await });
    interrupts.next().await;
}

pub(crate) struct Interrupts(Signal);

impl Interrupts {
    pub(crate) fn new() -> Result<Self, Complaint> {
        listen(SignalKind::interrupt()).map(Self)
    }

    pub(crate) async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Signals that end us, which must not leave the terminal raw. Without raw mode they do what they
/// always do: `nohup` keeps working.
struct Ends(Option<(Signal, Signal)>);

impl Ends {
    fn new(wanted: bool) -> Result<Self, Complaint> {
        if !wanted {
            return Ok(Self(None));
        }
        let signals = (
            listen(SignalKind::hangup())?,
            listen(SignalKind::terminate())?,
        );
        Ok(Self(Some(signals)))
    }

    async fn next(&mut self) -> u8 {
        match &mut self.0 {
            Some((hangup, terminate)) => tokio::select! {
                _ = hangup.recv() => HUNG_UP,
                _ = terminate.recv() => TERMINATED,
            },
            None => std::future::pending().await,
        }
    }
}

fn listen(kind: SignalKind) -> Result<Signal, Complaint> {
    signal(kind).map_err(|error| Complaint::new("watching for signals", error.to_string()))
}

/// Says what the exit code alone does not.
pub(crate) fn report(ended: &ProcessEnded) -> u8 {
    if !ended.message.is_empty() {
        eprintln!("sup: {}", harmless(&ended.message));
    }
    if ended.output_open {
        eprintln!(
            "sup: the command ended while something it started still held its output open; what \
             that writes is not shown"
        );
    }
    ended.exit_code
}

/// When the stream into the VM ended, the appliance knows why.
pub(crate) async fn explain(client: &Client, vm: &VmRef, error: &ClientError) -> Complaint {
    let what = format!("running a command in {vm}");
    let complaint = Complaint::of(&what, error);
    if !matches!(error, ClientError::AgentGone) {
        return complaint;
    }
    match client.get(vm.clone()).await {
        Ok(info) => match end_reason(info.end_reason) {
            Some(reason) => complaint.detail(format!("{reason}: {}", info.end_message)),
            None => complaint,
        },
        Err(error) => complaint.detail(error.to_string()),
    }
}

/// Shows output to its end; the process's own end is not ours.
pub(crate) async fn follow_only(
    client: &Client,
    vm: &VmRef,
    mut source: Source,
) -> Result<u8, Complaint> {
    match forward_output(&mut source).await {
        Ok(()) => Ok(0),
        Err(Stop::ReaderGone) => Ok(READER_GONE),
        Err(Stop::Unwritten(error)) => Err(cannot_write(&error)),
        Err(Stop::Client(error)) => Err(explain(client, vm, &error).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_that_a_full_disk_refuses_is_not_taken_for_a_reader_that_left() {
        let full = std::fs::File::options().write(true).open("/dev/full");
        let mut full = tokio::fs::File::from_std(full.unwrap());
        let refused = write(&mut full, b"output").await;
        assert!(matches!(refused, Err(Stop::Unwritten(_))));
    }
}
