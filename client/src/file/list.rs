//! Listing a directory, a page at a time and never more than one page in memory. The names are a
//! guest's: each is one name of a directory, or the list is refused.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use protocol::file::manage::{DirectoryEntry, DirectoryPage, ListDirectory};

use super::show;
use crate::error::ClientError;
use crate::vm::{Repeat, Vm};

/// The longest name and the longest target of a link that Linux has.
const MOST_OF_A_NAME: usize = 255;
const MOST_OF_A_TARGET: usize = 4096;

type Asking = Pin<Box<dyn Future<Output = Result<DirectoryPage, ClientError>> + Send>>;

/// The entries of a directory in the order of their names' bytes, without `.` and `..`. What is
/// there all the time comes exactly once, whatever else is made or removed meanwhile.
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
    /// The page that is being asked for.
    asking: Option<Asking>,
    /// Where the next page begins; none after the last.
    after: Option<Vec<u8>>,
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
            asking: None,
            after: Some(Vec::new()),
            failed: false,
        }
    }

    /// All entries of a directory, if there are no more than `limit`.
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
            let Some(after) = &self.after else {
                return Poll::Ready(Ok(None));
            };
            let asking = self.asking.get_or_insert_with(|| {
                let vm = self.vm.clone();
                let request = ListDirectory {
                    path: self.path.clone(),
                    after: after.clone(),
                    limit: 0,
                    targets: self.targets,
                };
                Box::pin(async move { vm.ask(&request, Repeat::Safe).await })
            });
            let page = ready!(asking.as_mut().poll(cx));
            self.asking = None;
            let page = page?;
            check(after, &page)?;
            self.after = page.next;
            self.page = page.entries.into();
        }
    }
}

/// A page that goes back, or that has what is no name, would lead whoever believes it astray.
fn check(after: &[u8], page: &DirectoryPage) -> Result<(), ClientError> {
    let names = page.entries.iter().map(|entry| entry.name.as_slice());
    let ordered = std::iter::once(after)
        .chain(names.clone())
        .is_sorted_by(|one, next| one < next);
    let last = names.clone().next_back().unwrap_or(after);
    let goes_on = page
        .next
        .as_ref()
        .is_none_or(|next| next.as_slice() >= last && next.as_slice() > after);
    if !ordered || !goes_on {
        return Err(ClientError::Broken("the list is not in order".into()));
    }
    for entry in &page.entries {
        let target = entry.info.target.as_ref().map_or(0, Vec::len);
        if entry.name.len() > MOST_OF_A_NAME || target > MOST_OF_A_TARGET {
            return Err(ClientError::Broken(format!(
                "a name of {} bytes, or a link's target of {target}, is longer than can be",
                entry.name.len()
            )));
        }
    }
    for name in names {
        if name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
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

    fn page(names: &[&str], next: Option<&str>) -> DirectoryPage {
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
            next: next.map(|next| next.as_bytes().to_vec()),
        }
    }

    #[test]
    fn a_page_that_goes_back_or_leads_out_of_the_directory_is_refused() {
        for good in [
            page(&[], None),
            page(&["b", "c"], None),
            page(&["b"], Some("b")),
            page(&[], Some("d")),
            page(&["..."], None),
        ] {
            check(b"", &good).unwrap();
        }
        check(b"a", &page(&["b"], Some("c"))).unwrap();
        for bad in [
            page(&["a"], None),
            page(&["c", "b"], None),
            page(&["b", "b"], None),
            page(&["c"], Some("b")),
            page(&[], Some("a")),
            page(&["b/../../etc"], None),
            page(&["b\0"], None),
        ] {
            assert!(check(b"a", &bad).is_err(), "{bad:?}");
        }
        let long = "x".repeat(256);
        check(b"a", &page(&[&long[1..]], None)).unwrap();
        assert!(check(b"a", &page(&[&long], None)).is_err());
        let mut target = page(&["b"], None);
        target.entries[0].info.target = Some(vec![b'x'; 4096]);
        check(b"a", &target).unwrap();
        target.entries[0].info.target = Some(vec![b'x'; 4097]);
        assert!(check(b"a", &target).is_err());
        for bad in ["", ".", ".."] {
            assert!(check(b"", &page(&[bad], None)).is_err(), "{bad}");
        }
    }
}
