//! What a client is told about a process that is no more, or never was. The texts are part of the
//! interface: programs show them as they are.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use protocol::process::{ProcessEnd, ProcessEnded};

use super::command::Command;
use super::spawn::{SpawnError, Stage};
use super::start;
use crate::reaper::Status;

/// What made a process end, beside itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cause {
    /// Memory ran out in its group.
    pub(crate) out_of_memory: bool,
    /// Its time was up; this much it had been given.
    pub(crate) timed_out: Option<Duration>,
    /// A client asked for its end.
    pub(crate) killed: bool,
    /// The machine is on its way off.
    pub(crate) stopped: bool,
}

/// The message for a process that ran.
pub(crate) fn ended(status: Status, cause: Cause, output_open: bool) -> ProcessEnded {
    let plain = plain_end(status, cause.out_of_memory, output_open);
    if plain.end == ProcessEnd::OutOfMemory {
        return plain;
    }
    match cause.timed_out {
        Some(given) => ProcessEnded {
            end: ProcessEnd::TimedOut,
            // One that ended well when it was asked to has not done what it was started for.
            exit_code: if plain.exit_code == 0 {
                124
            } else {
                plain.exit_code
            },
            message: format!("timed out after {} s", given.as_secs_f64()),
            ..plain
        },
        None if cause.killed => ProcessEnded {
            end: ProcessEnd::Killed,
            message: "killed".to_owned(),
            ..plain
        },
        // It did not end, it was ended with everything else.
        None if cause.stopped && plain.end == ProcessEnd::Signalled => lost("VM stopped"),
        None => plain,
    }
}

/// The message for a process that the machine's end has ended.
pub(crate) fn lost(message: &str) -> ProcessEnded {
    ProcessEnded {
        end: ProcessEnd::Lost,
        exit_code: 255,
        signal: 0,
        output_open: false,
        message: message.to_owned(),
    }
}

fn plain_end(status: Status, out_of_memory: bool, output_open: bool) -> ProcessEnded {
    // A shell passes on that its last command was killed as an exit code of its own.
    let killed = matches!(status, Status::Signal(9) | Status::Code(137));
    if out_of_memory && killed {
        return ProcessEnded {
            end: ProcessEnd::OutOfMemory,
            exit_code: 137,
            signal: 9,
            output_open,
            message: "out of memory".to_owned(),
        };
    }
    match status {
        Status::Code(exit_code) => ProcessEnded {
            end: ProcessEnd::Exited,
            exit_code,
            signal: 0,
            output_open,
            message: String::new(),
        },
        Status::Signal(signal) => ProcessEnded {
            end: ProcessEnd::Signalled,
            exit_code: signal.saturating_add(128),
            signal,
            output_open,
            message: match Signal::try_from(i32::from(signal)) {
                Ok(name) => format!("killed by signal {name}"),
                Err(_) => format!("killed by signal {signal}"),
            },
        },
    }
}

/// The message for a process that could not be started.
pub(crate) fn not_started(command: &Command, error: SpawnError) -> ProcessEnded {
    let name = &command.name;
    let directory = &command.directory;
    if let (Stage::Late, Errno::ETIMEDOUT) = (error.stage, error.errno) {
        return late(command);
    }
    let (end, exit_code, message) = match (error.stage, error.errno) {
        (Stage::Execute, Errno::ENOENT | Errno::ENOTDIR) => {
            (ProcessEnd::NotFound, 127, format!("not found: {name}"))
        }
        (Stage::Execute, Errno::EACCES | Errno::EPERM | Errno::ENOEXEC | Errno::EISDIR) => (
            ProcessEnd::NotExecutable,
            126,
            format!("not executable: {name}"),
        ),
        (Stage::Directory, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG) => {
            (
                ProcessEnd::NoSuchDirectory,
                126,
                format!("no such directory: {directory}"),
            )
        }
        (Stage::Identity, errno) => (
            ProcessEnd::StartFailed,
            126,
            format!("cannot run {name} as that user: {}", errno.desc()),
        ),
        (Stage::Directory, errno) => (
            ProcessEnd::StartFailed,
            126,
            format!("cannot enter directory {directory}: {}", errno.desc()),
        ),
        (_, errno) => (
            ProcessEnd::StartFailed,
            126,
            format!("cannot start {name}: {}", errno.desc()),
        ),
    };
    ProcessEnded {
        end,
        exit_code,
        signal: 0,
        output_open: false,
        message,
    }
}

/// The message for a process that did not become its program in time.
fn late(command: &Command) -> ProcessEnded {
    let patience = start::patience(command);
    if command.deadline == Some(patience) {
        let cause = Cause {
            timed_out: Some(patience),
            ..Cause::default()
        };
        return ended(Status::Signal(9), cause, false);
    }
    ProcessEnded {
        end: ProcessEnd::StartFailed,
        exit_code: 126,
        signal: 0,
        output_open: false,
        message: format!(
            "cannot start {}: it could neither enter {} nor begin within {} s; look whether a file \
             system hangs",
            command.name,
            command.directory,
            patience.as_secs()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: Status, out_of_memory: bool, open: bool) -> ProcessEnded {
        let cause = Cause {
            out_of_memory,
            ..Cause::default()
        };
        super::ended(status, cause, open)
    }

    #[test]
    fn what_ended_it_is_told_and_how_it_took_that_too() {
        let late = Cause {
            timed_out: Some(Duration::from_millis(1500)),
            ..Cause::default()
        };
        let end = super::ended(Status::Signal(15), late, false);
        assert_eq!((end.end, end.exit_code), (ProcessEnd::TimedOut, 143));
        assert_eq!(end.message, "timed out after 1.5 s");
        assert_eq!(super::ended(Status::Code(0), late, false).exit_code, 124);
        let killed = Cause {
            killed: true,
            ..Cause::default()
        };
        let end = super::ended(Status::Code(3), killed, false);
        assert_eq!((end.end, end.exit_code), (ProcessEnd::Killed, 3));
        assert_eq!(end.message, "killed");
        let seconds = Cause {
            timed_out: Some(Duration::from_secs(5)),
            ..Cause::default()
        };
        let end = super::ended(Status::Signal(9), seconds, false);
        assert_eq!(end.message, "timed out after 5 s");
    }

    #[test]
    fn a_kill_by_the_kernel_for_memory_is_told_from_a_plain_kill() {
        assert_eq!(
            ended(Status::Signal(9), true, false).message,
            "out of memory"
        );
        assert_eq!(
            ended(Status::Code(137), true, false).end,
            ProcessEnd::OutOfMemory
        );
        assert_eq!(
            ended(Status::Signal(9), false, false).message,
            "killed by signal SIGKILL"
        );
        // Something in the group ran out of memory and the command coped with it.
        assert_eq!(ended(Status::Code(0), true, false).end, ProcessEnd::Exited);
    }

    #[test]
    fn a_signal_without_a_name_is_shown_by_number() {
        let ended = ended(Status::Signal(40), false, false);
        assert_eq!(ended.message, "killed by signal 40");
        assert_eq!(ended.exit_code, 168);
    }
}
