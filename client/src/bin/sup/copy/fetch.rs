//! From a VM to here: a file, gone on from where an earlier copy of the same file broke, or a tree.
//! What has arrived waits under a hidden name beside its place, and gets its own when it is whole.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use client::file::{Download, FileRead, Piece, TreeRead};
use client::protocol::file::{FileInfo, FileType};
use client::{ClientError, Vm};
use data_encoding::HEXLOWER;
use nix::fcntl::{Flock, FlockArg, OFlag};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;

use super::archive::ArchiveError;
use super::patience::{Patience, again};
use super::unpack::{Options, UnpackError, unpack};
use super::{Job, show};
use crate::complaint::Complaint;

/// Of an archive on its way to the disk.
const AHEAD: usize = 1 << 20;

/// How many pieces of a file wait for the disk.
const PIECES: usize = 16;

/// Copies what is at a path of the VM, whatever it is.
pub(super) async fn fetch(
    job: &Job<'_>,
    vm: &Vm,
    from: &[u8],
    to: &Path,
    what: &str,
) -> Result<(), Complaint> {
    let info = again(|| vm.stat(from)).await;
    let info = info.map_err(|error| Complaint::of(what, &error))?;
    if info.file_type == FileType::Directory {
        tree(job, vm, from, to, what).await
    } else {
        file(job, vm, from, to, what).await
    }
}

/// A file to standard output.
pub(super) async fn print(
    job: &Job<'_>,
    vm: &Vm,
    from: &[u8],
    what: &str,
) -> Result<(), Complaint> {
    let wrong = |error: &ClientError| Complaint::of(what, error);
    let download = again(|| vm.download(FileRead::new(from).checked())).await;
    let mut download = download.map_err(|error| wrong(&error))?;
    let mut out = tokio::io::stdout();
    let mut patience = Patience::new();
    let bar = job.notes.bar(from, download.total());
    let written = loop {
        match download.next_piece().await {
            Ok(Some(Piece::Data(bytes))) => {
                if let Err(error) = out.write_all(&bytes).await {
                    break Err(error);
                }
                bar.inc(u64::try_from(bytes.len()).unwrap_or(0));
            }
            // None were asked for.
            Ok(Some(Piece::Hole(_))) => {}
            Ok(None) => break out.flush().await,
            Err(error) => {
                let resumed = resume(&mut download, &mut patience, error).await;
                resumed.map_err(|error| wrong(&error))?;
            }
        }
    };
    bar.finish();
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => job.reader_gone.set(true),
        written => written.map_err(|error| Complaint::new(what, error.to_string()))?,
    }
    Ok(())
}

async fn resume(
    download: &mut Download,
    patience: &mut Patience,
    mut error: ClientError,
) -> Result<(), ClientError> {
    loop {
        patience.take(error, download.offset()).await?;
        error = match download.resume().await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
    }
}

async fn file(job: &Job<'_>, vm: &Vm, from: &[u8], to: &Path, what: &str) -> Result<(), Complaint> {
    let wrong = |error: &ClientError| Complaint::of(what, error);
    let mut read = FileRead::new(from).checked();
    if job.sparse {
        read = read.sparse();
    }
    let download = again(|| vm.download(read.clone())).await;
    let mut download = download.map_err(|error| wrong(&error))?;
    let place = Waiting::open(vm, from, to, download.info());
    let (waiting, file) = place.map_err(|error| error.complain(what))?;
    let mut begin = 0;
    let known = file.metadata().map_or(0, |about| about.len());
    if known > 0 && waiting.is_some() && download.total().is_some_and(|total| known <= total) {
        drop(download);
        let rest = again(|| vm.download(read.clone().offset(known))).await;
        download = rest.map_err(|error| wrong(&error))?;
        begin = known;
    }
    let total = download.total().map(|total| total.saturating_add(begin));
    let bar = job.notes.bar(from, total);
    bar.set_position(begin);
    let writer = Writer {
        file,
        at: begin,
        sparse: job.sparse,
        ordinary: waiting.is_some(),
    };
    let (pieces, receive) = mpsc::channel(PIECES);
    let busy = job.busy.clone();
    let writing = tokio::task::spawn_blocking(move || {
        let written = writer.run(receive);
        drop(busy);
        written
    });
    let received = receive_all(&mut download, pieces, &bar).await;
    let written = writing
        .await
        .map_err(|error| Complaint::new(what, error.to_string()))?;
    let kept = |complaint: Complaint| match &waiting {
        Some(_) => {
            complaint.detail("`sup cp` with the same arguments goes on where this one stopped")
        }
        None => complaint,
    };
    let file = match (written, received) {
        // The writer's failure ends the receiving, never the other way.
        (Err(error), _) => {
            bar.abandon();
            return Err(kept(Complaint::new(
                &format!("writing {}", show(to)),
                error.to_string(),
            )));
        }
        (Ok(_), Err(error)) => {
            bar.abandon();
            if !is_spoilt(&error) {
                return Err(kept(wrong(&error)));
            }
            if let Some(waiting) = waiting {
                waiting.forget();
            }
            return Err(wrong(&error));
        }
        (Ok(file), Ok(())) => file,
    };
    bar.finish();
    let Some(waiting) = waiting else {
        return Ok(());
    };
    let named = waiting.finish(&file, download.info().mode & 0o777);
    named.map_err(|error| Complaint::new(&format!("naming {}", show(to)), error.to_string()))
}

