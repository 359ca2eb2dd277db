//! Frames: `u32 length | u16 kind | u8 flags | body`, little-endian. The length counts the body.
//!
//! [`FrameReader`] takes bytes as they come and gives frames back; it never holds more than one
//! frame's body and refuses an oversize one as soon as its header is there.

use std::fmt;

/// Bytes before the body: length (4), kind (2), flags (1).
pub const HEADER_LEN: usize = 7;

/// The longest body: 1 MiB of payload and 64 KiB for what surrounds it.
pub const MAX_BODY: usize = (1 << 20) + (64 << 10);

/// The longest chunk of raw bytes a sender puts into one data frame.
pub const MAX_DATA: usize = 64 << 10;

/// What a frame's body is. The upper byte names the family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub u16);

impl Kind {
    /// [`ErrorBody`](crate::ErrorBody); ends the stream it is sent on.
    pub const ERROR: Self = Self(0x0000);
    /// [`Hello`](crate::hello::Hello), first on a connection.
    pub const HELLO: Self = Self(0x0001);
    /// [`HelloOk`](crate::hello::HelloOk).
    pub const HELLO_OK: Self = Self(0x0002);

    /// [`CreateVm`](crate::vm::CreateVm), answered by [`Kind::VM`].
    pub const CREATE_VM: Self = Self(0x0100);
    /// [`GetVm`](crate::vm::GetVm), answered by [`Kind::VM`].
    pub const GET_VM: Self = Self(0x0101);
    /// [`ListVms`](crate::vm::ListVms), answered by [`Kind::VM_PAGE`].
    pub const LIST_VMS: Self = Self(0x0102);
    /// [`StopVm`](crate::vm::StopVm), answered by [`Kind::VM`].
    pub const STOP_VM: Self = Self(0x0103);
    /// [`StartVm`](crate::vm::StartVm), answered by [`Kind::VM`].
    pub const START_VM: Self = Self(0x0104);
    /// [`DeleteVm`](crate::vm::DeleteVm), answered by [`Kind::DELETED`].
    pub const DELETE_VM: Self = Self(0x0105);
    /// [`OpenVm`](crate::vm::OpenVm), answered by [`Kind::OPENED`]; after that the stream is the
    /// agent's.
    pub const OPEN_VM: Self = Self(0x0106);
    /// [`ReadConsole`](crate::vm::ReadConsole), answered by [`Kind::CONSOLE`].
    pub const READ_CONSOLE: Self = Self(0x0107);
    /// [`VmInfo`](crate::vm::VmInfo).
    pub const VM: Self = Self(0x0110);
    /// [`VmPage`](crate::vm::VmPage).
    pub const VM_PAGE: Self = Self(0x0111);
    /// [`Deleted`](crate::vm::Deleted).
    pub const DELETED: Self = Self(0x0112);
    /// [`Opened`](crate::vm::Opened).
    pub const OPENED: Self = Self(0x0113);
    /// [`Console`](crate::vm::Console).
    pub const CONSOLE: Self = Self(0x0114);

    /// [`Configure`](crate::agent::Configure), control to agent.
    pub const CONFIGURE: Self = Self(0x0180);
    /// [`Configured`](crate::agent::Configured).
    pub const CONFIGURED: Self = Self(0x0181);
    /// [`PowerOff`](crate::agent::PowerOff), control to agent.
    pub const POWER_OFF: Self = Self(0x0182);
    /// [`PoweringOff`](crate::agent::PoweringOff).
    pub const POWERING_OFF: Self = Self(0x0183);
    /// [`Health`](crate::agent::Health), answered by [`Kind::HEALTH_REPORT`].
    pub const HEALTH: Self = Self(0x0184);
    /// [`HealthReport`](crate::agent::HealthReport).
    pub const HEALTH_REPORT: Self = Self(0x0185);
    /// [`SetTime`](crate::agent::SetTime), control to agent, answered by [`Kind::TIME_SET`].
    pub const SET_TIME: Self = Self(0x0186);
    /// [`TimeSet`](crate::agent::TimeSet).
    pub const TIME_SET: Self = Self(0x0187);
    /// [`Dial`](crate::agent::Dial), answered by [`Kind::DIALED`]; after that the stream is raw.
    pub const DIAL: Self = Self(0x0188);
    /// [`Dialed`](crate::agent::Dialed).
    pub const DIALED: Self = Self(0x0189);

