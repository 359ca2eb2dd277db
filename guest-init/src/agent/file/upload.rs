//! What uploads leave behind until they are complete: hidden files beside the one that they are to
//! become. How many there are, and how old, is bounded: the list of them is kept here and, in a
//! machine of its own, as links in a directory, so that a new run of the machine knows them too. As
//! long as there are any, a thread sleeps until the next one is too old.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use protocol::file::transfer::{DropUpload, QueryUpload, UploadId, UploadState};
use protocol::file::{FileDone, FileType};
use protocol::{ErrorBody, ErrorCode};

use super::error::{failed, invalid, refused};
use super::path::{self, Place};
use super::{info, path::follow};
use crate::agent::stream::{Stream, StreamError};
use crate::agent::{Agent, lock, start_thread};
use crate::log;

/// Broken uploads that are kept; the oldest goes first.
const MAX_KEPT: usize = 64;
/// Links of an earlier run that are looked at: those of every stream that could write then, too.
const MAX_LINKS: usize = 1024;
/// How long a broken upload is kept.
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// What the link to an upload that nobody can resume has behind the upload's name.
const ONCE: &str = ".once";
/// How the hidden files are called, before the upload's name.
const PREFIX: &str = ".supvm-upload-";
/// Bytes that are hashed in one go.
const CHUNK: usize = 128 << 10;
/// After so many bytes it is looked whether the client still waits.
const LOOK: u64 = 256 << 20;

/// All uploads that have a file.
#[derive(Debug)]
pub(crate) struct Uploads {
    known: Mutex<HashMap<UploadId, Known>>,
    /// A thread sleeps until the next one is too old. Changed while `known` is locked.
    is_watched: AtomicBool,
    max_age: Duration,
    /// Where the list is kept over a restart.
    index: Option<PathBuf>,
}

#[derive(Debug)]
struct Known {
    file: PathBuf,
    /// A stream writes it now.
    active: bool,
    /// A later stream can go on with it.
    resumable: bool,
    touched: SystemTime,
}

impl Known {
    /// How long it may still be kept, if no stream writes it; zero when it is too old.
    fn left(&self, max_age: Duration) -> Option<Duration> {
        let age = self.touched.elapsed().unwrap_or_default();
        (!self.active).then(|| max_age.saturating_sub(age))
    }
}

impl Uploads {
    /// A list that is kept in this directory, or not kept at all.
    pub(crate) fn kept_in(index: Option<PathBuf>) -> Arc<Self> {
        Self::of_age(index, MAX_AGE)
    }

    fn of_age(index: Option<PathBuf>, max_age: Duration) -> Arc<Self> {
        Arc::new(Self {
            known: Mutex::default(),
            is_watched: AtomicBool::new(false),
            max_age,
            index,
        })
    }

    /// Takes up the list of an earlier run. What nobody can resume is removed at once.
    pub(crate) fn load(self: &Arc<Self>) {
        let Some(index) = &self.index else { return };
        let Ok(links) = std::fs::read_dir(index) else {
            return;
        };
        let mut known = lock(&self.known);
        for link in links.flatten().take(MAX_LINKS) {
            let name = link.file_name();
            let name = name.to_str().unwrap_or_default();
            let (id, resumable) = match name.strip_suffix(ONCE) {
                Some(id) => (id, false),
                None => (name, true),
            };
            let Some(upload) = parse_id(id) else {
                continue;
            };
            let Ok(file) = std::fs::read_link(link.path()) else {
                continue;
            };
            let ours = file.file_name() == Some(hidden_name(upload).as_os_str());
            let about = std::fs::symlink_metadata(&file).and_then(|about| about.modified());
            match about {
                Ok(touched) if ours && resumable => {
                    known.entry(upload).or_insert(Known {
                        file,
                        active: false,
                        resumable,
                        touched,
                    });
                }
                other => {
                    if ours && other.is_ok() {
                        log::info(format_args!("event=upload_swept upload={upload}"));
                        // It may have gone by itself.
                        let _ = std::fs::remove_file(&file);
                    }
                    // It will be looked at again by the next run if it stays.
                    let _ = std::fs::remove_file(link.path());
                }
            }
        }
        self.sweep(&mut known);
        self.watch(&mut known);
    }

