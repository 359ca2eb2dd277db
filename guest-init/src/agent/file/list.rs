//! Listing a directory: in order and in pages, or as a stream. In pages the cursor is a name: each page is the smallest names after it, so
//! that it holds whatever is made or removed in between and on every file system. The directory is
//! read once per page and only one page's names are kept. The stream is for large ones: one reading,
//! and no order.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use protocol::ErrorBody;
use protocol::file::manage::{DirectoryEntry, DirectoryPage, WalkDirectory};
use protocol::file::{FileDone, FileType};
use protocol::message::encode;

use super::budget::Budget;
use super::entries::{Entries, look};
use super::error::{self, Failure, refused};
use super::{info, path};
use crate::agent::Agent;
use crate::agent::stream::{Stream, StreamError};

/// Bytes of one page; the last entry may go over it by a link's target.
const MAX_PAGE: usize = 1 << 20;
/// The same for one of many.
const SMALL_PAGE: usize = 64 << 10;
/// What an entry takes at most besides its name and target.
const ENTRY: usize = 80;

/// The page after `after`.
pub(crate) fn page(
    path: &Path,
    after: &OsStr,
    limit: u16,
    targets: bool,
) -> Result<DirectoryPage, ErrorBody> {
    let failed = |errno: Errno| refused("list", path, errno);
    let mut entries = Entries::open(path).map_err(failed)?;
    let limit = match limit {
        0 => usize::MAX,
        some => usize::from(some),
    };
    // Each page costs a reading of the whole directory, so they are as large as can be.
    let budget = Budget::take();
    let max_page = budget.choose(MAX_PAGE, SMALL_PAGE);
    let mut selection = Selection::new(limit, max_page);
    while let Some(entry) = entries.next().map_err(failed)? {
        if entry.name.as_bytes() > after.as_bytes() {
            selection.offer(entry.name);
        }
    }
    let mut page = DirectoryPage {
        entries: Vec::new(),
        next: selection.next(),
    };
    let mut size: usize = 0;
    for name in selection.names {
        if size >= max_page {
            page.next = page.entries.last().map(|last| last.name.clone());
            break;
        }
        if let Some(entry) = entry(entries.as_fd(), &name, targets) {
            size = size.saturating_add(weight(&entry));
            page.entries.push(entry);
        }
    }
    Ok(page)
}

/// Sends everything that is in a directory, in one reading and page after page, as fast as the client
/// takes it.
pub(super) fn walk(
    agent: &Agent,
    request: WalkDirectory,
    mut stream: Stream,
) -> Result<(), StreamError> {
    match send_all(agent, request, &mut stream) {
        Ok(()) => stream.finish(&FileDone {}),
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::Refused(error)) => stream.refuse(&error),
    }
}

fn send_all(agent: &Agent, request: WalkDirectory, stream: &mut Stream) -> Result<(), Failure> {
    let path = path::parse(request.path, &agent.workspace)?;
    let failed = |errno: Errno| refused("list", &path, errno);
    let mut entries = Entries::open(&path).map_err(failed)?;
    let directory = entries.as_fd().try_clone_to_owned();
    let directory = directory.map_err(|error| error::failed("list", &path, &error))?;
    let (mut page, mut size) = (Vec::new(), 0_usize);
    loop {
        let next = entries.next().map_err(failed)?;
        let is_last = next.is_none();
        let next = next.and_then(|next| entry(directory.as_fd(), next.name, request.targets));
        if let Some(next) = next {
            size = size.saturating_add(weight(&next));
            page.push(next);
        }
        if (is_last && !page.is_empty()) || size >= SMALL_PAGE {
            let page = DirectoryPage {
                entries: std::mem::take(&mut page),
                next: None,
            };
            size = 0;
            stream.send_all(&encode(&page).map_err(StreamError::from)?)?;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// What is under this name; nothing if it was removed meanwhile.
fn entry(directory: BorrowedFd<'_>, name: &OsStr, targets: bool) -> Option<DirectoryEntry> {
    let info = match look(directory, name) {
        Ok(stat) => {
            let mut info = info::info(&stat);
            if targets && info.file_type == FileType::Symlink {
                info.target = info::target(directory, name);
            }
            info
        }
        Err(Errno::ENOENT) => return None,
        Err(_) => info::unknown(),
    };
    Some(DirectoryEntry {
        name: name.as_bytes().to_vec(),
        info,
    })
}

/// About how many bytes it takes on a page.
fn weight(entry: &DirectoryEntry) -> usize {
    let target = entry.info.target.as_ref().map_or(0, Vec::len);
    entry
        .name
        .len()
        .saturating_add(target)
        .saturating_add(ENTRY)
}

/// The smallest names of those that were offered, as many as fit on a page.
struct Selection {
    names: BTreeSet<OsString>,
    bytes: usize,
    limit: usize,
    max_page: usize,
    /// The smallest name that there was no room for: from it on, all belong to later pages.
    ceiling: Option<OsString>,
}

impl Selection {
    fn new(limit: usize, max_page: usize) -> Self {
        Self {
            names: BTreeSet::new(),
            bytes: 0,
            limit,
            max_page,
            ceiling: None,
        }
    }

    fn offer(&mut self, name: &OsStr) {
        if self.ceiling.as_ref().is_some_and(|first| name >= first) {
            return;
        }
        if self.names.insert(name.to_owned()) {
            self.bytes = self.bytes.saturating_add(name.len()).saturating_add(ENTRY);
        }
        while self.names.len() > self.limit || self.bytes > self.max_page {
            let Some(last) = self.names.pop_last() else {
                break;
            };
            let bytes = last.len().saturating_add(ENTRY);
            self.bytes = self.bytes.saturating_sub(bytes);
            self.ceiling = Some(last);
        }
    }

    /// After which name the next page begins, if there is one.
    fn next(&self) -> Option<Vec<u8>> {
        self.ceiling.as_ref()?;
        self.names.last().map(|last| last.as_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_name_does_not_take_the_place_of_a_smaller_one_that_did_not_fit() {
        let mut selection = Selection::new(usize::MAX, 2 * ENTRY + 9);
        for name in ["a", "ccccccccc", "d"] {
            selection.offer(OsStr::new(name));
        }
        assert_eq!(selection.next().as_deref(), Some(&b"a"[..]));
        assert_eq!(selection.names.len(), 1);
    }

    proptest! {
        #[test]
        fn pages_together_have_every_name_once_in_whatever_order_they_are_read(
            names in prop::collection::hash_set("[a-d]{1,40}", 0..60),
            room in 200_usize..900,
            limit in 1_usize..20,
        ) {
            let mut seen: Vec<Vec<u8>> = Vec::new();
            let mut after = Vec::new();
            loop {
                let mut selection = Selection::new(limit, room);
                for name in names.iter().filter(|name| name.as_bytes() > &after[..]) {
                    selection.offer(OsStr::new(name));
                }
                seen.extend(selection.names.iter().map(|name| name.as_bytes().to_vec()));
                match selection.next() {
                    Some(next) => after = next,
                    None => break,
                }
            }
            let mut all: Vec<_> = names.iter().map(|name| name.as_bytes().to_vec()).collect();
            all.sort();
            prop_assert_eq!(seen, all);
        }
    }
}
