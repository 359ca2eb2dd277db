//! Running a command in a VM. A stream begins with [`StartProcess`]; the agent answers
//! [`ProcessStarted`], then sends output as it comes in `STDOUT` and `STDERR` frames of raw bytes,
//! and [`ProcessEnded`] last. The order of the frames is the merged order of the output.
//!
//! The client may send `STDIN` frames of raw bytes, `STDIN_END` and [`SignalProcess`] meanwhile.
//! Paths, arguments and variables are bytes without NUL.

use serde::{Deserialize, Serialize};

use crate::id::ProcessId;
use crate::message::messages;
use crate::wire_enum::wire_enum;

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProcess {
    /// Chosen at random by the client.
    pub id: ProcessId,
    /// Whether `command` is one string for `sh -c` or the arguments themselves.
    pub mode: CommandMode,
    /// For [`CommandMode::Argv`] the program and its arguments; for [`CommandMode::Shell`] exactly
    /// one string.
    pub command: Vec<Vec<u8>>,
    /// Working directory; a relative one starts at /workspace. Empty means /workspace.
    pub cwd: Vec<u8>,
    /// Added to the default environment; a pair of a key and none removes the key.
    pub env: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// What standard input is.
    pub stdin: StdinMode,
}

wire_enum! {
    /// How [`StartProcess::command`] is to be read.
    CommandMode: u8 {
        /// The program and its arguments; no shell.
        Argv = 0,
        /// One string for `sh -c`.
        Shell = 1,
    }
}

wire_enum! {
    /// What a process has for standard input.
    StdinMode: u8 {
        /// /dev/null.
        Null = 0,
        /// A pipe that `STDIN` frames go into.
        Pipe = 1,
    }
}

/// The process runs. Not sent when it could not be started: then [`ProcessEnded`] comes at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStarted {
    /// Its process identifier inside the VM, for people; it may be reused.
    pub pid: u32,
}

wire_enum! {
    /// Why a process is no more, or never was.
    ProcessEnd: u8 {
        /// It exited; see [`ProcessEnded::exit_code`].
        Exited = 0,
        /// A signal ended it; see [`ProcessEnded::signal`].
        Signalled = 1,
        /// There is no such program (exit code 127).
        NotFound = 2,
        /// The program cannot be executed (exit code 126).
        NotExecutable = 3,
        /// There is no such working directory (exit code 126).
        NoSuchDirectory = 4,
        /// The system refused to start it for another reason (exit code 126).
        StartFailed = 5,
        /// The kernel ended it because memory ran out (exit code 137).
        OutOfMemory = 6,
    }
}

/// The last frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEnded {
    /// Why it is no more.
    pub end: ProcessEnd,
    /// What it returned; 128 + n for signal n; 126 or 127 when it could not be started.
    pub exit_code: u8,
    /// The signal's number, else zero.
    pub signal: u8,
    /// Someone else still held its output open when it ended, so more may have been written since.
    pub output_open: bool,
    /// For a person: `not found: X`, `killed by signal SIGSEGV`; empty after an exit.
    pub message: String,
}

/// Sends a signal to the process's group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalProcess {
    /// The signal's number on Linux x86-64.
    pub signal: u8,
}

messages! {
    START_PROCESS => StartProcess,
    PROCESS_STARTED => ProcessStarted,
    PROCESS_ENDED => ProcessEnded,
    SIGNAL_PROCESS => SignalProcess,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Message, decode_body, encode};

    /// The frame is these bytes, and these bytes are the message.
    #[track_caller]
    fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, bytes: &[u8]) {
        assert_eq!(encode(message).unwrap(), bytes);
        assert_eq!(
            &decode_body::<M>(&bytes[crate::frame::HEADER_LEN..]).unwrap(),
            message
        );
    }

    #[test]
    fn golden_start() {
        let start = StartProcess {
            id: ProcessId([9; 16]),
            mode: CommandMode::Argv,
            command: vec![b"ls".to_vec(), b"-l".to_vec()],
            cwd: b"/".to_vec(),
            env: vec![(b"A".to_vec(), Some(b"1".to_vec())), (b"B".to_vec(), None)],
            stdin: StdinMode::Pipe,
        };
        let mut bytes = b"\x24\0\0\0\x00\x02\0".to_vec();
        bytes.extend_from_slice(&[9; 16]);
        bytes.extend_from_slice(b"\0\x02\x02ls\x02-l\x01/\x02\x01A\x01\x011\x01B\0\x01");
        golden(&start, &bytes);
    }

    #[test]
    fn golden_life_of_a_process() {
        golden(
            &ProcessStarted { pid: 300 },
            b"\x02\0\0\0\x01\x02\0\xac\x02",
        );
        let ended = ProcessEnded {
            end: ProcessEnd::Signalled,
            exit_code: 139,
            signal: 11,
            output_open: true,
            message: "k".into(),
        };
        golden(&ended, b"\x06\0\0\0\x06\x02\0\x01\x8b\x0b\x01\x01k");
        golden(&SignalProcess { signal: 15 }, b"\x01\0\0\0\x07\x02\0\x0f");
    }
}
