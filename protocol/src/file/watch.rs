//! Changes as they happen: [`WatchFiles`], answered by [`WatchStarted`], then [`FileEvents`] until
//! the client ends the stream.

use serde::{Deserialize, Serialize};

use crate::message::messages;
use crate::wire_enum::wire_enum;

/// What to watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchFiles {
    /// A file or a directory.
    pub path: Vec<u8>,
    /// Watch the directories below it, too, also those that are made later.
    pub recursive: bool,
}

/// Changes from now on will be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchStarted {
    /// How many directories (or files) are watched.
    pub watched: u32,
}

wire_enum! {
    /// What happened.
    FileChange: u8 {
        /// A name came into being.
        Created = 1,
        /// Content was written or cut.
        Modified = 2,
        /// Somebody who could write closed it.
        Closed = 3,
        /// Permissions, owner, times or links changed.
        Attributes = 4,
        /// A name is gone.
        Removed = 5,
        /// A name was taken away by a rename; the other half has the same cookie.
        MovedFrom = 6,
        /// A name was given by a rename.
        MovedTo = 7,
        /// Changes came faster than they were taken and some were lost: look again at everything.
        Overflow = 8,
        /// What was to be watched is gone or was moved away; nothing more will come from it.
        Gone = 9,
        /// A directory could not be watched; what happens in it is not told.
        NotWatched = 10,
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvent {
    /// What happened.
    pub change: FileChange,
    /// To what, relative to the watched directory; empty is what is watched itself.
    pub path: Vec<u8>,
    /// It is a directory.
    pub directory: bool,
    /// Joins the halves of a rename; else zero.
    pub cookie: u32,
}

/// Changes in the order in which they happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvents {
    /// At least one.
    pub events: Vec<FileEvent>,
}

messages! {
    WATCH_FILES => WatchFiles,
    WATCH_STARTED => WatchStarted,
    FILE_EVENTS => FileEvents,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_watching() {
        let watch = WatchFiles {
            path: b"p".to_vec(),
            recursive: true,
        };
        golden(&watch, b"\x03\0\0\0\x48\x03\0\x01p\x01");
        golden(
            &WatchStarted { watched: 300 },
            b"\x02\0\0\0\x49\x03\0\xac\x02",
        );
        let events = FileEvents {
            events: vec![FileEvent {
                change: FileChange::MovedTo,
                path: b"n".to_vec(),
                directory: true,
                cookie: 300,
            }],
        };
        golden(&events, b"\x07\0\0\0\x4a\x03\0\x01\x07\x01n\x01\xac\x02");
    }
}
