//! Directory trees as tar archives (POSIX ustar with pax records). The archive's bytes travel in
//! `FILE_DATA` frames, either way.

use serde::{Deserialize, Serialize};

use crate::message::messages;

/// Packs a tree: `FILE_DATA` frames, then [`ReadEnded`](super::transfer::ReadEnded). Names in the
/// archive are relative to the tree; a tree that is one file has that file's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackTree {
    /// The tree.
    pub path: Vec<u8>,
    /// Say the checksum of the archive in the end.
    pub checksum: bool,
    /// Leave holes out of the archive.
    pub sparse: bool,
    /// Pack devices and pipes, too; else they are left out.
    pub special: bool,
}

/// Unpacks an archive that the client sends in `FILE_DATA` frames behind it, and
/// [`WriteEnd`](super::transfer::WriteEnd). Answered by [`TreeUnpacked`]. Nothing is made outside
/// the tree, whatever the archive says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackTree {
    /// The tree; made when missing.
    pub path: Vec<u8>,
    /// Set owners and groups as the archive has them by number; else all belongs to the agent's
    /// user.
    pub owners: bool,
    /// Make devices and pipes that are in the archive; else they are refused.
    pub special: bool,
}

/// Answer to [`UnpackTree`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeUnpacked {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
}

messages! {
    PACK_TREE => PackTree,
    UNPACK_TREE => UnpackTree,
    TREE_UNPACKED => TreeUnpacked,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_trees() {
        let pack = PackTree {
            path: b"p".to_vec(),
            checksum: true,
            sparse: false,
            special: true,
        };
        golden(&pack, b"\x05\0\0\0\x40\x03\0\x01p\x01\0\x01");
        let unpack = UnpackTree {
            path: b"p".to_vec(),
            owners: true,
            special: false,
        };
        golden(&unpack, b"\x04\0\0\0\x41\x03\0\x01p\x01\0");
        let done = TreeUnpacked {
            entries: 3,
            bytes: 300,
        };
        golden(&done, b"\x03\0\0\0\x42\x03\0\x03\xac\x02");
    }
}
