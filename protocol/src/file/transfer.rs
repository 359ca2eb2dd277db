//! The bytes of one file, either way. Data travels in `FILE_DATA` frames of raw bytes; a stretch of
//! zeros that takes no room may travel as [`FileHole`]. Checksums are BLAKE3 of the content, holes
//! counted as the zeros that they read as.

use serde::{Deserialize, Serialize};

use super::FileInfo;
use crate::message::messages;
use crate::wire_enum::wire_enum;

/// Reads a file: [`ReadStarted`], `FILE_DATA` and [`FileHole`] frames, [`ReadEnded`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFile {
    /// Which one.
    pub path: Vec<u8>,
    /// Where to begin.
    pub offset: u64,
    /// Most bytes to send; none: up to the end.
    pub length: Option<u64>,
    /// Say the checksum of what was sent in the end.
    pub checksum: bool,
    /// So many bytes before `offset` count in the checksum, too: the client has them already.
    pub before: u64,
    /// Send holes as [`FileHole`].
    pub sparse: bool,
    /// Read pipes and devices, too, which may never end.
    pub special: bool,
}

/// First answer to [`ReadFile`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadStarted {
    /// The file as it was opened.
    pub info: FileInfo,
    /// How many bytes will follow, holes included, unless the file becomes shorter meanwhile; none
    /// when nobody can know (files of the kernel, pipes, devices).
    pub total: Option<u64>,
}

/// So many bytes are zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHole {
    /// How many.
    pub length: u64,
}

/// The last frame of what is sent by the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadEnded {
    /// How many bytes were sent, holes included.
    pub bytes: u64,
    /// Their checksum if it was asked for, with what the request counted in before them.
    pub blake3: Option<[u8; 32]>,
}

/// Names an upload across connections. Chosen at random by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UploadId(pub [u8; 16]);

impl std::fmt::Display for UploadId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

wire_enum! {
    /// What becomes of the file that has the name already.
    WriteMode: u8 {
        /// It is replaced in one step, when everything is there and on the disk.
        Replace = 0,
        /// What is sent is added to its end as it comes.
        Append = 1,
        /// It is replaced in one step unless it exists.
        Create = 2,
    }
}

/// Writes a file. The client sends `FILE_DATA` and [`FileHole`] frames behind it, without waiting
/// for [`WriteStarted`], and [`WriteEnd`]; the agent answers [`FileWritten`]. Without `WriteEnd`
/// nothing appears under the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFile {
    /// Which one; missing parents are made.
    pub path: Vec<u8>,
    /// What becomes of an old one.
    pub mode: WriteMode,
    /// Permission bits; none keeps those of the old file, or else 0644.
    pub permissions: Option<u32>,
    /// How long the whole file will be, if that is known. Another length is refused.
    pub size: Option<u64>,
    /// Compute the checksum of the whole file.
    pub checksum: bool,
    /// Keep what arrived when the stream breaks, under this name.
    pub upload: Option<UploadId>,
    /// Go on here with what was kept; what was kept beyond is dropped. Zero begins anew.
    pub offset: u64,
}

/// The file can be written. Comes before the first byte is needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStarted {}

/// Everything was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteEnd {
    /// What the checksum has to be. Another one is refused and nothing appears under the name.
    pub blake3: Option<[u8; 32]>,
}

/// The file is there, and on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWritten {
    /// Length of the file in bytes.
    pub size: u64,
    /// Checksum of what was sent (of all of it, if in several streams), if it was asked for.
    pub blake3: Option<[u8; 32]>,
}

/// Asks how far an upload has come; answered by [`UploadState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryUpload {
    /// The file that it is to become.
    pub path: Vec<u8>,
    /// Its name.
    pub upload: UploadId,
}

/// Answer to [`QueryUpload`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadState {
    /// So many bytes are there.
    pub offset: u64,
    /// Their checksum.
    pub blake3: [u8; 32],
}

/// Throws away what an upload has left; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropUpload {
    /// The file that it was to become.
    pub path: Vec<u8>,
    /// Its name.
    pub upload: UploadId,
}

messages! {
    READ_FILE => ReadFile,
    READ_STARTED => ReadStarted,
    FILE_HOLE => FileHole,
    READ_ENDED => ReadEnded,
    WRITE_FILE => WriteFile,
    WRITE_STARTED => WriteStarted,
    WRITE_END => WriteEnd,
    FILE_WRITTEN => FileWritten,
    QUERY_UPLOAD => QueryUpload,
    UPLOAD_STATE => UploadState,
    DROP_UPLOAD => DropUpload,
}

#[cfg(test)]
mod tests {
    use super::super::FileType;
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_reading() {
        let read = ReadFile {
            path: b"p".to_vec(),
            offset: 300,
            length: Some(1),
            checksum: true,
            before: 200,
            sparse: false,
            special: true,
        };
        golden(
            &read,
            b"\x0b\0\0\0\x30\x03\0\x01p\xac\x02\x01\x01\x01\xc8\x01\0\x01",
        );
        let info = FileInfo {
            file_type: FileType::Regular,
            mode: 1,
            uid: 2,
            gid: 3,
            size: 4,
            allocated: 5,
            mtime_s: 6,
            mtime_ns: 7,
            links: 8,
            inode: 9,
            target: None,
        };
        let started = ReadStarted {
            info,
            total: Some(4),
        };
        golden(
            &started,
            b"\x0d\0\0\0\x31\x03\0\x01\x01\x02\x03\x04\x05\x0c\x07\x08\x09\0\x01\x04",
        );
        golden(&FileHole { length: 300 }, b"\x02\0\0\0\x33\x03\0\xac\x02");
        let ended = ReadEnded {
            bytes: 300,
            blake3: Some([7; 32]),
        };
        let mut bytes = b"\x23\0\0\0\x34\x03\0\xac\x02\x01".to_vec();
        bytes.extend_from_slice(&[7; 32]);
        golden(&ended, &bytes);
    }

    #[test]
    fn golden_writing() {
        let write = WriteFile {
            path: b"p".to_vec(),
            mode: WriteMode::Append,
            permissions: Some(0o755),
            size: Some(300),
            checksum: true,
            upload: Some(UploadId([9; 16])),
            offset: 1,
        };
        let mut bytes = b"\x1c\0\0\0\x38\x03\0\x01p\x01\x01\xed\x03\x01\xac\x02\x01\x01".to_vec();
        bytes.extend_from_slice(&[9; 16]);
        bytes.push(1);
        golden(&write, &bytes);
        golden(&WriteStarted {}, b"\0\0\0\0\x39\x03\0");
        golden(&WriteEnd { blake3: None }, b"\x01\0\0\0\x3a\x03\0\0");
        let written = FileWritten {
            size: 300,
            blake3: None,
        };
        golden(&written, b"\x03\0\0\0\x3b\x03\0\xac\x02\0");
    }

    #[test]
    fn golden_resuming() {
        let upload = UploadId([9; 16]);
        let mut request = b"\x12\0\0\0\x3c\x03\0\x01p".to_vec();
        request.extend_from_slice(&[9; 16]);
        let path = b"p".to_vec();
        golden(&QueryUpload { path, upload }, &request);
        request[4] = 0x3e;
        let path = b"p".to_vec();
        golden(&DropUpload { path, upload }, &request);
        let state = UploadState {
            offset: 300,
            blake3: [7; 32],
        };
        let mut bytes = b"\x22\0\0\0\x3d\x03\0\xac\x02".to_vec();
        bytes.extend_from_slice(&[7; 32]);
        golden(&state, &bytes);
        assert_eq!(upload.to_string(), "09".repeat(16));
    }
}
