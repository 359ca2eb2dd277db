//! The memory of deleted VMs' creates: a create that is repeated after its VM was deleted must not
//! make a second one. Each is one small file in `deleted/`, kept for a day.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use protocol::id::{IdempotencyKey, Owner, VmId};
use serde::{Deserialize, Serialize};

use super::atomic::{fsync_dir, write_replacing};
use super::record::VmRecord;
use super::{Store, StoreError};

/// How long a deleted VM's create is remembered.
pub(crate) const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// Most deleted VMs that are remembered; the oldest go first.
pub(crate) const MOST_DELETED: usize = 10_000;

/// The create of a VM that was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeletedVm {
    pub(crate) owner: Owner,
    pub(crate) key: IdempotencyKey,
    pub(crate) arguments: [u8; 32],
    pub(crate) id: VmId,
    /// Seconds since 1970.
    pub(crate) deleted_at: u64,
}

impl DeletedVm {
    fn of(record: &VmRecord) -> Self {
        Self {
            owner: record.owner.clone(),
            key: record.key,
            arguments: record.arguments,
            id: record.id.clone(),
            deleted_at: now(),
        }
    }
}

impl Store {
    fn deleted_file(&self, id: &VmId) -> PathBuf {
        self.deleted().join(id.as_str())
    }

    /// Remembers a VM's create; durable when this returns.
    pub(crate) fn remember_deleted(&self, record: &VmRecord) -> Result<DeletedVm, StoreError> {
        let deleted = DeletedVm::of(record);
        let path = self.deleted_file(&record.id);
        let mut bytes = postcard::to_allocvec(&deleted).unwrap_or_default();
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        write_replacing(&path, &bytes, 0o600)?;
        Ok(deleted)
    }

    /// Deletes a VM and remembers its create.
    pub(crate) fn delete_vm(&self, record: &VmRecord) -> Result<DeletedVm, StoreError> {
        // The memory first: a repeated create must never make a second VM.
        match self.remember_deleted(record) {
            Ok(deleted) => match self.remove_vm(&record.id) {
                Ok(()) => Ok(deleted),
                Err(error) => {
                    self.forget_deleted(&record.id);
                    Err(error)
                }
            },
            // A full file system is no reason not to make room in it.
            Err(StoreError::Full { .. }) => {
                self.remove_vm(&record.id)?;
                self.remember_deleted(record).or_else(|error| {
                    tracing::warn!(vm = %record.id, %error, "a deleted VM is remembered until control restarts only");
                    Ok(DeletedVm::of(record))
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets what was remembered for a VM that turned out to live.
    pub(crate) fn forget_deleted(&self, id: &VmId) {
        let _ = fs::remove_file(self.deleted_file(id));
    }

    /// What is remembered, in no order. What is too old, too much or unreadable is removed.
    pub(crate) fn load_deleted(&self) -> Result<Vec<DeletedVm>, StoreError> {
        let directory = self.deleted();
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory).map_err(StoreError::io("list", &directory))? {
            let path = entry.map_err(StoreError::io("list", &directory))?.path();
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // What cannot be read now may be read the next time.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot read what is remembered of a deleted VM");
                    continue;
                }
            };
            match decode(&bytes).filter(|deleted| !expired(deleted)) {
                Some(deleted) => found.push(deleted),
                None => {
                    let _ = fs::remove_file(&path);
                }
            }
        }
        found.sort_by_key(|deleted| std::cmp::Reverse(deleted.deleted_at));
        for deleted in found.drain(MOST_DELETED.min(found.len())..) {
            self.forget_deleted(&deleted.id);
        }
        fsync_dir(&directory)?;
        Ok(found)
    }
}

/// Whether it need not be remembered any longer.
pub(crate) fn expired(deleted: &DeletedVm) -> bool {
    now().saturating_sub(deleted.deleted_at) > KEPT.as_secs()
}

fn decode(bytes: &[u8]) -> Option<DeletedVm> {
    let (body, checksum) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body) != *checksum {
        return None;
    }
    postcard::from_bytes(body).ok()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