    /// Sees to it that what is kept now goes when it is too old, whatever else happens.
    fn watch(self: &Arc<Self>, known: &mut HashMap<UploadId, Known>) {
        if self.next_end(known).is_none() || self.is_watched.swap(true, Ordering::AcqRel) {
            return;
        }
        let uploads = Arc::clone(self);
        let started = start_thread("uploads", move || {
            while let Some(left) = uploads.sweep_old() {
                std::thread::sleep(left.saturating_add(Duration::from_millis(1)));
            }
        });
        if let Err(error) = started {
            self.is_watched.store(false, Ordering::Release);
            log::warn(format_args!("event=uploads_not_watched error={error}"));
        }
    }

    /// Removes what is too old. Says when the next one will be; if there is none, nobody watches.
    fn sweep_old(&self) -> Option<Duration> {
        let mut known = lock(&self.known);
        self.sweep(&mut known);
        let next = self.next_end(&known);
        if next.is_none() {
            self.is_watched.store(false, Ordering::Release);
        }
        next
    }

    fn next_end(&self, known: &HashMap<UploadId, Known>) -> Option<Duration> {
        known
            .values()
            .filter_map(|one| one.left(self.max_age))
            .min()
    }

    /// Claims an upload for one stream.
    pub(crate) fn claim(
        self: &Arc<Self>,
        upload: UploadId,
        file: &Path,
        resumable: bool,
    ) -> Result<Claim<'_>, ErrorBody> {
        let mut known = lock(&self.known);
        match known.get(&upload) {
            Some(other) if other.active => {
                let message = format!("another stream writes upload {upload}");
                let error = ErrorBody::caller(ErrorCode::FileBusy, message);
                return Err(error.retryable_after_ms(500));
            }
            Some(other) if other.file != file => {
                return Err(invalid(format!(
                    "upload {upload} is for another file; take another name for this one"
                )));
            }
            _ => {}
        }
        let entry = Known {
            file: file.to_path_buf(),
            active: true,
            resumable,
            touched: SystemTime::now(),
        };
        if known.insert(upload, entry).is_none() {
            self.remember(upload, file, resumable);
        }
        self.sweep(&mut known);
        Ok(Claim {
            uploads: self,
            upload,
            // What an earlier stream left must not be lost by a request that fails.
            keep: resumable,
        })
    }

    /// Removes what is too old, and the oldest of what is too many.
    fn sweep(&self, known: &mut HashMap<UploadId, Known>) {
        let mut idle: Vec<(SystemTime, Duration, UploadId)> = known
            .iter()
            .filter_map(|(upload, one)| Some((one.touched, one.left(self.max_age)?, *upload)))
            .collect();
        idle.sort();
        let excess = idle.len().saturating_sub(MAX_KEPT);
        for (index, (_, left, upload)) in idle.into_iter().enumerate() {
            if !left.is_zero() && index >= excess {
                break;
            }
            if let Some(one) = known.remove(&upload) {
                log::info(format_args!("event=upload_swept upload={upload}"));
                // It may have gone by itself.
                let _ = std::fs::remove_file(&one.file);
                self.forget(upload, one.resumable);
            }
        }
    }

    fn remember(&self, upload: UploadId, file: &Path, resumable: bool) {
        let Some(index) = &self.index else { return };
        let link = index.join(link_name(upload, resumable));
        let made =
            std::fs::create_dir_all(index).and_then(|()| std::os::unix::fs::symlink(file, &link));
        if let Err(error) = made {
            log::warn(format_args!(
                "event=upload_not_listed upload={upload} error=\"{error}\""
            ));
        }
    }

    fn forget(&self, upload: UploadId, resumable: bool) {
        if let Some(index) = &self.index {
            // It may never have been listed.
            let _ = std::fs::remove_file(index.join(link_name(upload, resumable)));
        }
    }
}

/// An upload that one stream has for itself.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    uploads: &'a Arc<Uploads>,
    upload: UploadId,
    /// Whether the file, if there is one, stays when the stream has ended.
    keep: bool,
}