/// What has arrived is of no use any more.
fn is_spoilt(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Changed { .. } | ClientError::Damaged { .. } | ClientError::Broken(_)
    )
}

async fn receive_all(
    download: &mut Download,
    pieces: mpsc::Sender<Piece>,
    bar: &indicatif::ProgressBar,
) -> Result<(), ClientError> {
    let mut patience = Patience::new();
    loop {
        match download.next_piece().await {
            Ok(Some(piece)) => {
                let length = match &piece {
                    Piece::Data(bytes) => u64::try_from(bytes.len()).unwrap_or(0),
                    Piece::Hole(length) => *length,
                };
                bar.inc(length);
                // A writer that has failed says why itself.
                if pieces.send(piece).await.is_err() {
                    return Ok(());
                }
            }
            Ok(None) => return Ok(()),
            Err(error) => resume(download, &mut patience, error).await?,
        }
    }
}

/// Puts pieces into a file, in a thread of its own.
struct Writer {
    file: File,
    at: u64,
    sparse: bool,
    /// Neither a device nor a pipe.
    ordinary: bool,
}

impl Writer {
    fn run(mut self, mut pieces: mpsc::Receiver<Piece>) -> io::Result<File> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        if self.ordinary {
            self.file.set_len(self.at)?;
            self.file.seek(SeekFrom::Start(self.at))?;
        }
        while let Some(piece) = pieces.blocking_recv() {
            match piece {
                Piece::Data(bytes) => {
                    self.file.write_all(&bytes)?;
                    let length = u64::try_from(bytes.len()).unwrap_or(0);
                    self.at = self.at.saturating_add(length);
                }
                Piece::Hole(length) if self.sparse && self.ordinary => {
                    self.at = self.at.saturating_add(length);
                    // The length is always what has arrived.
                    self.file.set_len(self.at)?;
                    self.file.seek(SeekFrom::Start(self.at))?;
                }
                Piece::Hole(mut length) => {
                    self.at = self.at.saturating_add(length);
                    while length > 0 {
                        let turn = usize::try_from(length).unwrap_or(usize::MAX);
                        let zeros = ZEROS.get(..turn).unwrap_or(&ZEROS);
                        self.file.write_all(zeros)?;
                        length =
                            length.saturating_sub(u64::try_from(zeros.len()).unwrap_or(length));
                    }
                }
            }
        }
        Ok(self.file)
    }
}

/// Why what arrives cannot be put anywhere.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error("cannot write {}: {cause}", path.display())]
    Open { path: PathBuf, cause: io::Error },
    #[error("{} is in the way, and somebody else's; remove it", path.display())]
    Foreign { path: PathBuf },
    #[error("another sup is copying it to {}", path.display())]
    Busy { path: PathBuf },
}

impl PlaceError {
    fn complain(&self, what: &str) -> Complaint {
        Complaint::new(what, self.to_string())
    }
}

/// A file that is not whole yet, locked against others who copy the same.
struct Waiting {
    path: PathBuf,
    to: PathBuf,
    _lock: Flock<File>,
}