    /// [`StartProcess`](crate::process::StartProcess).
    pub const START_PROCESS: Self = Self(0x0200);
    /// [`ProcessStarted`](crate::process::ProcessStarted).
    pub const PROCESS_STARTED: Self = Self(0x0201);
    /// Raw bytes for the process's standard input, client to agent.
    pub const STDIN: Self = Self(0x0202);
    /// Empty; no more standard input will come.
    pub const STDIN_END: Self = Self(0x0203);
    /// Raw bytes that the process wrote to standard output.
    pub const STDOUT: Self = Self(0x0204);
    /// Raw bytes that the process wrote to standard error.
    pub const STDERR: Self = Self(0x0205);
    /// [`ProcessEnded`](crate::process::ProcessEnded), the last frame of its stream.
    pub const PROCESS_ENDED: Self = Self(0x0206);
    /// [`SignalProcess`](crate::process::SignalProcess), client to agent, unanswered.
    pub const SIGNAL_PROCESS: Self = Self(0x0207);
    /// [`ResizeTerminal`](crate::process::ResizeTerminal), client to agent, unanswered.
    pub const RESIZE_TERMINAL: Self = Self(0x0208);
    /// [`OutputGap`](crate::process::OutputGap), in the place of output that is no longer kept.
    pub const OUTPUT_GAP: Self = Self(0x0209);

    /// [`AttachProcess`](crate::processes::AttachProcess), answered by [`Kind::PROCESS_ATTACHED`].
    pub const ATTACH_PROCESS: Self = Self(0x0210);
    /// [`ProcessAttached`](crate::processes::ProcessAttached); output follows.
    pub const PROCESS_ATTACHED: Self = Self(0x0211);
    /// [`OutputReplayed`](crate::processes::OutputReplayed), the last frame of a replay that does
    /// not follow a process that still runs.
    pub const OUTPUT_REPLAYED: Self = Self(0x0212);
    /// [`ListProcesses`](crate::processes::ListProcesses), answered by [`Kind::PROCESS_PAGE`].
    pub const LIST_PROCESSES: Self = Self(0x0213);
    /// [`ProcessPage`](crate::processes::ProcessPage).
    pub const PROCESS_PAGE: Self = Self(0x0214);
    /// [`WaitProcess`](crate::processes::WaitProcess), answered by [`Kind::PROCESS`].
    pub const WAIT_PROCESS: Self = Self(0x0215);
    /// [`ProcessInfo`](crate::processes::ProcessInfo).
    pub const PROCESS: Self = Self(0x0216);
    /// [`WriteStdin`](crate::processes::WriteStdin); [`Kind::STDIN`] frames follow. Answered by
    /// [`Kind::STDIN_WRITTEN`].
    pub const WRITE_STDIN: Self = Self(0x0217);
    /// [`StdinWritten`](crate::processes::StdinWritten).
    pub const STDIN_WRITTEN: Self = Self(0x0218);
    /// [`SendSignal`](crate::processes::SendSignal), answered by [`Kind::PROCESS`].
    pub const SEND_SIGNAL: Self = Self(0x0219);
    /// [`KillProcess`](crate::processes::KillProcess), answered by [`Kind::PROCESS`].
    pub const KILL_PROCESS: Self = Self(0x021a);
    /// [`RemoveProcess`](crate::processes::RemoveProcess), answered by [`Kind::PROCESS_REMOVED`].
    pub const REMOVE_PROCESS: Self = Self(0x021b);
    /// [`ProcessRemoved`](crate::processes::ProcessRemoved).
    pub const PROCESS_REMOVED: Self = Self(0x021c);

