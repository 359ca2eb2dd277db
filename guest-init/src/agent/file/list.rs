//! Listing a directory: one reading of it, in whatever order the file system has, page after page on
//! one stream as the client takes them. Never more than a page is held.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use protocol::file::manage::{DirectoryEntry, DirectoryPage, WalkDirectory};
use protocol::file::{FileDone, FileType};
use protocol::message::encode;

use super::entries::{Entries, look};
use super::error::{self, Failure, refused};
use super::{info, path};
use crate::agent::Agent;
use crate::agent::stream::{Stream, StreamError};

/// Bytes of one page; the last entry may go over it by a link's target.
const PAGE: usize = 64 << 10;
/// What an entry takes at most besides its name and target.
const ENTRY: usize = 80;

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
        if (is_last && !page.is_empty()) || size >= PAGE {
            let page = DirectoryPage {
                entries: std::mem::take(&mut page),
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
