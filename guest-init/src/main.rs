//! The guest's PID 1 and agent. Without arguments, as process 1, it brings the machine up from its
//! initramfs and serves the agent on vsock; `guest-init agent --socket PATH` serves the same agent
//! as an ordinary process. As PID 1 it must never exit: a kernel without PID 1 panics.

mod agent;
mod boot;
mod cgroup;
mod log;
mod reaper;
mod system;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str =
    "usage: guest-init agent --socket PATH [--cgroup DIR] [--workspace DIR] [--logs DIR]
Without arguments it is the first process of a virtual machine.";

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        log::error(format_args!("event=panic what={panic}"));
    }));
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        // The kernel hands words of its command line that it does not know to its first process;
        // only the one word that asks for an agent is looked at.
        Some(word) if word == "agent" => match agent_options(arguments) {
            Ok(options) => match agent::serve_unix(options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    log::error(format_args!("event=agent_failed error={error}"));
                    ExitCode::FAILURE
                }
            },
            Err(problem) => {
                eprintln!("{problem}\n{USAGE}");
                ExitCode::from(2)
            }
        },
        _ if std::process::id() == 1 => boot::run(),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn agent_options(
    mut arguments: impl Iterator<Item = std::ffi::OsString>,
) -> Result<agent::UnixOptions, String> {
    let mut socket = None;
    let mut cgroup = None;
    let mut workspace = None;
    let mut logs = None;
    while let Some(flag) = arguments.next() {
        let slot = match flag.to_str() {
            Some("--socket") => &mut socket,
            Some("--cgroup") => &mut cgroup,
            Some("--workspace") => &mut workspace,
            Some("--logs") => &mut logs,
            _ => return Err(format!("unknown argument {}", flag.display())),
        };
        let value = arguments
            .next()
            .ok_or_else(|| format!("{} needs a value", flag.display()))?;
        *slot = Some(PathBuf::from(value));
    }
    Ok(agent::UnixOptions {
        socket: socket.ok_or("--socket is missing")?,
        cgroup,
        workspace: workspace.unwrap_or_else(|| PathBuf::from(agent::WORKSPACE)),
        logs,
    })
}
