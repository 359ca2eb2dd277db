//! From here to a VM: a file, gone on from where an earlier copy of the same file broke, or a tree.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use client::file::FileWrite;
use client::protocol::file::transfer::UploadId;
use client::{ClientError, Vm};
use tokio_util::io::SyncIoBridge;

use super::Job;
use super::ahead::Ahead;
use super::notes::Counted;
use super::pack::{PackError, pack};
use super::patience::Patience;
use crate::complaint::Complaint;

/// A shorter file is sent again as fast as it is asked for.
const WORTH_RESUMING: u64 = 1 << 20;

/// How much of an archive is made ahead.
const AHEAD: usize = 1 << 20;

/// Why an archive did not arrive.
enum Broken {
    Here(PackError),
    There(ClientError),
}

pub(super) async fn send(
    job: &Job<'_>,
    from: &Path,
    vm: &Vm,
    to: &[u8],
    what: &str,
) -> Result<(), Complaint> {
    let unreadable = |error: std::io::Error| Complaint::new(what, error.to_string());
    let about = std::fs::metadata(from).map_err(unreadable)?;
    if about.is_dir() {
        return tree(job, from, vm, to, what).await;
    }
    let file = tokio::fs::File::open(from).await.map_err(unreadable)?;
    let mut write = FileWrite::new(to);
    if job.sparse {
        write = write.sparse();
    }
    let name = from.as_os_str().as_encoded_bytes();
    if !about.is_file() {
        // A pipe: what was read is gone.
        let bar = job.notes.bar(name, None);
        let written = vm.upload(write.checked(), Counted::new(file, &bar)).await;
        bar.finish();
        return written.map(drop).map_err(|error| wrong(what, &error));
    }
    write = write.permissions(about.mode() & 0o7777);
    if about.len() >= WORTH_RESUMING {
        write = write.upload_id(upload_id(vm, from, to, &about));
    }
    let bar = job.notes.bar(name, Some(about.len()));
    let file = Ahead::new(file.into_std().await);
    let sent = vm.upload_resumable(write, Counted::new(file, &bar)).await;
    match &sent {
        Ok(_) => bar.finish(),
        Err(_) => bar.abandon(),
    }
    sent.map(drop).map_err(|error| wrong(what, &error))
}

/// The same for the same file to the same place, so that what an earlier copy left is found.
fn upload_id(vm: &Vm, from: &Path, to: &[u8], about: &std::fs::Metadata) -> UploadId {
    let from = std::path::absolute(from).unwrap_or_else(|_| from.to_owned());
    let mut hasher = blake3::Hasher::new();
    let mut say = |bytes: &[u8]| {
        hasher.update(&u64::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        hasher.update(bytes);
    };
    say(vm.reference().to_string().as_bytes());
    say(to);
    say(from.as_os_str().as_encoded_bytes());
    for number in [about.dev(), about.ino(), about.len()] {
        say(&number.to_le_bytes());
    }
    say(&about.mtime().to_le_bytes());
    say(&about.mtime_nsec().to_le_bytes());
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    UploadId(id)
}

/// An archive cannot be gone on with: what broke begins anew.
async fn tree(job: &Job<'_>, from: &Path, vm: &Vm, to: &[u8], what: &str) -> Result<(), Complaint> {
    let bar = job.notes.bar(from.as_os_str().as_encoded_bytes(), None);
    let mut patience = Patience::new();
    loop {
        bar.set_position(0);
        let error = match attempt(job, from.to_owned(), vm, to, &bar).await {
            Ok(()) => {
                bar.finish();
                return Ok(());
            }
            Err(Broken::Here(error)) => return Err(Complaint::new(what, error.to_string())),
            Err(Broken::There(error)) => error,
        };
        let again = patience.take(error, 0).await;
        again.map_err(|error| wrong(what, &error))?;
    }
}

async fn attempt(
    job: &Job<'_>,
    from: PathBuf,
    vm: &Vm,
    to: &[u8],
    bar: &indicatif::ProgressBar,
) -> Result<(), Broken> {
    let (near, far) = tokio::io::duplex(AHEAD);
    let (sparse, notes) = (job.sparse, job.notes.clone());
    let near = SyncIoBridge::new(near);
    let packing = tokio::task::spawn_blocking(move || {
        // The end that says that it is whole; without it the VM refuses the archive.
        pack(
            &from,
            sparse,
            std::io::BufWriter::with_capacity(64 << 10, near),
            &notes,
        )
    });
    let unpacked = vm.unpack(to, Counted::new(far, bar)).await;
    let packed = packing.await;
    match (packed, unpacked) {
        // It only failed because nobody took its archive.
        (Ok(Err(PackError::Write(_))), Err(error)) => Err(Broken::There(error)),
        (Ok(Err(error)), _) => Err(Broken::Here(error)),
        (_, Err(error)) => Err(Broken::There(error)),
        (Err(error), _) => Err(Broken::Here(PackError::Write(std::io::Error::other(error)))),
        (Ok(Ok(())), Ok(_)) => Ok(()),
    }
}

fn wrong(what: &str, error: &ClientError) -> Complaint {
    match error {
        // Its own words say nothing of where.
        ClientError::Source(cause) => Complaint::new(what, cause.to_string()),
        _ => Complaint::of(what, error),
    }
}
