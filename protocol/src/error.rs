//! The error body. Its layout is frozen: every peer of every age can read it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::message::messages;
use crate::wire_enum::wire_enum;

wire_enum! {
    /// What went wrong, as a number that programs can act on.
    ErrorCode: u16 {
        /// The body is no value of its kind.
        Malformed = 1,
        /// The kind is not known here.
        Unsupported = 2,
        /// The frame is longer than a frame may be.
        FrameTooLarge = 3,
        /// The token is wrong.
        Unauthenticated = 4,
        /// Another message came before `Hello` was accepted.
        HelloRequired = 5,
        /// The connection has as many open streams as it may have.
        TooManyStreams = 6,
        /// A field has a value that cannot be served.
        InvalidArgument = 7,
        /// There is no such VM, or it belongs to somebody else.
        VmNotFound = 8,
        /// There is no such template.
        TemplateNotFound = 9,
        /// The idempotency key was used before with other arguments.
        IdempotencyConflict = 10,
        /// The host has no room for this VM.
        NoCapacity = 11,
        /// The VM did not come up within its boot deadline.
        BootTimeout = 12,
        /// The VM ended before it came up.
        BootFailed = 13,
        /// The VM is not running, or ended meanwhile.
        VmStopped = 14,
        /// The VM runs but its agent does not answer.
        AgentUnreachable = 15,
        /// The data file system is full.
        DiskFull = 16,
        /// A part of the host is restarting.
        Unavailable = 17,
        /// A fault of the appliance that has no better name.
        Internal = 18,
        /// Another operation on this VM is under way.
        Busy = 19,
        /// The agent waits for its configuration.
        NotConfigured = 20,
        /// The agent was configured before.
        AlreadyConfigured = 21,
        /// A process with this id exists already.
        ProcessExists = 22,
        /// The peer speaks a generation that is not served here.
        GenerationUnsupported = 23,
        /// Another VM of the same owner has this name.
        NameTaken = 24,
        /// As many long frames are under way at once as the receiver has room for.
        TooManyLongFrames = 25,
        /// There is no process with this id, running or remembered.
        NoSuchProcess = 32,
        /// The process has ended; it takes no input and no signals any more.
        ProcessNotRunning = 33,
        /// The process still runs; end it first.
        ProcessRunning = 34,
        /// The process has no standard input to write to, or it was closed.
        InputClosed = 35,
        /// The guest's kernel lacks what a limit needs.
        LimitUnavailable = 36,
        /// As many processes run as the agent looks after.
        TooManyProcesses = 37,
        /// There is no such file or directory.
        NoSuchFile = 64,
        /// A part of the path is no directory.
        NotADirectory = 65,
        /// It is a directory.
        IsADirectory = 66,
        /// The name is taken.
        FileExists = 67,
        /// The VM's file system, or a quota on it, is full.
        NoSpace = 68,
        /// The VM's file system is mounted read-only.
        ReadOnly = 69,
        /// The VM's kernel does not permit it.
        PermissionDenied = 70,
        /// The path or a name in it is too long.
        NameTooLong = 71,
        /// Too many symbolic links on the way, or too many names of one file.
        TooManyLinks = 72,
        /// The file is in use.
        FileBusy = 73,
        /// The directory has entries.
        DirectoryNotEmpty = 74,
        /// It is no regular file.
        NotARegularFile = 75,
        /// The file would be larger than a file may be.
        FileTooLarge = 76,
        /// The two names are on different file systems.
        CrossDevice = 77,
        /// The VM's kernel refused for another reason; `detail` names it.
        FileFailed = 78,
        /// What arrived has another checksum or length than was said.
        ContentMismatch = 79,
        /// There is no upload of this name, or it is not as far as was said.
        NoSuchUpload = 80,
        /// The archive is damaged, or has an entry that cannot be unpacked here.
        BadArchive = 81,
        /// Nobody listens on the port.
        ConnectionRefused = 82,
    }
}

wire_enum! {
    /// Who has to change something for the request to succeed.
    Fault: u8 {
        /// Whoever sent the request.
        Caller = 0,
        /// The software inside the VM.
        Guest = 1,
        /// The appliance.
        Host = 2,
    }
}

wire_enum! {
    /// Whether the same request may be sent again.
    Retry: u8 {
        /// It would fail again.
        No = 0,
        /// At once, and nothing is done twice.
        Safe = 1,
        /// After the number of milliseconds in [`ErrorBody::retry_after_ms`].
        AfterMs = 2,
    }
}

/// An error as it travels. Field order and types never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub code: ErrorCode,
    /// Who has to change something.
    pub fault: Fault,
    /// Whether to try again.
    pub retry: Retry,
    /// How long to wait first when `retry` is [`Retry::AfterMs`]; else zero.
    pub retry_after_ms: u32,
    /// One sentence for a person: what failed, with the value, and what to do.
    pub message: String,
    /// More lines when there are any, such as the end of a VM's console; else empty.
    pub detail: String,
}

messages! { ERROR => ErrorBody, }

impl ErrorBody {
    /// An error that the sender of the request can mend.
    pub fn caller(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(code, Fault::Caller, Retry::No, message)
    }

    /// An error that lies inside the VM.
    pub fn guest(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(code, Fault::Guest, Retry::No, message)
    }

    /// An error of the appliance. The caller may not retry unless told so by
    /// [`retryable`](Self::retryable).
    pub fn host(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::new(code, Fault::Host, Retry::No, message)
    }

    fn new(code: ErrorCode, fault: Fault, retry: Retry, message: impl Into<String>) -> Self {
        Self {
            code,
            fault,
            retry,
            retry_after_ms: 0,
            message: message.into(),
            detail: String::new(),
        }
    }

    /// Adds more lines.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// Marks the request as safe to send again at once.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retry = Retry::Safe;
        self.retry_after_ms = 0;
        self
    }

    /// Marks the request as safe to send again after a while.
    #[must_use]
    pub fn retryable_after_ms(mut self, milliseconds: u32) -> Self {
        self.retry = Retry::AfterMs;
        self.retry_after_ms = milliseconds;
        self
    }
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for ErrorBody {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::decode_body;
    use crate::message::testing::golden;

    #[test]
    fn golden_error() {
        let error = ErrorBody::host(ErrorCode::BootTimeout, "no")
            .retryable_after_ms(300)
            .with_detail("x");
        golden(
            &error,
            &[
                10, 0, 0, 0, 0x00, 0x00, 0, 12, 2, 2, 0xac, 0x02, 2, b'n', b'o', 1, b'x',
            ],
        );
    }

    #[test]
    fn an_unknown_code_survives_the_trip() {
        let body = ErrorBody::caller(ErrorCode::from_wire(60_000), "from the future");
        let bytes = crate::message::encode_body(&body).unwrap();
        let back: ErrorBody = decode_body(&bytes).unwrap();
        assert_eq!(back.code, ErrorCode::Other(60_000));
    }
}