impl Claim<'_> {
    /// What is there stays after the stream.
    pub(crate) fn keep(&mut self, keep: bool) {
        self.keep = keep;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut known = lock(&self.uploads.known);
        if let Some(one) = known.get_mut(&self.upload)
            && self.keep
            && is_there(&one.file)
        {
            one.active = false;
            one.touched = SystemTime::now();
            self.uploads.sweep(&mut known);
            self.uploads.watch(&mut known);
        } else if let Some(one) = known.remove(&self.upload) {
            // After success it has its final name already.
            let _ = std::fs::remove_file(&one.file);
            self.uploads.forget(self.upload, one.resumable);
        }
    }
}

/// Whether there is anything to be kept; also when nobody can look now.
fn is_there(file: &Path) -> bool {
    let gone = |error: std::io::Error| {
        matches!(
            error.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
        )
    };
    !std::fs::symlink_metadata(file).is_err_and(gone)
}

/// How the hidden file is called.
pub(crate) fn hidden_name(upload: UploadId) -> OsString {
    OsString::from(format!("{PREFIX}{upload}"))
}

/// How the link to it is called.
fn link_name(upload: UploadId, resumable: bool) -> String {
    format!("{upload}{}", if resumable { "" } else { ONCE })
}

fn parse_id(text: &str) -> Option<UploadId> {
    let mut id = [0; 16];
    if text.len() != 32 {
        return None;
    }
    for (index, byte) in id.iter_mut().enumerate() {
        let start = index.checked_mul(2)?;
        *byte = u8::from_str_radix(text.get(start..start.checked_add(2)?)?, 16).ok()?;
    }
    Some(UploadId(id))
}

/// A name that nobody else has.
pub(crate) fn fresh_id() -> Result<UploadId, Errno> {
    let mut id = [0; 16];
    // SAFETY: the kernel writes at most as many bytes as the array has, which lives across the call.
    let count = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    Errno::result(count)?;
    Ok(UploadId(id))
}

/// Where the file of an upload to `path` is.
fn hidden_file(path: &Path, upload: UploadId) -> Result<PathBuf, ErrorBody> {
    let (parent, _) = path::split(&follow(path)?)?;
    Ok(parent.join(hidden_name(upload)))
}

fn no_such(upload: UploadId) -> ErrorBody {
    let message = format!("nothing is kept of upload {upload}; begin it anew at offset 0");
    ErrorBody::caller(ErrorCode::NoSuchUpload, message)
}

/// Opens what is kept.
pub(crate) fn open_kept(place: &Place, upload: UploadId) -> Result<Option<OwnedFd>, Errno> {
    let flags =
        OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let name = hidden_name(upload);
    let file = match openat(&place.parent, name.as_os_str(), flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(None),
        other => other?,
    };
    let about = fstat(&file)?;
    Ok((info::file_type(&about) == FileType::Regular).then_some(file))
}

/// Says how far an upload has come.
pub(super) fn query(
    agent: &Agent,
    request: QueryUpload,
    stream: Stream,
) -> Result<(), StreamError> {
    let look = || {
        let path = path::parse(request.path, &agent.workspace)?;
        let hidden = hidden_file(&path, request.upload)?;
        // While it is looked at, nobody writes it.
        let _claim = agent.uploads.claim(request.upload, &hidden, true)?;
        let place = Place::open(&hidden)?;
        let file = open_kept(&place, request.upload)
            .map_err(|errno| refused("open", &hidden, errno))?
            .ok_or_else(|| no_such(request.upload))?;
        let length = fstat(&file)
            .map_err(|errno| refused("look at", &hidden, errno))?
            .st_size;
        let offset = u64::try_from(length).unwrap_or(0);
        let mut hasher = blake3::Hasher::new();
        hash_file(&file, 0..offset, &mut hasher, &stream).map_err(|error| match error {
            HashError::Read(errno) => refused("read", &hidden, errno),
            HashError::Stream(_) => invalid("the client has gone"),
        })?;
        Ok::<_, ErrorBody>(UploadState {
            offset,
            blake3: *hasher.finalize().as_bytes(),
        })
    };
    let outcome = look();
    match outcome {
        Ok(state) => stream.finish(&state),
        Err(error) => stream.refuse(&error),
    }
}

