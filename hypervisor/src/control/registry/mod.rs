//! Every VM of this appliance by id, name and idempotency key, and the creates under way. What one
//! owner may not see does not exist for him.

mod create;
mod index;
mod recover;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::id::{Owner, Subdomain, VmId};
use protocol::vm::{VmInfo, VmPage, VmRef};
use protocol::{ErrorBody, ErrorCode};
use tokio::sync::watch;

pub(crate) use recover::RecoverError;

use super::store::idempotency::DeletedVm;
use super::store::record::VmRecord;
use super::vm::{Beginning, Command, Host, Vm, VmHandle, not_found};
use index::{Index, Known, Progress};

/// Room for VMs in one page, in bytes of their encoding.
const PAGE: usize = 48 << 10;

/// See the module.
pub(crate) struct Registry {
    host: Arc<Host>,
    inner: Mutex<Inner>,
    imported: watch::Receiver<bool>,
}

#[derive(Default)]
struct Inner {
    vms: BTreeMap<VmId, VmHandle>,
    /// By the label of the public address.
    labels: HashMap<Subdomain, VmId>,
    index: Index,
}

impl Registry {
    /// An empty registry; [`recover`](Self::recover) fills it. `imported` turns true when the
    /// templates of the system slot are there.
    pub(crate) fn new(host: Arc<Host>, imported: watch::Receiver<bool>) -> Arc<Self> {
        Arc::new(Self {
            host,
            inner: Mutex::default(),
            imported,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a VM's task and makes it known.
    fn insert(
        self: &Arc<Self>,
        record: VmRecord,
        beginning: Beginning,
        progress: Option<Progress>,
    ) -> VmHandle {
        let mut inner = self.inner();
        let handle = Vm::spawn(self.host.clone(), self.clone(), record.clone(), beginning);
        let known = Known {
            arguments: record.arguments,
            id: record.id.clone(),
            progress,
            is_deleted: false,
        };
        let name = record.name.as_ref();
        inner.index.note(&record.owner, name, record.key, known);
        inner
            .labels
            .insert(record.subdomain.clone(), record.id.clone());
        inner.vms.insert(record.id.clone(), handle.clone());
        handle
    }

    /// Forgets a VM. With `deleted` its create stays known.
    pub(crate) fn remove(&self, record: &VmRecord, deleted: Option<DeletedVm>) {
        let mut inner = self.inner();
        inner.vms.remove(&record.id);
        inner.labels.remove(&record.subdomain);
        match deleted {
            None => {
                let name = record.name.as_ref();
                inner
                    .index
                    .forget(&record.owner, name, record.key, &record.id);
            }
            Some(deleted) => {
                let forgotten = inner.index.delete(record, deleted);
                self.forget_deleted(&forgotten);
            }
        }
    }

    fn forget_deleted(&self, forgotten: &[VmId]) {
        for id in forgotten {
            self.host.store.forget_deleted(id);
        }
    }

    /// The VM that a reference of this owner means.
    pub(crate) fn find(&self, owner: &Owner, vm: &VmRef) -> Result<VmHandle, ErrorBody> {
        let inner = self.inner();
        let id = match vm {
            VmRef::Id(id) => Some(id),
            VmRef::Name(name) => inner.index.named(owner, name),
        };
        id.and_then(|id| inner.vms.get(id))
            .filter(|handle| handle.owner == *owner)
            .cloned()
            .ok_or_else(|| not_found(vm.as_str()))
    }

    /// The VM of this public address, whoever it belongs to.
    pub(crate) fn published(&self, subdomain: &Subdomain) -> Option<VmHandle> {
        let inner = self.inner();
        inner.vms.get(inner.labels.get(subdomain)?).cloned()
    }

    /// The VM of this identifier, whoever it belongs to.
    pub(crate) fn get(&self, id: &VmId) -> Option<VmHandle> {
        self.inner().vms.get(id).cloned()
    }

    /// The owner's VMs after `after`, as many as fit.
    pub(crate) fn list(&self, owner: &Owner, after: Option<&VmId>, limit: u16) -> VmPage {
        let limit = match limit {
            0 => usize::MAX,
            limit => usize::from(limit),
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let inner = self.inner();
        let mut page = VmPage {
            vms: Vec::new(),
            more: false,
        };
        let mut size = 0_usize;
        let range = (from, Bound::Unbounded);
        for (_, handle) in inner.vms.range::<VmId, _>(range) {
            if handle.owner != *owner {
                continue;
            }
            let info = self.info(handle);
            size =
                size.saturating_add(postcard::to_allocvec(&info).map_or(PAGE, |bytes| bytes.len()));
            if page.vms.len() >= limit || (size > PAGE && !page.vms.is_empty()) {
                page.more = true;
                break;
            }
            page.vms.push(info);
        }
        page
    }

    fn info(&self, handle: &VmHandle) -> VmInfo {
        handle.view.borrow().info(&self.host.settings)
    }

    /// Stops every VM at once and waits for all of them.
    pub(crate) async fn shut_down(&self, deadline: Duration) {
        let handles: Vec<VmHandle> = self.inner().vms.values().cloned().collect();
        let asked = handles.iter().map(|handle| async move {
            let stopped = handle
                .ask(|done| Command::ShutDown { deadline, done })
                .await;
            if let Err(error) = stopped
                && error.code != ErrorCode::VmNotFound
            {
                tracing::error!(vm = %handle.id, %error, "VM not stopped");
            }
        });
        futures::future::join_all(asked).await;
    }
}
