//! Listing a directory in pages. The cursor is a name: each page is the smallest names after it, so
//! that it holds whatever is made or removed in between and on every file system. The directory is
//! read once per page and only one page's names are kept.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use protocol::ErrorBody;
use protocol::file::FileType;
use protocol::file::manage::{DirectoryEntry, DirectoryPage};

use super::budget::Budget;
use super::entries::{Entries, look};
use super::error::refused;
use super::info;

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
    let mut names: BTreeSet<OsString> = BTreeSet::new();
    let mut bytes: usize = 0;
    let mut more = false;
    while let Some(entry) = entries.next().map_err(failed)? {
        if entry.name.as_bytes() <= after.as_bytes() {
            continue;
        }
        let full = names.len() >= limit || bytes >= max_page;
        if full
            && names
                .last()
                .is_some_and(|last| entry.name > last.as_os_str())
        {
            more = true;
            continue;
        }
        if names.insert(entry.name.to_owned()) {
            bytes = bytes.saturating_add(entry.name.len()).saturating_add(ENTRY);
        }
        if names.len() > limit || bytes > max_page {
            more = true;
            if let Some(last) = names.pop_last() {
                bytes = bytes.saturating_sub(last.len().saturating_add(ENTRY));
            }
        }
    }
    let mut page = DirectoryPage {
        entries: Vec::new(),
        next: None,
    };
    if more {
        page.next = names.last().map(|last| last.as_bytes().to_vec());
    }
    let mut size: usize = 0;
    for name in names {
        if size >= max_page {
            page.next = page.entries.last().map(|last| last.name.clone());
            break;
        }
        let info = match look(entries.as_fd(), &name) {
            Ok(stat) => {
                let mut info = info::info(&stat);
                if targets && info.file_type == FileType::Symlink {
                    info.target = info::target(entries.as_fd(), &name);
                }
                info
            }
            // Removed meanwhile.
            Err(Errno::ENOENT) => continue,
            Err(_) => info::unknown(),
        };
        size = size
            .saturating_add(name.len())
            .saturating_add(info.target.as_ref().map_or(0, Vec::len))
            .saturating_add(ENTRY);
        page.entries.push(DirectoryEntry {
            name: name.into_vec(),
            info,
        });
    }
    Ok(page)
}