/// Throws away what is kept.
pub(super) fn discard(agent: &Agent, request: DropUpload) -> Result<FileDone, ErrorBody> {
    let path = path::parse(request.path, &agent.workspace)?;
    let hidden = hidden_file(&path, request.upload)?;
    let _claim = agent.uploads.claim(request.upload, &hidden, true)?;
    match std::fs::remove_file(&hidden) {
        Ok(()) => Ok(FileDone {}),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(no_such(request.upload)),
        Err(error) => Err(failed("remove", &hidden, &error)),
    }
}

/// Why a file was not hashed.
#[derive(Debug)]
pub(crate) enum HashError {
    /// It cannot be read.
    Read(Errno),
    /// Nobody waits for it.
    Stream(StreamError),
}

/// Hashes these bytes of a file, as long as somebody waits for it.
pub(crate) fn hash_file(
    file: &OwnedFd,
    range: Range<u64>,
    hasher: &mut blake3::Hasher,
    stream: &Stream,
) -> Result<(), HashError> {
    let mut buffer = vec![0; CHUNK];
    let (mut at, mut unlooked): (u64, u64) = (range.start, 0);
    while at < range.end {
        let left = range.end.saturating_sub(at);
        let turn = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        let offset = i64::try_from(at).map_err(|_| HashError::Read(Errno::EOVERFLOW))?;
        let room = buffer.get_mut(..turn).unwrap_or_default();
        let count = match nix::sys::uio::pread(file, room, offset) {
            // It became shorter: somebody else's hand is in it.
            Ok(0) => return Err(HashError::Read(Errno::EIO)),
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(HashError::Read(errno)),
        };
        hasher.update(buffer.get(..count).unwrap_or_default());
        let count = u64::try_from(count).unwrap_or(left);
        at = at.saturating_add(count);
        unlooked = unlooked.saturating_add(count);
        if unlooked >= LOOK {
            unlooked = 0;
            stream.check_heard().map_err(HashError::Stream)?;
        }
    }
    Ok(())
}

/// Starts writing out a stretch of a file, so that the disk works while more arrives; and waits for
/// an earlier one, so that memory does not fill with what the disk has not taken.
#[derive(Debug, Default)]
pub(crate) struct WriteBehind {
    begun: u64,
}

/// Bytes that are handed to the disk at once.
const STRETCH: u64 = 8 << 20;
/// Stretches that may be under way.
const UNDER_WAY: u64 = 8;

impl WriteBehind {
    /// The file has been written up to here.
    pub(crate) fn written(&mut self, file: &File, up_to: u64) {
        while up_to.saturating_sub(self.begun) >= STRETCH {
            sync_range(file, self.begun, libc::SYNC_FILE_RANGE_WRITE);
            if let Some(earlier) = self.begun.checked_sub(STRETCH.saturating_mul(UNDER_WAY)) {
                sync_range(file, earlier, libc::SYNC_FILE_RANGE_WAIT_BEFORE);
            }
            self.begun = self.begun.saturating_add(STRETCH);
        }
    }

    /// What lies before is written out already, or somebody else's to write out.
    pub(crate) fn begin(at: u64) -> Self {
        Self { begun: at }
    }
}

