//! What control keeps on disk: VM directories, templates and the memory of deleted VMs. Everything
//! here blocks, so it is called off the asynchronous threads. A file or directory appears under its
//! final name complete or not at all; whatever a crash left in `staging/` is removed at the next
//! start.

mod atomic;
mod disk;
pub(crate) mod idempotency;
pub(crate) mod record;
mod staging;
pub(crate) mod templates;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use protocol::id::VmId;

pub(crate) use disk::Copied;

pub(crate) use atomic::{fsync_dir, read_if_there, write_replacing};
use record::{RecordError, VmRecord};
use templates::TemplateError;

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A file operation failed.
    #[error("cannot {what} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The data file system is full.
    #[error("the data file system is full: cannot {what} {}; delete VMs or add room", path.display())]
    Full {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
    },
    /// A VM's record cannot be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The process was to die here (tests only).
    #[cfg(test)]
    #[error("died at step `{0}`")]
    Died(&'static str),
}

impl StoreError {
    /// Turns the system's word into an error with the operation and the file.
    pub(crate) fn io<'a>(
        what: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |cause| match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full {
                what,
                path: path.to_owned(),
            },
            _ => Self::Io {
                what,
                path: path.to_owned(),
                cause,
            },
        }
    }
}

/// Whether an error tells of what is on the disk. A disk or system that fails for the moment is no
/// reason to move a VM.
pub(crate) fn is_damage(error: &StoreError) -> bool {
    match error {
        StoreError::Record(error) => !matches!(error, RecordError::Newer { .. }),
        StoreError::Io { cause, .. } => cause.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

/// A point at which a crash must do no harm. Tests make the operation end here as if the process
/// had died: nothing after it runs, no clean-up either.
fn step(_name: &'static str) -> Result<(), StoreError> {
    #[cfg(test)]
    tests::die_at(_name)?;
    Ok(())
}

/// The directories of the state directory.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
    /// Held while a number is taken: creates happen at once.
    uids: Arc<Mutex<()>>,
}

/// What was found at start-up.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Whole VMs.
    pub(crate) records: Vec<VmRecord>,
    /// VMs that cannot be used, with the reason; their files are kept.
    pub(crate) broken: Vec<(String, StoreError)>,
}

impl Store {
    /// Makes the directories that are missing and removes what a crash left half-made.
    pub(crate) fn open(root: &Path) -> Result<Self, StoreError> {
        let store = Self {
            root: root.to_owned(),
            uids: Arc::default(),
        };
        let directories = [
            store.vms(),
            store.staging(),
            store.templates(),
            store.keys(),
            store.deleted(),
            store.broken(),
        ];
        for directory in directories {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .map_err(StoreError::io("make", &directory))?;
        }
        fsync_dir(root)?;
        store.sweep_staging()?;
        Ok(store)
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    pub(crate) fn vm(&self, id: &VmId) -> PathBuf {
        self.vms().join(id.as_str())
    }

    pub(crate) fn disk(&self, id: &VmId) -> PathBuf {
        self.vm(id).join("disk.img")
    }

    pub(crate) fn console(&self, id: &VmId) -> PathBuf {
        self.vm(id).join("console.log")
    }

    fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    fn deleted(&self) -> PathBuf {
        self.root.join("deleted")
    }

    fn broken(&self) -> PathBuf {
        self.root.join("broken")
    }

    /// Reads every VM's record. A damaged VM is moved to `broken/`; one that a newer supvm wrote
    /// or that cannot be read just now stays where it is. Neither stops the others.
    pub(crate) fn load(&self) -> Result<Found, StoreError> {
        let mut found = Found::default();
        let vms = self.vms();
        for entry in fs::read_dir(&vms).map_err(StoreError::io("list", &vms))? {
            let entry = entry.map_err(StoreError::io("list", &vms))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            match self.load_one(&name, &entry.path()) {
                Ok(record) => found.records.push(record),
                Err(error) => {
                    if is_damage(&error) {
                        self.set_aside(&name)?;
                    }
                    found.broken.push((name, error));
                }
            }
        }
        Ok(found)
    }

    fn load_one(&self, name: &str, directory: &Path) -> Result<VmRecord, StoreError> {
        let path = directory.join("record");
        let bytes = fs::read(&path).map_err(StoreError::io("read", &path))?;
        let record = VmRecord::decode(&bytes, &path)?;
        if record.id.as_str() != name {
            return Err(RecordError::Misplaced {
                path,
                id: record.id,
            }
            .into());
        }
        let disk = directory.join("disk.img");
        File::open(&disk).map_err(StoreError::io("open", &disk))?;
        Ok(record)
    }

    fn set_aside(&self, name: &str) -> Result<(), StoreError> {
        let from = self.vms().join(name);
        let mut to = self.broken().join(name);
        for copy in 1..1000 {
            if !to.exists() {
                break;
            }
            to = self.broken().join(format!("{name}.{copy}"));
        }
        fs::rename(&from, &to).map_err(StoreError::io("set aside", &from))?;
        fsync_dir(&self.broken())?;
        fsync_dir(&self.vms())
    }

    /// Replaces a VM's record; what was written is durable when this returns.
    pub(crate) fn save(&self, record: &VmRecord) -> Result<(), StoreError> {
        let path = self.vm(&record.id).join("record");
        write_replacing(&path, &record.encode()?, 0o600)
    }

    /// The next user that a VM's monitor runs as. Each is given out once.
    pub(crate) fn next_uid(&self) -> Result<u32, StoreError> {
        const FIRST: u32 = 200_000;
        const LAST: u32 = 2_000_000_000;
        let _turn = self.uids.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.root.join("next-uid");
        let text = read_if_there(&path)?.unwrap_or_default();
        let next = String::from_utf8_lossy(&text)
            .trim()
            .parse::<u32>()
            .ok()
            .filter(|number| (FIRST..LAST).contains(number))
            .unwrap_or(FIRST);
        let after = next.wrapping_add(1).to_string();
        write_replacing(&path, after.as_bytes(), 0o600)?;
        Ok(next)
    }

    /// The last `limit` bytes of a VM's console.
    pub(crate) fn console_tail(&self, id: &VmId, limit: u64) -> Vec<u8> {
        use std::io::{Read, Seek, SeekFrom};
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.console(id))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
            let mut bytes = Vec::new();
            file.take(limit).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        // A guest that never wrote has no console; that is no error of its own.
        read().unwrap_or_default()
    }
}