impl Waiting {
    /// Where to write, and the name that is waited under; no such name for devices and pipes, which
    /// are written to as they are.
    fn open(
        vm: &Vm,
        from: &[u8],
        to: &Path,
        info: &FileInfo,
    ) -> Result<(Option<Self>, File), PlaceError> {
        let wrong = |path: &Path, cause| PlaceError::Open {
            path: path.to_owned(),
            cause,
        };
        // A link of the user's own is followed.
        let to = std::fs::canonicalize(to).unwrap_or_else(|_| to.to_owned());
        if let Ok(about) = std::fs::metadata(&to) {
            let kind = about.file_type();
            if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() {
                let file = OpenOptions::new().write(true).open(&to);
                return Ok((None, file.map_err(|cause| wrong(&to, cause))?));
            }
        }
        let (ours, others) = names(vm, from, &to, info);
        let directory = match to.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
            _ => PathBuf::from("."),
        };
        let path = directory.join(&ours);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&path)
            .map_err(|cause| wrong(&to, cause))?;
        let about = file.metadata().map_err(|cause| wrong(&to, cause))?;
        // In a directory of everybody's somebody else may have guessed the name.
        if about.uid() != nix::unistd::geteuid().as_raw() || !about.is_file() || about.nlink() != 1
        {
            return Err(PlaceError::Foreign { path });
        }
        let lock = file.try_clone().map_err(|cause| wrong(&to, cause))?;
        let lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err(_) => return Err(PlaceError::Busy { path: to }),
        };
        remove_stale(&directory, &ours, &others);
        let waiting = Self {
            path,
            to,
            _lock: lock,
        };
        Ok((Some(waiting), file))
    }

    fn finish(self, file: &File, mode: u32) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(mode))?;
        std::fs::rename(&self.path, &self.to)
    }

    fn forget(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The hidden name of what is to be at `to` and is this very file of the VM, and the beginning of
/// the names of other ones. After this machine was restarted there is another name: what had been
/// written may not be there any more, whatever its length says.
fn names(vm: &Vm, from: &[u8], to: &Path, info: &FileInfo) -> (OsString, OsString) {
    let hash = |parts: &[&[u8]], length: usize| {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&u64::try_from(part.len()).unwrap_or(0).to_le_bytes());
            hasher.update(part);
        }
        let bytes = *hasher.finalize().as_bytes();
        HEXLOWER.encode(bytes.get(..length).unwrap_or_default())
    };
    let name = to.file_name().unwrap_or_default();
    let others = format!(".sup-{}-", hash(&[name.as_bytes()], 4));
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let source = hash(
        &[
            vm.reference().to_string().as_bytes(),
            from,
            &info.inode.to_le_bytes(),
            &info.size.to_le_bytes(),
            &info.mtime_s.to_le_bytes(),
            &info.mtime_ns.to_le_bytes(),
            &boot,
        ],
        8,
    );
    (format!("{others}{source}").into(), others.into())
}

/// What was to have the same name and never will: of a file that has changed since.
fn remove_stale(directory: &Path, ours: &OsString, others: &OsString) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == *ours || !name.as_bytes().starts_with(others.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(flags.bits())
            .open(&path);
        // One that is locked is being written.
        if let Ok(file) = file
            && Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok()
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// An archive cannot be gone on with: what broke begins anew, in the same tree.
async fn tree(job: &Job<'_>, vm: &Vm, from: &[u8], to: &Path, what: &str) -> Result<(), Complaint> {
    let bar = job.notes.bar(from, None);
    let mut patience = Patience::new();
    loop {
        bar.set_position(0);
        let error = match attempt(job, vm, from, to.to_owned(), &bar).await {
            Ok(()) => {
                bar.finish();
                return Ok(());
            }
            Err(Broken::Here(error)) => {
                bar.abandon();
                return Err(Complaint::new(what, error.to_string()));
            }
            Err(Broken::There(error)) => error,
        };
        let again = patience.take(error, 0).await;
        again.map_err(|error| Complaint::of(what, &error))?;
    }
}

/// Why a tree did not arrive.
enum Broken {
    Here(UnpackError),
    There(ClientError),
}

async fn attempt(
    job: &Job<'_>,
    vm: &Vm,
    from: &[u8],
    to: PathBuf,
    bar: &indicatif::ProgressBar,
) -> Result<(), Broken> {
    let mut read = TreeRead::new(from).checked();
    if job.sparse {
        read = read.sparse();
    }
    let mut archive = vm.pack(read).await.map_err(Broken::There)?;
    let mut buffer = vec![0; 64 << 10];
    // An error of the first read is no reason to make a directory.
    let mut count = next(&mut archive, &mut buffer).await?;
    let (mut near, far) = tokio::io::duplex(AHEAD);
    let options = Options {
        sparse: job.sparse,
        all_links: job.all_links,
    };
    let (notes, busy) = (job.notes.clone(), job.busy.clone());
    let far = io::BufReader::with_capacity(256 << 10, SyncIoBridge::new(far));
    let unpacking = tokio::task::spawn_blocking(move || {
        let unpacked = unpack(far, &to, options, &notes);
        drop(busy);
        unpacked
    });
    let received = async {
        while count > 0 {
            bar.inc(u64::try_from(count).unwrap_or(0));
            let bytes = buffer.get(..count).unwrap_or_default();
            if near.write_all(bytes).await.is_err() {
                // Whoever unpacks has stopped, and says why.
                break;
            }
            count = next(&mut archive, &mut buffer).await?;
        }
        Ok(())
    }
    .await;
    drop(near);
    let unpacked = unpacking
        .await
        .unwrap_or_else(|error| Err(ArchiveError::Io(io::Error::other(error)).into()));
    match (received, unpacked) {
        (Err(error), _) => Err(error),
        (Ok(()), Err(error)) => Err(Broken::Here(error)),
        (Ok(()), Ok(())) => Ok(()),
    }
}

async fn next(archive: &mut client::file::Archive, buffer: &mut [u8]) -> Result<usize, Broken> {
    let read = archive.read(buffer).await;
    read.map_err(|error| Broken::There(error.into()))
}
