//! Running a command in a VM. A stream begins with [`StartProcess`]; the agent answers
//! [`ProcessStarted`], then sends output as it comes in `STDOUT` and `STDERR` frames of raw bytes,
//! and [`ProcessEnded`] last. The order of the frames is the merged order of the output.
//!
//! The client may send `STDIN` frames of raw bytes, `STDIN_END`, [`SignalProcess`] and
//! [`ResizeTerminal`] meanwhile. Paths, arguments and variables are bytes without NUL. The process
//! does not depend on the stream: [`processes`](crate::processes) finds it again by its id.

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
    /// What a reader that is slower than the process means for the process.
    pub output: OutputMode,
    /// Whose process it is: a name or a number of the guest's /etc/passwd. Empty means root.
    pub user: Vec<u8>,
    /// After so many milliseconds it gets SIGTERM, and five seconds later SIGKILL. None: no limit.
    pub deadline_ms: Option<u64>,
    /// How many bytes of memory it and what it starts may use together. None: no limit of its own.
    pub memory_bytes: Option<u64>,
    /// A terminal for its input and output, of this size; then `stdin` is of no meaning and
    /// everything it writes is standard output. None: pipes.
    pub terminal: Option<TerminalSize>,
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
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

wire_enum! {
    /// What becomes of output that is not read as fast as it is written.
    OutputMode: u8 {
        /// The process is held back while a reader follows that is slower, and nothing is lost to
        /// it. Once no reader follows, the process runs free. The stream of the start is a reader.
        Follow = 0,
        /// Nobody holds the process back; what exceeds the log's bound is dropped, oldest first.
        /// The stream of the start ends with [`ProcessStarted`].
        Log = 1,
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
        /// [`StartProcess::deadline_ms`] had passed.
        TimedOut = 7,
        /// A client asked for its end by [`KillProcess`](crate::processes::KillProcess).
        Killed = 8,
        /// The VM was restarted while it ran (exit code 255).
        Lost = 9,
    }
}

/// How a process ended; as a frame the last one of its stream.
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

/// Changes the size of the process's terminal; without a terminal it is of no effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeTerminal {
    /// The new size.
    pub size: TerminalSize,
}

/// Stands where output was that is no longer kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputGap {
    /// How many bytes of the merged output are missing here.
    pub bytes: u64,
}

messages! {
    START_PROCESS => StartProcess,
    PROCESS_STARTED => ProcessStarted,
    PROCESS_ENDED => ProcessEnded,
    SIGNAL_PROCESS => SignalProcess,
    RESIZE_TERMINAL => ResizeTerminal,
    OUTPUT_GAP => OutputGap,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_start() {
        let start = StartProcess {
            id: ProcessId([9; 16]),
            mode: CommandMode::Argv,
            command: vec![b"ls".to_vec(), b"-l".to_vec()],
            cwd: b"/".to_vec(),
            env: vec![(b"A".to_vec(), Some(b"1".to_vec())), (b"B".to_vec(), None)],
            stdin: StdinMode::Pipe,
            output: OutputMode::Log,
            user: b"u".to_vec(),
            deadline_ms: Some(300),
            memory_bytes: Some(1 << 20),
            terminal: Some(TerminalSize {
                columns: 80,
                rows: 24,
            }),
        };
        let mut bytes = b"\x31\0\0\0\x00\x02\0".to_vec();
        bytes.extend_from_slice(&[9; 16]);
        bytes.extend_from_slice(b"\0\x02\x02ls\x02-l\x01/\x02\x01A\x01\x011\x01B\0\x01");
        bytes.extend_from_slice(b"\x01\x01u\x01\xac\x02\x01\x80\x80\x40\x01\x50\x18");
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
        let size = TerminalSize {
            columns: 300,
            rows: 1,
        };
        golden(
            &ResizeTerminal { size },
            b"\x03\0\0\0\x08\x02\0\xac\x02\x01",
        );
        golden(&OutputGap { bytes: 300 }, b"\x02\0\0\0\x09\x02\0\xac\x02");
    }
}
