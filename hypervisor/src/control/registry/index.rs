//! Which names are taken and which creates were seen, those of deleted VMs included. An entry is
//! only ever taken away on behalf of the VM that it stands for: a create that failed must not take
//! the name of the next one with it.

use std::collections::{HashMap, VecDeque};

use protocol::ErrorBody;
use protocol::id::{IdempotencyKey, Owner, VmId, VmName};
use tokio::sync::watch;

use super::super::store::idempotency::{DeletedVm, MOST_DELETED, expired};
use super::super::store::record::VmRecord;

/// The outcome of a create that several may wait for.
pub(super) type Progress = watch::Receiver<Option<Result<(), ErrorBody>>>;

/// A create that was seen.
pub(super) struct Known {
    /// Hash over its arguments.
    pub(super) arguments: [u8; 32],
    /// The VM that it makes or made.
    pub(super) id: VmId,
    /// Until it is done.
    pub(super) progress: Option<Progress>,
    /// Whether that VM was deleted.
    pub(super) is_deleted: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Index {
    names: HashMap<(Owner, VmName), VmId>,
    keys: HashMap<(Owner, IdempotencyKey), Known>,
    /// Deleted VMs, the longest known first.
    deleted: VecDeque<DeletedVm>,
}

impl Index {
    /// The create with this key.
    pub(super) fn create(&self, owner: &Owner, key: IdempotencyKey) -> Option<&Known> {
        self.keys.get(&(owner.clone(), key))
    }

    /// The VM of this name.
    pub(super) fn named(&self, owner: &Owner, name: &VmName) -> Option<&VmId> {
        self.names.get(&(owner.clone(), name.clone()))
    }

    /// Whether a VM of this id is or was there.
    pub(super) fn knows(&self, id: &VmId) -> bool {
        self.keys.values().any(|known| known.id == *id)
    }

    /// Notes a create, or a VM that was found.
    pub(super) fn note(
        &mut self,
        owner: &Owner,
        name: Option<&VmName>,
        key: IdempotencyKey,
        known: Known,
    ) {
        if let Some(name) = name {
            self.names
                .insert((owner.clone(), name.clone()), known.id.clone());
        }
        self.keys.insert((owner.clone(), key), known);
    }

    /// A create is done.
    pub(super) fn settle(&mut self, owner: &Owner, key: IdempotencyKey, id: &VmId) {
        let known = self.keys.get_mut(&(owner.clone(), key));
        if let Some(known) = known.filter(|known| known.id == *id) {
            known.progress = None;
        }
    }

    /// Forgets a VM's name and create.
    pub(super) fn forget(
        &mut self,
        owner: &Owner,
        name: Option<&VmName>,
        key: IdempotencyKey,
        id: &VmId,
    ) {
        self.free_name(owner, name, id);
        let key = (owner.clone(), key);
        if self.keys.get(&key).is_some_and(|known| known.id == *id) {
            self.keys.remove(&key);
        }
    }

    /// A VM was deleted: its name is free, its create stays known. Gives the VMs that are thereby
    /// forgotten for good, so that their number has an end.
    #[must_use]
    pub(super) fn delete(&mut self, record: &VmRecord, deleted: DeletedVm) -> Vec<VmId> {
        self.free_name(&record.owner, record.name.as_ref(), &record.id);
        self.note_deleted(deleted)
    }

    /// Notes a VM that was deleted. Gives those that are thereby forgotten.
    #[must_use]
    pub(super) fn note_deleted(&mut self, deleted: DeletedVm) -> Vec<VmId> {
        let known = Known {
            arguments: deleted.arguments,
            id: deleted.id.clone(),
            progress: None,
            is_deleted: true,
        };
        self.keys
            .insert((deleted.owner.clone(), deleted.key), known);
        self.deleted.push_back(deleted);
        self.forget_old()
    }

    /// Forgets deleted VMs that are too old or too many, and gives them.
    #[must_use]
    pub(super) fn forget_old(&mut self) -> Vec<VmId> {
        let mut forgotten = Vec::new();
        while let Some(oldest) = self.deleted.front() {
            if self.deleted.len() <= MOST_DELETED && !expired(oldest) {
                break;
            }
            let Some(oldest) = self.deleted.pop_front() else {
                break;
            };
            self.forget(&oldest.owner, None, oldest.key, &oldest.id);
            forgotten.push(oldest.id);
        }
        forgotten
    }

    fn free_name(&mut self, owner: &Owner, name: Option<&VmName>, id: &VmId) {
        let Some(name) = name else { return };
        let name = (owner.clone(), name.clone());
        if self.names.get(&name) == Some(id) {
            self.names.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::store::record::sample;
    use super::*;

    fn known(record: &VmRecord) -> Known {
        Known {
            arguments: record.arguments,
            id: record.id.clone(),
            progress: None,
            is_deleted: false,
        }
    }

    fn note(index: &mut Index, record: &VmRecord) {
        index.note(
            &record.owner,
            record.name.as_ref(),
            record.key,
            known(record),
        );
    }

    #[test]
    fn a_create_that_failed_takes_nothing_of_the_next_one_with_it() {
        let (first, second) = (sample("vm-00000001"), sample("vm-00000002"));
        let mut index = Index::default();
        let (owner, name) = (&first.owner, first.name.as_ref());
        note(&mut index, &first);
        index.forget(owner, name, first.key, &first.id);
        note(&mut index, &second);
        // The first one's end is told a second time.
        index.forget(owner, name, first.key, &first.id);
        assert_eq!(index.named(owner, name.unwrap()), Some(&second.id));
        assert_eq!(index.create(owner, second.key).unwrap().id, second.id);
    }

    #[test]
    fn deleted_vms_are_remembered_up_to_a_number_and_the_oldest_go_first() {
        let mut index = Index::default();
        let deleted = |number: usize| {
            let mut record = sample(&format!("vm-{number:08}"));
            let mut key = [0; 16];
            key[..8].copy_from_slice(&number.to_le_bytes());
            record.key = IdempotencyKey(key);
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            let deleted = DeletedVm {
                owner: record.owner.clone(),
                key: record.key,
                arguments: record.arguments,
                id: record.id.clone(),
                deleted_at: now.as_secs(),
            };
            (record, deleted)
        };
        for number in 0..MOST_DELETED {
            let (record, deleted) = deleted(number);
            note(&mut index, &record);
            assert!(index.delete(&record, deleted).is_empty());
        }
        let (record, last) = deleted(MOST_DELETED);
        note(&mut index, &record);
        let (first, _) = deleted(0);
        assert_eq!(index.delete(&record, last), [first.id]);
        assert!(index.create(&first.owner, first.key).is_none());
        assert!(index.create(&record.owner, record.key).unwrap().is_deleted);
        assert_eq!(index.keys.len(), MOST_DELETED);
    }
}
