//! Processes by their ids: what a client can ask about one that another stream, or another client,
//! has started. Each request begins a stream of its own, so that none waits behind another.
//!
//! Output lies at *merged offsets*: the bytes of standard output and standard error together, in
//! the order in which the agent saw them, counted from zero.

use serde::{Deserialize, Serialize};

use crate::id::ProcessId;
use crate::message::messages;
use crate::process::{CommandMode, OutputMode, ProcessEnded};
use crate::wire_enum::wire_enum;

/// The most bytes of a command that [`ProcessInfo`] shows.
pub const MAX_SHOWN_COMMAND: usize = 1024;
/// The most processes of one [`ProcessPage`].
pub const MAX_PAGE: usize = 64;
/// The most output that [`AttachFrom::Lines`] goes back, in bytes.
pub const MAX_TAIL: u64 = 1 << 20;

/// Reads a process's output; the stream may also carry its input, signals and terminal sizes, as
/// the stream of its start does. Answered by [`ProcessAttached`], then `STDOUT`, `STDERR` and
/// [`OutputGap`](crate::process::OutputGap) frames, and last [`ProcessEnded`] or
/// [`OutputReplayed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachProcess {
    /// Which one.
    pub id: ProcessId,
    /// What `value` counts.
    pub from: AttachFrom,
    /// A merged offset for [`AttachFrom::Offset`], a number of lines for [`AttachFrom::Lines`].
    pub value: u64,
    /// Go on until the process has ended. Without it the stream ends when everything that was
    /// there at the time of the request has been sent.
    pub follow: bool,
}

wire_enum! {
    /// Where reading begins.
    AttachFrom: u8 {
        /// At this merged offset. One that is no longer kept gives a gap first, one beyond the end
        /// is `InvalidArgument`.
        Offset = 0,
        /// At the oldest byte that is kept. What was dropped before it is no gap.
        Oldest = 1,
        /// At what comes next.
        Now = 2,
        /// At the beginning of the last so many lines, at most [`MAX_TAIL`] bytes ago. A last line
        /// without an end counts.
        Lines = 3,
    }
}

/// First answer to [`AttachProcess`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessAttached {
    /// What is known of the process.
    pub process: ProcessInfo,
    /// The merged offset of the first byte that follows.
    pub offset: u64,
}

/// Everything that was there has been sent, and the process still runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputReplayed {
    /// The merged offset to go on from.
    pub offset: u64,
}

/// Asks for what runs and what ended lately.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListProcesses {
    /// The [`number`](ProcessInfo::number) after which to begin; zero begins at the oldest.
    pub after: u64,
}

/// At most [`MAX_PAGE`] processes, by ascending number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPage {
    /// What is known of them.
    pub processes: Vec<ProcessInfo>,
    /// Ask again with the last one's number.
    pub more: bool,
}

/// What is known of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its identifier.
    pub id: ProcessId,
    /// Its place in the order of starts, from one.
    pub number: u64,
    /// Its process identifier inside the VM, for people; zero when it never ran.
    pub pid: u32,
    /// How to read `command`.
    pub mode: CommandMode,
    /// What was started, cut to [`MAX_SHOWN_COMMAND`] bytes.
    pub command: Vec<Vec<u8>>,
    /// Whether readers can hold it back.
    pub output: OutputMode,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// When it was started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// When it ended; zero while it runs.
    pub ended_unix_ms: u64,
    /// How it ended; none while it runs.
    pub ended: Option<ProcessEnded>,
    /// The merged offset of the end of its output.
    pub bytes: u64,
    /// How many bytes of its output are no longer kept.
    pub dropped: u64,
}

/// Waits for the end of a process. Answered by [`ProcessInfo`], in which the process may still run
/// if the time was up first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitProcess {
    /// Which one.
    pub id: ProcessId,
    /// How long to wait, in milliseconds; zero asks for the state as it is, none waits for ever.
    pub timeout_ms: Option<u32>,
}

/// Begins a stream of `STDIN` frames for a process. `STDIN_END` closes its input; the end of the
/// client's half alone leaves it open. Answered by [`StdinWritten`] after either, when the process's
/// pipe has taken everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStdin {
    /// Which one.
    pub id: ProcessId,
}

/// Answer to [`WriteStdin`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdinWritten {
    /// How many bytes the process's input has taken.
    pub bytes: u64,
}

/// Sends a signal to a process's group. Answered by [`ProcessInfo`] when it was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignal {
    /// Which one.
    pub id: ProcessId,
    /// The signal's number on Linux x86-64.
    pub signal: u8,
}