fn sync_range(file: &File, start: u64, flags: libc::c_uint) {
    let (Ok(start), Ok(length)) = (i64::try_from(start), i64::try_from(STRETCH)) else {
        return;
    };
    // Only a hint: what goes wrong in it comes to light in the fsync at the end.
    // SAFETY: takes a descriptor and numbers, no memory.
    let _ = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), start, length, flags) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> UploadId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        UploadId(id)
    }

    fn leave(uploads: &Arc<Uploads>, directory: &Path, upload: UploadId) -> PathBuf {
        let file = directory.join(hidden_name(upload));
        let claim = uploads.claim(upload, &file, true).unwrap();
        std::fs::write(&file, b"half").unwrap();
        drop(claim);
        file
    }

    #[test]
    fn no_more_than_so_many_broken_uploads_are_kept_and_the_oldest_goes_first() {
        let directory = tempfile::tempdir().unwrap();
        let uploads = Uploads::kept_in(None);
        let files: Vec<_> = (0..MAX_KEPT + 3)
            .map(|number| leave(&uploads, directory.path(), id(number)))
            .collect();
        let there: Vec<_> = files.iter().map(|file| file.exists()).collect();
        assert_eq!(there.iter().filter(|there| **there).count(), MAX_KEPT);
        assert!(!there[0] && !there[2] && there[3]);
    }

    #[test]
    fn a_broken_upload_is_swept_when_it_is_old_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join("index");
        let uploads = Uploads::kept_in(Some(index.clone()));
        let old = leave(&uploads, directory.path(), id(1));
        let new = leave(&uploads, directory.path(), id(2));
        let long_ago = SystemTime::now() - MAX_AGE - Duration::from_secs(60);
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        drop(uploads);
        let uploads = Uploads::kept_in(Some(index.clone()));
        uploads.load();
        assert!(!old.exists());
        assert!(new.exists());
        assert_eq!(std::fs::read_dir(&index).unwrap().count(), 1);
        uploads.claim(id(2), &new, true).unwrap().keep(false);
        assert!(!new.exists(), "one that is not kept goes at once");
        assert_eq!(std::fs::read_dir(&index).unwrap().count(), 0);
    }

    #[test]
    fn the_list_of_an_earlier_run_removes_nothing_that_is_no_upload() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join("index");
        std::fs::create_dir(&index).unwrap();
        let precious = directory.path().join("precious");
        std::fs::write(&precious, b"1").unwrap();
        let long_ago = SystemTime::now() - MAX_AGE - Duration::from_secs(60);
        let file = File::options().write(true).open(&precious).unwrap();
        file.set_modified(long_ago).unwrap();
        std::os::unix::fs::symlink(&precious, index.join(id(1).to_string())).unwrap();
        Uploads::kept_in(Some(index)).load();
        assert!(precious.exists());
    }

    fn eventually(what: &str, done: impl Fn() -> bool) {
        for _ in 0..6000 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{what}: not within a minute");
    }

    #[test]
    fn a_broken_upload_goes_when_it_is_old_though_nothing_else_happens() {
        let directory = tempfile::tempdir().unwrap();
        let uploads = Uploads::of_age(None, Duration::from_millis(300));
        for round in 0..2 {
            let first = leave(&uploads, directory.path(), id(round));
            let second = leave(&uploads, directory.path(), id(round + 10));
            let claim = uploads.claim(id(round + 10), &second, true).unwrap();
            eventually("it goes", || !first.exists());
            assert!(second.exists(), "one that is being written stays");
            drop(claim);
            eventually("nobody watches", || {
                !uploads.is_watched.load(Ordering::Acquire)
            });
        }
    }

    #[test]
    fn what_nobody_can_resume_goes_with_the_next_run() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join("index");
        let uploads = Uploads::kept_in(Some(index.clone()));
        let file = directory.path().join(hidden_name(id(1)));
        let claim = uploads.claim(id(1), &file, false).unwrap();
        std::fs::write(&file, b"half").unwrap();
        // As when the machine loses its power.
        std::mem::forget(claim);
        let kept = leave(&uploads, directory.path(), id(2));
        Uploads::kept_in(Some(index.clone())).load();
        assert!(!file.exists());
        assert!(kept.exists());
        assert_eq!(std::fs::read_dir(&index).unwrap().count(), 1);
    }

    #[test]
    fn what_was_only_asked_for_takes_no_place_among_what_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let uploads = Uploads::kept_in(None);
        let kept = leave(&uploads, directory.path(), id(1));
        for number in 2..MAX_KEPT + 9 {
            let file = directory.path().join(hidden_name(id(number)));
            drop(uploads.claim(id(number), &file, true).unwrap());
        }
        assert!(kept.exists());
        assert_eq!(lock(&uploads.known).len(), 1);
    }

    #[test]
    fn two_streams_never_write_one_upload() {
        let uploads = Uploads::kept_in(None);
        let first = uploads.claim(id(1), Path::new("/x/a"), true).unwrap();
        let error = uploads.claim(id(1), Path::new("/x/a"), true).unwrap_err();
        assert_eq!(error.code, ErrorCode::FileBusy);
        drop(first);
        assert!(uploads.claim(id(1), Path::new("/x/a"), true).is_ok());
    }
}