    /// [`StatFile`](crate::file::manage::StatFile), answered by [`Kind::FILE_INFO`].
    pub const STAT_FILE: Self = Self(0x0300);
    /// [`MakeDirectory`](crate::file::manage::MakeDirectory), answered by [`Kind::FILE_DONE`].
    pub const MAKE_DIRECTORY: Self = Self(0x0302);
    /// [`RenameFile`](crate::file::manage::RenameFile), answered by [`Kind::FILE_DONE`].
    pub const RENAME_FILE: Self = Self(0x0303);
    /// [`RemoveFile`](crate::file::manage::RemoveFile), answered by [`Kind::FILES_REMOVED`].
    pub const REMOVE_FILE: Self = Self(0x0304);
    /// [`MakeSymlink`](crate::file::manage::MakeSymlink), answered by [`Kind::FILE_DONE`].
    pub const MAKE_SYMLINK: Self = Self(0x0305);
    /// [`ReadLink`](crate::file::manage::ReadLink), answered by [`Kind::LINK_TARGET`].
    pub const READ_LINK: Self = Self(0x0306);
    /// [`ChangeMode`](crate::file::manage::ChangeMode), answered by [`Kind::FILE_DONE`].
    pub const CHANGE_MODE: Self = Self(0x0307);
    /// [`ChangeOwner`](crate::file::manage::ChangeOwner), answered by [`Kind::FILE_DONE`].
    pub const CHANGE_OWNER: Self = Self(0x0308);
    /// [`ResizeFile`](crate::file::manage::ResizeFile), answered by [`Kind::FILE_DONE`].
    pub const RESIZE_FILE: Self = Self(0x0309);
    /// [`WalkDirectory`](crate::file::manage::WalkDirectory), answered by [`Kind::DIRECTORY_PAGE`]s
    /// and [`Kind::FILE_DONE`].
    pub const WALK_DIRECTORY: Self = Self(0x030a);
    /// [`FileInfo`](crate::file::FileInfo).
    pub const FILE_INFO: Self = Self(0x0320);
    /// [`FileDone`](crate::file::FileDone).
    pub const FILE_DONE: Self = Self(0x0321);
    /// [`DirectoryPage`](crate::file::manage::DirectoryPage).
    pub const DIRECTORY_PAGE: Self = Self(0x0322);
    /// [`FilesRemoved`](crate::file::manage::FilesRemoved).
    pub const FILES_REMOVED: Self = Self(0x0323);
    /// [`LinkTarget`](crate::file::manage::LinkTarget).
    pub const LINK_TARGET: Self = Self(0x0324);
    /// [`ReadFile`](crate::file::transfer::ReadFile), answered by [`Kind::READ_STARTED`].
    pub const READ_FILE: Self = Self(0x0330);
    /// [`ReadStarted`](crate::file::transfer::ReadStarted).
    pub const READ_STARTED: Self = Self(0x0331);
    /// Raw bytes of a file or an archive, either way.
    pub const FILE_DATA: Self = Self(0x0332);
    /// [`FileHole`](crate::file::transfer::FileHole), either way.
    pub const FILE_HOLE: Self = Self(0x0333);
    /// [`ReadEnded`](crate::file::transfer::ReadEnded), the last frame of the stream.
    pub const READ_ENDED: Self = Self(0x0334);
    /// [`WriteFile`](crate::file::transfer::WriteFile), answered by [`Kind::WRITE_STARTED`].
    pub const WRITE_FILE: Self = Self(0x0338);
    /// [`WriteStarted`](crate::file::transfer::WriteStarted).
    pub const WRITE_STARTED: Self = Self(0x0339);
    /// [`WriteEnd`](crate::file::transfer::WriteEnd), client to agent, answered by
    /// [`Kind::FILE_WRITTEN`].
    pub const WRITE_END: Self = Self(0x033a);
    /// [`FileWritten`](crate::file::transfer::FileWritten), the last frame of the stream.
    pub const FILE_WRITTEN: Self = Self(0x033b);
    /// [`QueryUpload`](crate::file::transfer::QueryUpload), answered by [`Kind::UPLOAD_STATE`].
    pub const QUERY_UPLOAD: Self = Self(0x033c);
    /// [`UploadState`](crate::file::transfer::UploadState).
    pub const UPLOAD_STATE: Self = Self(0x033d);
    /// [`DropUpload`](crate::file::transfer::DropUpload), answered by [`Kind::FILE_DONE`].
    pub const DROP_UPLOAD: Self = Self(0x033e);
    /// [`PackTree`](crate::file::tree::PackTree), answered by data and [`Kind::READ_ENDED`].
    pub const PACK_TREE: Self = Self(0x0340);
    /// [`UnpackTree`](crate::file::tree::UnpackTree), answered by [`Kind::TREE_UNPACKED`].
    pub const UNPACK_TREE: Self = Self(0x0341);
    /// [`TreeUnpacked`](crate::file::tree::TreeUnpacked).
    pub const TREE_UNPACKED: Self = Self(0x0342);
    /// [`WatchFiles`](crate::file::watch::WatchFiles), answered by [`Kind::WATCH_STARTED`].
    pub const WATCH_FILES: Self = Self(0x0348);
    /// [`WatchStarted`](crate::file::watch::WatchStarted).
    pub const WATCH_STARTED: Self = Self(0x0349);
    /// [`FileEvents`](crate::file::watch::FileEvents).
    pub const FILE_EVENTS: Self = Self(0x034a);

    /// [`GetNetwork`](crate::network::GetNetwork), answered by [`Kind::NETWORK`].
    pub const GET_NETWORK: Self = Self(0x0400);
    /// [`SetNetwork`](crate::network::SetNetwork), answered by [`Kind::NETWORK`].
    pub const SET_NETWORK: Self = Self(0x0401);
    /// [`CreateLink`](crate::network::CreateLink), answered by [`Kind::LINK_CREATED`].
    pub const CREATE_LINK: Self = Self(0x0402);
    /// [`NetworkInfo`](crate::network::NetworkInfo).
    pub const NETWORK: Self = Self(0x0410);
    /// [`LinkCreated`](crate::network::LinkCreated).
    pub const LINK_CREATED: Self = Self(0x0411);
}

