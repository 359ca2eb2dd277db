//! `sup exec`: the command's output as it comes, our input as it comes, Ctrl-C to the command. It
//! waits for the command's end and for nothing else, least of all for our own standard input.

use std::os::unix::ffi::OsStringExt;

use client::protocol::process::ProcessEnded;
use client::protocol::vm::VmRef;
use client::{Client, ClientError, Command, Execution, Input, Output};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::args::Exec;
use crate::complaint::{Complaint, harmless};
use crate::show::end_reason;

/// SIGINT on Linux.
const SIGINT: u8 = 2;

/// What a shell returns for a command that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// What a shell returns for a command whose reader went away (128 + SIGPIPE).
const READER_GONE: u8 = 141;

/// Runs the command; gives its exit code.
pub(crate) async fn run(client: &Client, exec: Exec) -> Result<u8, Complaint> {
    let vm = exec.vm.clone();
    let command = command(exec)?;
    let mut interrupts = Interrupts::new()?;
    let machine = client.vm(vm.clone());
    let execution = tokio::select! {
        execution = machine.exec(command) => execution,
        () = interrupts.next() => return Ok(INTERRUPTED),
    };
    let mut execution = match execution {
        Ok(execution) => execution,
        Err(error) => return Err(explain(client, &vm, &error).await),
    };
    let input = execution.input();
    let forwarding = tokio::spawn(forward_stdin(input.clone()));
    let result = tokio::select! {
        result = forward_output(&mut execution) => result,
        () = interrupt(&mut interrupts, &input) => return Ok(INTERRUPTED),
    };
    forwarding.abort();
    match result {
        Ok(()) => {}
        Err(Stop::ReaderGone) => return Ok(READER_GONE),
        Err(Stop::Client(error)) => return Err(explain(client, &vm, &error).await),
    }
    match execution.ended() {
        Some(ended) => Ok(report(ended)),
        None => Err(explain(client, &vm, &ClientError::AgentGone).await),
    }
}

fn command(exec: Exec) -> Result<Command, Complaint> {
    let mut arguments = exec.command.into_iter().map(OsStringExt::into_vec);
    let command = if exec.shell {
        match (arguments.next(), arguments.next()) {
            (Some(line), None) => Command::shell(line),
            _ => {
                return Err(
                    Complaint::new("reading the command", "--shell takes one argument")
                        .advice("quote the whole line"),
                );
            }
        }
    } else {
        Command::argv(arguments)
    };
    let command = command.cwd(exec.cwd).stdin_pipe();
    Ok(exec
        .env
        .into_iter()
        .fold(command, |command, (key, value)| command.env(key, value)))
}

enum Stop {
    /// Nobody reads our standard output any more.
    ReaderGone,
    Client(ClientError),
}

async fn forward_output(execution: &mut Execution) -> Result<(), Stop> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    while let Some(output) = execution.next().await.map_err(Stop::Client)? {
        match output {
            Output::Stdout(bytes) => write(&mut stdout, &bytes).await?,
            Output::Stderr(bytes) => write(&mut stderr, &bytes).await?,
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
    written.await.map_err(|_: std::io::Error| Stop::ReaderGone)
}

/// Ends with our input or with the command's; either is the command's affair.
async fn forward_stdin(input: Input) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = stdin.read(&mut buffer).await {
        let bytes = buffer.get(..count).unwrap_or_default();
        if count == 0 {
            let _ = input.end().await;
            return;
        }
        if input.write(bytes).await.is_err() {
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

struct Interrupts(tokio::signal::unix::Signal);

impl Interrupts {
    fn new() -> Result<Self, Complaint> {
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
            .map(Self)
            .map_err(|error| Complaint::new("watching for Ctrl-C", error.to_string()))
    }

    async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Says what the exit code alone does not.
fn report(ended: &ProcessEnded) -> u8 {
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
async fn explain(client: &Client, vm: &VmRef, error: &ClientError) -> Complaint {
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
