//! Small operations: one request, one answer, the end of the stream.

use serde::{Deserialize, Serialize};

use super::FileInfo;
use crate::message::messages;

/// Looks at a file; answered by [`FileInfo`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatFile {
    /// Which one.
    pub path: Vec<u8>,
    /// Look at what a symbolic link points to instead of the link.
    pub follow: bool,
}

/// Lists a directory of any size in one reading and in the file system's order; answered by
/// [`DirectoryPage`]s, and at the end by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkDirectory {
    /// Which one.
    pub path: Vec<u8>,
    /// Read where symbolic links point.
    pub targets: bool,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// The name alone.
    pub name: Vec<u8>,
    /// The file itself; of a link, the link. What could not be looked at is
    /// [`FileType::Unknown`](super::FileType::Unknown).
    pub info: FileInfo,
}

/// Entries of a directory. What was there all the time is on exactly one page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryPage {
    /// At least one; without `.` and `..`.
    pub entries: Vec<DirectoryEntry>,
}

/// Makes a directory; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeDirectory {
    /// Which one.
    pub path: Vec<u8>,
    /// Permission bits of the last one; missing parents get 0755.
    pub mode: u32,
    /// Make missing parents, and take a directory that exists for success.
    pub parents: bool,
}

/// Gives a file another name; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenameFile {
    /// The old name.
    pub from: Vec<u8>,
    /// The new name.
    pub to: Vec<u8>,
    /// Refuse when the new name is taken.
    pub no_replace: bool,
}

/// Removes a file or directory, never what a link points to; answered by [`FilesRemoved`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveFile {
    /// Which one.
    pub path: Vec<u8>,
    /// Remove what is in a directory, too.
    pub recursive: bool,
}

/// Answer to [`RemoveFile`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesRemoved {
    /// How many names.
    pub count: u64,
}

/// Makes a symbolic link; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeSymlink {
    /// What it says; kept as it is.
    pub target: Vec<u8>,
    /// The link.
    pub path: Vec<u8>,
}

/// Asks where a symbolic link points; answered by [`LinkTarget`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadLink {
    /// The link.
    pub path: Vec<u8>,
}

/// Answer to [`ReadLink`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkTarget {
    /// What it says.
    pub target: Vec<u8>,
}

/// Sets the permission bits; links are followed. Answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeMode {
    /// Of which file.
    pub path: Vec<u8>,
    /// The twelve bits.
    pub mode: u32,
}

/// Sets owner and group; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeOwner {
    /// Of which file.
    pub path: Vec<u8>,
    /// A name of /etc/passwd or a decimal number; empty leaves the owner.
    pub user: Vec<u8>,
    /// A name of /etc/group or a decimal number; empty leaves the group.
    pub group: Vec<u8>,
    /// Follow a symbolic link instead of changing the link.
    pub follow: bool,
}

/// Makes a regular file longer or shorter; answered by [`FileDone`](super::FileDone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeFile {
    /// Which one; it has to exist.
    pub path: Vec<u8>,
    /// Its new length in bytes. What is added reads as zeros.
    pub length: u64,
}

messages! {
    STAT_FILE => StatFile,
    MAKE_DIRECTORY => MakeDirectory,
    RENAME_FILE => RenameFile,
    REMOVE_FILE => RemoveFile,
    MAKE_SYMLINK => MakeSymlink,
    READ_LINK => ReadLink,
    CHANGE_MODE => ChangeMode,
    CHANGE_OWNER => ChangeOwner,
    RESIZE_FILE => ResizeFile,
    WALK_DIRECTORY => WalkDirectory,
    DIRECTORY_PAGE => DirectoryPage,
    FILES_REMOVED => FilesRemoved,
    LINK_TARGET => LinkTarget,
}

#[cfg(test)]
mod tests {
    use super::super::FileType;
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_looking() {
        let stat = StatFile {
            path: b"p".to_vec(),
            follow: true,
        };
        golden(&stat, b"\x03\0\0\0\x00\x03\0\x01p\x01");
        let walk = WalkDirectory {
            path: b"p".to_vec(),
            targets: true,
        };
        golden(&walk, b"\x03\0\0\0\x0a\x03\0\x01p\x01");
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
        let page = DirectoryPage {
            entries: vec![DirectoryEntry {
                name: b"n".to_vec(),
                info,
            }],
        };
        golden(
            &page,
            b"\x0e\0\0\0\x22\x03\0\x01\x01n\x01\x01\x02\x03\x04\x05\x0c\x07\x08\x09\0",
        );
        golden(
            &ReadLink {
                path: b"p".to_vec(),
            },
            b"\x02\0\0\0\x06\x03\0\x01p",
        );
        let target = b"t".to_vec();
        golden(&LinkTarget { target }, b"\x02\0\0\0\x24\x03\0\x01t");
    }

    #[test]
    fn golden_changing() {
        let path = b"p".to_vec();
        let make = MakeDirectory {
            path: path.clone(),
            mode: 0o755,
            parents: true,
        };
        golden(&make, b"\x05\0\0\0\x02\x03\0\x01p\xed\x03\x01");
        let rename = RenameFile {
            from: path.clone(),
            to: b"q".to_vec(),
            no_replace: true,
        };
        golden(&rename, b"\x05\0\0\0\x03\x03\0\x01p\x01q\x01");
        let remove = RemoveFile {
            path: path.clone(),
            recursive: true,
        };
        golden(&remove, b"\x03\0\0\0\x04\x03\0\x01p\x01");
        golden(
            &FilesRemoved { count: 300 },
            b"\x02\0\0\0\x23\x03\0\xac\x02",
        );
        let link = MakeSymlink {
            target: b"t".to_vec(),
            path: path.clone(),
        };
        golden(&link, b"\x04\0\0\0\x05\x03\0\x01t\x01p");
        let mode = ChangeMode {
            path: path.clone(),
            mode: 0o755,
        };
        golden(&mode, b"\x04\0\0\0\x07\x03\0\x01p\xed\x03");
        let owner = ChangeOwner {
            path: path.clone(),
            user: b"u".to_vec(),
            group: b"g".to_vec(),
            follow: true,
        };
        golden(&owner, b"\x07\0\0\0\x08\x03\0\x01p\x01u\x01g\x01");
        let resize = ResizeFile { path, length: 300 };
        golden(&resize, b"\x04\0\0\0\x09\x03\0\x01p\xac\x02");
    }
}