impl fmt::Debug for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Kind({:#06x})", self.0)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#06x}", self.0)
    }
}

/// One frame with its body in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub kind: Kind,
    /// Zero today. A receiver ignores bits that it does not know.
    pub flags: u8,
    /// The body, at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
}

/// Why bytes are no frame. The stream cannot be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header announces more than a frame may hold.
    #[error("frame of kind {kind} announces {length} bytes; at most {MAX_BODY} are allowed")]
    TooLarge {
        /// The kind in the header.
        kind: Kind,
        /// The length in the header.
        length: u32,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame, {missing} bytes short")]
    Truncated {
        /// How many bytes were still to come.
        missing: usize,
    },
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the body in bytes, at most [`MAX_BODY`].
    pub length: u32,
    /// What the body is.
    pub kind: Kind,
    /// See [`Frame::flags`].
    pub flags: u8,
}

impl Header {
    /// Reads a header and refuses one whose body would be too long.
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, k0, k1, flags] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = Kind(u16::from_le_bytes([k0, k1]));
        match usize::try_from(length) {
            Ok(len) if len <= MAX_BODY => Ok(Self {
                length,
                kind,
                flags,
            }),
            _ => Err(FrameError::TooLarge { kind, length }),
        }
    }

    /// The header's bytes.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [k0, k1] = self.kind.0.to_le_bytes();
        [l0, l1, l2, l3, k0, k1, self.flags]
    }
}

/// Appends a frame to `out`. A body over [`MAX_BODY`] is refused and nothing is appended.
pub fn append(out: &mut Vec<u8>, kind: Kind, body: &[u8]) -> Result<(), FrameError> {
    out.extend_from_slice(&header_for(kind, body.len())?);
    out.extend_from_slice(body);
    Ok(())
}

/// The header of a frame whose body is `length` bytes long, for senders that write the body
/// themselves.
pub fn header_for(kind: Kind, length: usize) -> Result<[u8; HEADER_LEN], FrameError> {
    let wire_length = u32::try_from(length).unwrap_or(u32::MAX);
    if length > MAX_BODY {
        return Err(FrameError::TooLarge {
            kind,
            length: wire_length,
        });
    }
    Ok(Header {
        length: wire_length,
        kind,
        flags: 0,
    }
    .to_bytes())
}

/// Turns a stream's bytes into frames.
///
/// ```
/// use protocol::frame::{FrameReader, Kind, append};
/// let mut bytes = Vec::new();
/// append(&mut bytes, Kind::STDIN, b"hello").unwrap();
/// let mut reader = FrameReader::new();
/// let mut rest = &bytes[..];
/// let frame = reader.push(&mut rest).unwrap().unwrap();
/// assert_eq!(frame.body, b"hello");
/// assert!(rest.is_empty());
/// ```
#[derive(Debug, Default)]
pub struct FrameReader {
    head: heapless::Vec<u8, HEADER_LEN>,
    header: Option<Header>,
    body: Vec<u8>,
}

impl FrameReader {
    /// A reader at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until a frame is complete or `input` is empty.
    ///
    /// After an error the stream is out of step and must be closed.
    pub fn push(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        loop {
            let Some(header) = self.header else {
                let wanted = HEADER_LEN.saturating_sub(self.head.len());
                let taken = take(input, wanted);
                // The head never holds more than it was made for: `taken` is at most `wanted`.
                let _ = self.head.extend_from_slice(taken);
                let Ok(bytes) = <[u8; HEADER_LEN]>::try_from(self.head.as_slice()) else {
                    return Ok(None);
                };
                self.header = Some(Header::parse(bytes)?);
                continue;
            };
            let length = header.length as usize;
            let wanted = length.saturating_sub(self.body.len());
            let taken = take(input, wanted);
            self.make_room(taken.len(), length);
            self.body.extend_from_slice(taken);
            if self.body.len() < length {
                return Ok(None);
            }
            self.head.clear();
            self.header = None;
            let body = std::mem::take(&mut self.body);
            return Ok(Some(Frame {
                kind: header.kind,
                flags: header.flags,
                body,
            }));
        }
    }

