//! Listing a directory on one stream, never more than one page in memory. The names are a guest's: each
//! is one name of a directory, or the list is refused.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use protocol::Kind;
use protocol::file::manage::{DirectoryEntry, DirectoryPage, WalkDirectory};

use super::show;
use crate::agent::{Replies, Requests, out_of_order};
use crate::error::ClientError;
use crate::vm::Vm;

/// The longest name and the longest target of a link that Linux has.
const MOST_OF_A_NAME: usize = 255;
const MOST_OF_A_TARGET: usize = 4096;

type Asking = Pin<Box<dyn Future<Output = Result<(Replies, Requests), ClientError>> + Send>>;

enum State {
    /// Nothing has come yet, and nothing is asked before somebody wants it.
    New,
    Asking(Asking),
    Reading {
        replies: Replies,
        // The agent takes the end of our half for our leaving.
        _requests: Requests,
    },
    Over,
}

/// The entries of a directory without `.` and `..`, in no order. What is there all the time comes
/// exactly once, whatever else is made or removed meanwhile.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut entries = vm.read_dir("src");
/// while let Some(entry) = entries.next().await? {
///     println!("{} {}", String::from_utf8_lossy(&entry.name), entry.info.size);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Listing {
    vm: Vm,
    path: Vec<u8>,
    targets: bool,
    page: VecDeque<DirectoryEntry>,
    state: State,
    failed: bool,
}

impl fmt::Debug for Listing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Listing")
            .field("path", &show(&self.path))
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// The entries of a directory, as they are asked for.
    pub fn read_dir(&self, path: impl AsRef<[u8]>) -> Listing {
        Listing {
            vm: self.clone(),
            path: path.as_ref().to_vec(),
            targets: false,
            page: VecDeque::new(),
            state: State::New,
            failed: false,
        }
    }

    /// All entries of a directory in the order of their names' bytes, if there are no more than
    /// `limit`.
    pub async fn list_dir(
        &self,
        path: impl AsRef<[u8]>,
        limit: usize,
    ) -> Result<Vec<DirectoryEntry>, ClientError> {
        let mut entries = Vec::new();
        let mut listing = self.read_dir(path);
        while let Some(entry) = listing.next().await? {
            if entries.len() >= limit {
                return Err(ClientError::TooLong {
                    what: format!("the list of {}", show(&listing.path)),
                    limit: u64::try_from(limit).unwrap_or(u64::MAX),
                });
            }
            entries.push(entry);
        }
        entries.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }
}

impl Listing {
    /// Says of symbolic links where they point.
    #[must_use]
    pub fn with_targets(mut self) -> Self {
        self.targets = true;
        self
    }

    /// The next entry; none after the last. Dropping the call loses nothing.
    pub async fn next(&mut self) -> Result<Option<DirectoryEntry>, ClientError> {
        poll_fn(|cx| self.poll_entry(cx)).await
    }

    fn poll_entry(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<DirectoryEntry>, ClientError>> {
        loop {
            if let Some(entry) = self.page.pop_front() {
                return Poll::Ready(Ok(Some(entry)));
            }
            match &mut self.state {
                State::New => {
                    let vm = self.vm.clone();
                    let request = WalkDirectory {
                        path: self.path.clone(),
                        targets: self.targets,
                    };
                    let asking = async move { vm.begin(&request).await };
                    self.state = State::Asking(Box::pin(asking));
                }
                State::Asking(asking) => {
                    let begun = ready!(asking.as_mut().poll(cx));
                    self.state = State::New;
                    let (replies, requests) = begun.map_err(ClientError::repeatable)?;
                    self.state = State::Reading {
                        replies,
                        _requests: requests,
                    };
                }
                State::Reading { replies, .. } => {
                    let frame = ready!(replies.poll_next(cx)).map_err(ClientError::repeatable)?;
                    match frame.kind {
                        Kind::DIRECTORY_PAGE => {
                            let page: DirectoryPage = protocol::decode(&frame)?;
                            check(&page)?;
                            self.page = page.entries.into();
                        }
                        Kind::FILE_DONE => self.state = State::Over,
                        _ => return Poll::Ready(Err(out_of_order(&frame))),
                    }
                }
                State::Over => return Poll::Ready(Ok(None)),
            }
        }
    }
}

/// What is no name would lead whoever believes it astray, and pages of nothing need not end.
fn check(page: &DirectoryPage) -> Result<(), ClientError> {
    if page.entries.is_empty() {
        return Err(ClientError::Broken("a page of the list is empty".into()));
    }
    for entry in &page.entries {
        let name = entry.name.as_slice();
        let target = entry.info.target.as_ref().map_or(0, Vec::len);
        if entry.name.len() > MOST_OF_A_NAME || target > MOST_OF_A_TARGET {
            return Err(ClientError::Broken(format!(
                "a name of {} bytes, or a link's target of {target}, is longer than can be",
                entry.name.len()
            )));
        }
        if name.is_empty()
            || name == b"."
            || name == b".."
            || name.contains(&b'/')
            || name.contains(&0)
        {
            let message = format!("`{}` is no name in a directory", show(name).escape_debug());
            return Err(ClientError::Broken(message));
        }
    }
    Ok(())
}

/// The same as [`Listing::next`]; nothing follows an error.
impl Stream for Listing {
    type Item = Result<DirectoryEntry, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_entry(cx));
        self.failed = result.is_err();
        Poll::Ready(result.transpose())
    }
}

#[cfg(test)]
mod tests {
    use protocol::file::{FileInfo, FileType};

    use super::*;

    fn page(names: &[&str]) -> DirectoryPage {
        let info = FileInfo {
            file_type: FileType::Regular,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            allocated: 0,
            mtime_s: 0,
            mtime_ns: 0,
            links: 1,
            inode: 1,
            target: None,
        };
        let entry = |name: &&str| DirectoryEntry {
            name: name.as_bytes().to_vec(),
            info: info.clone(),
        };
        DirectoryPage {
            entries: names.iter().map(entry).collect(),
        }
    }

    #[test]
    fn a_name_that_is_none_or_leads_out_of_the_directory_is_refused() {
        let long = "x".repeat(256);
        for good in [&["b", "a"][..], &["..."], &[&long[1..]]] {
            check(&page(good)).unwrap();
        }
        for bad in ["", ".", "..", "b/../../etc", "b\0", &long] {
            assert!(check(&page(&["a", bad])).is_err(), "{bad:?}");
        }
        assert!(check(&page(&[])).is_err());
        let mut target = page(&["b"]);
        target.entries[0].info.target = Some(vec![b'x'; 4096]);
        check(&target).unwrap();
        target.entries[0].info.target = Some(vec![b'x'; 4097]);
        assert!(check(&target).is_err());
    }
}
