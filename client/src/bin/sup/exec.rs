//! `sup exec` and `sup shell`: a new command, stayed with to its end or left to itself.

use std::os::unix::ffi::OsStringExt;

use client::protocol::process::{ProcessEnd, ProcessEnded};
use client::protocol::vm::VmRef;
use client::{Client, Command};

use crate::args::{Exec, Setting, Shell};
use crate::complaint::Complaint;
use crate::session::{INTERRUPTED, Interrupts, Manner, Source, explain, report, stay};
use crate::terminal;

/// The best shell that the VM has, as one that was logged in to.
const LOGIN_SHELL: &str = "if command -v bash >/dev/null; then exec bash -l; fi; exec sh -l";

/// Runs the command; gives its exit code.
pub(crate) async fn run(client: &Client, exec: Exec) -> Result<u8, Complaint> {
    let vm = exec.vm.clone();
    let (tty, detach) = (exec.tty, exec.detach);
    let command = command(exec)?;
    if detach {
        return start(client, &vm, command).await;
    }
    interact(client, &vm, command, tty).await
}

/// A shell at a terminal.
pub(crate) async fn shell(client: &Client, shell: Shell) -> Result<u8, Complaint> {
    let command = drawn(Command::shell(LOGIN_SHELL));
    let command = with(command, shell.setting);
    interact(client, &shell.vm, command, true).await
}

/// Without anybody who follows it; prints the id by which it is found.
async fn start(client: &Client, vm: &VmRef, command: Command) -> Result<u8, Complaint> {
    let process = match client.vm(vm.clone()).start(command).await {
        Ok(process) => process,
        Err(error) => return Err(explain(client, vm, &error).await),
    };
    // One that cannot be started is known as one that has ended.
    if let Ok(info) = process.info().await
        && let Some(ended) = info.ended.filter(never_ran)
    {
        return Ok(report(&ended));
    }
    crate::print(&format!("{}\n", process.id()))
}

fn never_ran(ended: &ProcessEnded) -> bool {
    matches!(
        ended.end,
        ProcessEnd::NotFound
            | ProcessEnd::NotExecutable
            | ProcessEnd::NoSuchDirectory
            | ProcessEnd::StartFailed
    )
}

async fn interact(
    client: &Client,
    vm: &VmRef,
    command: Command,
    tty: bool,
) -> Result<u8, Complaint> {
    let mut interrupts = Interrupts::new()?;
    let mut command = command.stdin_pipe();
    if tty {
        let (columns, rows) = terminal::size();
        command = command.terminal(columns, rows);
    }
    let machine = client.vm(vm.clone());
    let execution = tokio::select! {
        execution = machine.exec(command) => execution,
        () = interrupts.next() => return Ok(INTERRUPTED),
    };
    let source = match execution {
        Ok(execution) => Source::Started(execution),
        Err(error) => return Err(explain(client, vm, &error).await),
    };
    let manner = Manner {
        input: true,
        terminal: tty,
        may_leave: false,
    };
    stay(client, vm, source, manner, interrupts).await
}

fn command(exec: Exec) -> Result<Command, Complaint> {
    let mut arguments = exec.command.into_iter().map(OsStringExt::into_vec);
    let command = if exec.shell {
        match (arguments.next(), arguments.next()) {
            (Some(line), None) => Command::shell(line),
            _ => {
                return Err(
                    Complaint::new("reading the command", "--shell takes one argument")
                        .advice("quote the whole line")
                        .usage(),
                );
            }
        }
    } else {
        Command::argv(arguments)
    };
    let command = if exec.tty { drawn(command) } else { command };
    Ok(with(command, exec.setting))
}

/// Programs draw for the terminal that they are told of.
fn drawn(command: Command) -> Command {
    match std::env::var_os("TERM") {
        Some(kind) => command.env("TERM", kind.into_vec()),
        None => command,
    }
}

fn with(command: Command, setting: Setting) -> Command {
    let command = command.cwd(setting.cwd).user(setting.user);
    setting
        .env
        .into_iter()
        .fold(command, |command, (key, value)| command.env(key, value))
}