    /// Grows with what comes, and never beyond what was announced.
    fn make_room(&mut self, count: usize, length: usize) {
        let needed = self.body.len().saturating_add(count);
        if needed > self.body.capacity() {
            let target = needed.max(needed.saturating_mul(2).min(length));
            self.body
                .reserve_exact(target.saturating_sub(self.body.len()));
        }
    }

    /// The frame that has begun, if it has come so far, and how much of its body is held.
    pub fn unfinished(&self) -> Option<(Header, usize)> {
        self.header.map(|header| (header, self.body.len()))
    }

    /// Says whether the stream may end here: between frames it may, inside one it may not.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.header {
            None if self.head.is_empty() => Ok(()),
            None => Err(FrameError::Truncated {
                missing: HEADER_LEN.saturating_sub(self.head.len()),
            }),
            Some(header) => Err(FrameError::Truncated {
                missing: (header.length as usize).saturating_sub(self.body.len()),
            }),
        }
    }
}

/// Splits up to `wanted` bytes off the front of `input`.
fn take<'a>(input: &mut &'a [u8], wanted: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(wanted.min(input.len()));
    *input = rest;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_header() {
        let bytes = header_for(Kind(0x0204), 0x0001_0203).unwrap();
        assert_eq!(bytes, [0x03, 0x02, 0x01, 0x00, 0x04, 0x02, 0x00]);
    }

    #[test]
    fn oversize_frame_is_refused_at_its_header() {
        let length = u32::try_from(MAX_BODY).unwrap() + 1;
        let header = Header {
            length,
            kind: Kind::STDIN,
            flags: 0,
        }
        .to_bytes();
        let error = FrameReader::new().push(&mut &header[..]).unwrap_err();
        assert_eq!(
            error,
            FrameError::TooLarge {
                kind: Kind::STDIN,
                length
            }
        );
        assert!(append(&mut Vec::new(), Kind::STDIN, &vec![0; MAX_BODY + 1]).is_err());
    }

    #[test]
    fn largest_frame_passes() {
        let mut bytes = Vec::new();
        append(&mut bytes, Kind::STDIN, &vec![7; MAX_BODY]).unwrap();
        let frame = FrameReader::new().push(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!(frame.body.len(), MAX_BODY);
    }

    #[test]
    fn an_announced_length_reserves_no_memory() {
        let header = header_for(Kind::STDIN, MAX_BODY).unwrap();
        let mut reader = FrameReader::new();
        assert_eq!(reader.push(&mut &header[..]), Ok(None));
        assert_eq!(reader.body.capacity(), 0);
    }

    #[test]
    fn a_body_takes_no_more_memory_than_was_announced() {
        let mut bytes = Vec::new();
        append(&mut bytes, Kind::STDIN, &vec![7; MAX_BODY]).unwrap();
        bytes.pop();
        let mut reader = FrameReader::new();
        for piece in bytes.chunks(16 << 10) {
            assert_eq!(reader.push(&mut &piece[..]), Ok(None));
            assert!(reader.body.capacity() <= (2 * reader.body.len()).min(MAX_BODY));
        }
        let (header, held) = reader.unfinished().unwrap();
        assert_eq!((header.kind, held), (Kind::STDIN, MAX_BODY - 1));
    }

    #[test]
    fn an_end_inside_a_frame_is_told_from_an_end_between_frames() {
        let mut bytes = Vec::new();
        append(&mut bytes, Kind::STDIN, b"abc").unwrap();
        let mut reader = FrameReader::new();
        assert_eq!(reader.finish(), Ok(()));
        reader.push(&mut &bytes[..4]).unwrap();
        assert_eq!(reader.finish(), Err(FrameError::Truncated { missing: 3 }));
        reader.push(&mut &bytes[4..8]).unwrap();
        assert_eq!(reader.finish(), Err(FrameError::Truncated { missing: 2 }));
        assert!(reader.push(&mut &bytes[8..]).unwrap().is_some());
        assert_eq!(reader.finish(), Ok(()));
    }

    proptest! {
        #[test]
        fn frames_survive_any_chunking(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..8),
            chunk in 1_usize..50,
        ) {
            let mut bytes = Vec::new();
            for body in &bodies {
                append(&mut bytes, Kind::STDOUT, body).unwrap();
            }
            let mut reader = FrameReader::new();
            let mut seen = Vec::new();
            for piece in bytes.chunks(chunk) {
                let mut rest = piece;
                while let Some(frame) = reader.push(&mut rest).unwrap() {
                    seen.push(frame.body);
                }
            }
            prop_assert_eq!(seen, bodies);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = FrameReader::new();
            let mut rest = &bytes[..];
            while let Ok(Some(_)) = reader.push(&mut rest) {}
        }
    }
}
