//! From a VM to here: a file, gone on from where an earlier copy of the same file broke, or a tree.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use client::file::{Download, FileRead, Piece, TreeRead};
use client::protocol::file::FileType;
use client::{ClientError, Vm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;

use super::archive::ArchiveError;
use super::beneath::local_mode;
use super::patience::{Patience, again};
use super::unpack::{Options, UnpackError, unpack};
use super::waiting::Waiting;
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
    if to.is_dir() {
        return Err(Complaint::new(what, format!("{} is a directory", show(to)))
            .advice("name the file that it is to become"));
    }
    let download = again(|| vm.download(read.clone())).await;
    let mut download = download.map_err(|error| wrong(&error))?;
    let vm_name = vm.reference().to_string();
    let place = Waiting::open(&vm_name, from, to, download.info());
    let (waiting, file) = place.map_err(|error| error.complain(what))?;
    let mut begin = 0;
    let known = file.metadata().map_or(0, |about| about.len());
    if known > 0 && waiting.is_some() && download.total().is_some_and(|total| known <= total) {
        drop(download);
        // The file may have become another one under the same signs.
        let hasher = hash(&file, known).await;
        let hasher = hasher.map_err(|error| Complaint::new(what, error.to_string()))?;
        let rest = read.offset(known);
        let rest = again(|| vm.download_rest(rest.clone(), hasher.clone())).await;
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
    let named = waiting.finish(&file, local_mode(download.info().mode));
    named.map_err(|error| Complaint::new(&format!("naming {}", show(to)), error.to_string()))
}

/// Hashes what an earlier copy has brought.
async fn hash(file: &File, length: u64) -> io::Result<blake3::Hasher> {
    let mut file = file.try_clone()?;
    let hashed = tokio::task::spawn_blocking(move || {
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file.take(length))?;
        Ok(hasher)
    });
    hashed.await.map_err(io::Error::other)?
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

/// An archive cannot be gone on with: what broke begins anew, in the same tree.
async fn tree(job: &Job<'_>, vm: &Vm, from: &[u8], to: &Path, what: &str) -> Result<(), Complaint> {
    let bar = job.notes.bar(from, None);
    let mut patience = Patience::new();
    // What a broken attempt has made is as new as the rest.
    let is_new = !to.exists();
    loop {
        bar.set_position(0);
        let error = match attempt(job, vm, from, to.to_owned(), is_new, &bar).await {
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
    is_new: bool,
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
        is_new,
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
