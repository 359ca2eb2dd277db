//! Files in a VM. Each operation has a stream of its own. [`manage`] asks once and is answered
//! once; [`transfer`] moves the bytes of one file; [`tree`] moves directory trees as tar archives;
//! [`watch`] tells of changes as they happen.
//!
//! Paths are bytes without NUL; a relative one starts at /workspace and the empty one is
//! /workspace. An error's `detail` has two lines: the name of the errno, and the path.

pub mod manage;
pub mod transfer;
pub mod tree;
pub mod watch;

use serde::{Deserialize, Serialize};

use crate::wire_enum::wire_enum;

wire_enum! {
    /// What a name stands for.
    FileType: u8 {
        /// It could not be looked at.
        Unknown = 0,
        /// A regular file.
        Regular = 1,
        /// A directory.
        Directory = 2,
        /// A symbolic link.
        Symlink = 3,
        /// A named pipe.
        Fifo = 4,
        /// A socket.
        Socket = 5,
        /// A character device.
        CharDevice = 6,
        /// A block device.
        BlockDevice = 7,
    }
}

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// What it is.
    pub file_type: FileType,
    /// The twelve permission bits.
    pub mode: u32,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes that it takes on the disk; fewer than `size` when it has holes.
    pub allocated: u64,
    /// Last change of the content: seconds since 1970.
    pub mtime_s: i64,
    /// Nanoseconds of the same.
    pub mtime_ns: u32,
    /// Names that it has.
    pub links: u64,
    /// Its number within its file system.
    pub inode: u64,
    /// Where a symbolic link points, if that was asked for.
    pub target: Option<Vec<u8>>,
}

/// The request was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDone {}

crate::message::messages! {
    FILE_INFO => FileInfo,
    FILE_DONE => FileDone,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_answers() {
        let info = FileInfo {
            file_type: FileType::Symlink,
            mode: 0o777,
            uid: 1,
            gid: 2,
            size: 300,
            allocated: 3,
            mtime_s: -1,
            mtime_ns: 4,
            links: 5,
            inode: 6,
            target: Some(b"t".to_vec()),
        };
        golden(
            &info,
            b"\x0f\0\0\0\x20\x03\0\x03\xff\x03\x01\x02\xac\x02\x03\x01\x04\x05\x06\x01\x01t",
        );
        golden(&FileDone {}, b"\0\0\0\0\x21\x03\0");
    }
}