/// Ends a process and everything it started: SIGTERM to its group, and SIGKILL to all that is left
/// after the grace. Answered by [`ProcessInfo`] when it is gone; one that has ended is no error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillProcess {
    /// Which one.
    pub id: ProcessId,
    /// How long it may take to end by itself, in milliseconds; none means 5000, at most 600,000.
    pub grace_ms: Option<u32>,
}

/// Forgets a process that has ended, with its log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveProcess {
    /// Which one.
    pub id: ProcessId,
}

/// Answer to [`RemoveProcess`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRemoved {}

messages! {
    ATTACH_PROCESS => AttachProcess,
    PROCESS_ATTACHED => ProcessAttached,
    OUTPUT_REPLAYED => OutputReplayed,
    LIST_PROCESSES => ListProcesses,
    PROCESS_PAGE => ProcessPage,
    WAIT_PROCESS => WaitProcess,
    PROCESS => ProcessInfo,
    WRITE_STDIN => WriteStdin,
    STDIN_WRITTEN => StdinWritten,
    SEND_SIGNAL => SendSignal,
    KILL_PROCESS => KillProcess,
    REMOVE_PROCESS => RemoveProcess,
    PROCESS_REMOVED => ProcessRemoved,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Message;
    use crate::message::testing;
    use crate::process::ProcessEnd;

    const ID: ProcessId = ProcessId([9; 16]);

    /// The frame is the kind and these bytes around the id, and they are the message.
    #[track_caller]
    fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, kind: u8, body: &[&[u8]]) {
        let body = body.concat();
        let mut bytes = vec![body.len() as u8, 0, 0, 0, kind, 2, 0];
        bytes.extend_from_slice(&body);
        testing::golden(message, &bytes);
    }

    fn info() -> (ProcessInfo, Vec<u8>) {
        let ended = ProcessEnded {
            end: ProcessEnd::Killed,
            exit_code: 143,
            signal: 15,
            output_open: false,
            message: "killed".into(),
        };
        let info = ProcessInfo {
            id: ID,
            number: 3,
            pid: 300,
            mode: CommandMode::Shell,
            command: vec![b"ls".to_vec()],
            output: OutputMode::Log,
            terminal: true,
            started_unix_ms: 128,
            ended_unix_ms: 129,
            ended: Some(ended),
            bytes: 7,
            dropped: 2,
        };
        let mut bytes = vec![9; 16];
        bytes.extend_from_slice(b"\x03\xac\x02\x01\x01\x02ls\x01\x01\x80\x01\x81\x01");
        bytes.extend_from_slice(b"\x01\x08\x8f\x0f\0\x06killed\x07\x02");
        (info, bytes)
    }

    #[test]
    fn golden_attach() {
        let attach = AttachProcess {
            id: ID,
            from: AttachFrom::Lines,
            value: 300,
            follow: true,
        };
        golden(&attach, 0x10, &[&ID.0, b"\x03\xac\x02\x01"]);
        let (process, bytes) = info();
        let attached = ProcessAttached { process, offset: 5 };
        golden(&attached, 0x11, &[&bytes, b"\x05"]);
        golden(&OutputReplayed { offset: 300 }, 0x12, &[b"\xac\x02"]);
    }

    #[test]
    fn golden_list() {
        golden(&ListProcesses { after: 300 }, 0x13, &[b"\xac\x02"]);
        let (process, bytes) = info();
        let page = ProcessPage {
            processes: vec![process],
            more: true,
        };
        golden(&page, 0x14, &[b"\x01", &bytes, b"\x01"]);
    }

    #[test]
    fn golden_requests_and_answers() {
        let (process, bytes) = info();
        golden(&process, 0x16, &[&bytes]);
        let timeout_ms = Some(300);
        golden(
            &WaitProcess { id: ID, timeout_ms },
            0x15,
            &[&ID.0, b"\x01\xac\x02"],
        );
        golden(&WriteStdin { id: ID }, 0x17, &[&ID.0]);
        golden(&StdinWritten { bytes: 300 }, 0x18, &[b"\xac\x02"]);
        let signal = SendSignal { id: ID, signal: 2 };
        golden(&signal, 0x19, &[&ID.0, b"\x02"]);
        let grace_ms = None;
        golden(&KillProcess { id: ID, grace_ms }, 0x1a, &[&ID.0, b"\0"]);
        golden(&RemoveProcess { id: ID }, 0x1b, &[&ID.0]);
        golden(&ProcessRemoved {}, 0x1c, &[]);
    }
}
