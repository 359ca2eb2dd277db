//! Every VM of this appliance by id, name and idempotency key, and the creates under way. What one
//! owner may not see does not exist for him.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::host::supervisor::Run;
use protocol::id::{IdempotencyKey, Owner, Subdomain, VmId, VmName};
use protocol::vm::{CreateVm, EndReason, VmInfo, VmPage, VmRef};
use protocol::{ErrorBody, ErrorCode};
use tokio::sync::{oneshot, watch};

use super::create::{Plan, Wanted};
use super::store::StoreError;
use super::store::idempotency::{DeletedVm, expired};
use super::store::record::{RunState, VmRecord};
use super::supervisor_client::{Exit, SupervisorError};
use super::vm::{Beginning, Command, Host, Vm, VmHandle, give_up_run, internal, not_found};

/// Room for VMs in one page, in bytes of their encoding.
const PAGE: usize = 48 << 10;

/// VMs that one appliance keeps.
const MAX_VMS: usize = 10_000;

/// The outcome of a create that several may wait for.
type Progress = watch::Receiver<Option<Result<(), ErrorBody>>>;

/// See the module.
pub(crate) struct Registry {
    host: Arc<Host>,
    inner: Mutex<Inner>,
    imported: watch::Receiver<bool>,
}

#[derive(Default)]
struct Inner {
    vms: BTreeMap<VmId, VmHandle>,
    names: HashMap<(Owner, VmName), VmId>,
    keys: HashMap<(Owner, IdempotencyKey), Known>,
}

/// A create that was seen.
struct Known {
    arguments: [u8; 32],
    id: VmId,
    progress: Option<Progress>,
    deleted: Option<DeletedVm>,
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

    /// Brings back what the state directory and the supervisor know.
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), RecoverError> {
        let running = self.host.supervisor.list().await?;
        let ended: HashMap<Run, Exit> = self.host.supervisor.ended_runs().into_iter().collect();
        self.remove_dead_sockets(&running);
        let host = self.host.clone();
        let (found, deleted) = tokio::task::spawn_blocking(move || {
            Ok::<_, StoreError>((host.store.load()?, host.store.load_deleted()?))
        })
        .await
        .map_err(RecoverError::Panicked)??;
        for (name, error) in &found.broken {
            tracing::error!(name, %error, "VM cannot be used");
        }
        for deleted in deleted {
            self.inner().keys.insert(
                (deleted.owner.clone(), deleted.key),
                Known {
                    arguments: deleted.arguments,
                    id: deleted.id.clone(),
                    progress: None,
                    deleted: Some(deleted),
                },
            );
        }
        let mut stray: Vec<Run> = running.clone();
        stray.extend(ended.keys().cloned());
        for record in found.records {
            let run = Run {
                vm: record.id.clone(),
                generation: record.generation,
            };
            let runs = running.contains(&run);
            if !record.acknowledged {
                // Its create was never answered; whoever waits for it asks again.
                tracing::info!(vm = %record.id, "undoing a create that was not finished");
                stray.retain(|other| *other != run);
                let process = runs || ended.contains_key(&run);
                self.undo(record, run, process);
                continue;
            }
            let beginning = match ended.get(&run) {
                _ if record.run == RunState::Off => Beginning::Off,
                Some(exit) => Beginning::Ended(*exit),
                None if runs => Beginning::Adopt,
                None => Beginning::Off,
            };
            if !matches!(beginning, Beginning::Off) {
                stray.retain(|other| *other != run);
            }
            let record = self.after_host_restart(record, &beginning).await;
            self.insert(record, beginning, None);
        }
        for run in stray {
            let host = self.host.clone();
            tokio::spawn(async move {
                let mut end = host.supervisor.ended(&run);
                tracing::info!(vm = %run.vm, generation = run.generation, "ending a run that no VM has");
                give_up_run(&host, &run, &mut end).await;
            });
        }
        Ok(())
    }

    /// Removes the sockets of monitors that are no more.
    fn remove_dead_sockets(&self, running: &[Run]) {
        let live: Vec<_> = running
            .iter()
            .map(|run| self.host.socket(&run.vm))
            .collect();
        for entry in std::fs::read_dir(&self.host.sockets)
            .into_iter()
            .flatten()
            .flatten()
        {
            if !live.contains(&entry.path()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// A VM that was on and has no monitor any more went down with its host.
    async fn after_host_restart(&self, mut record: VmRecord, beginning: &Beginning) -> VmRecord {
        if matches!(beginning, Beginning::Off) && record.run != RunState::Off {
            record.run = RunState::Off;
            record.end_reason = EndReason::HostRestarted;
            record.end_message = "the host went down while it ran; start it again".into();
            let saved = record.clone();
            let save = self.host.blocking(move |host| host.store.save(&saved));
            if let Err(error) = save.await {
                tracing::error!(vm = %record.id, %error, "cannot save the VM's record");
            }
        }
        record
    }

    fn undo(&self, record: VmRecord, run: Run, process: bool) {
        let host = self.host.clone();
        tokio::spawn(async move {
            if process {
                let mut end = host.supervisor.ended(&run);
                give_up_run(&host, &run, &mut end).await;
            }
            let id = record.id.clone();
            if let Err(error) = host.blocking(move |host| host.store.remove_vm(&id)).await {
                tracing::error!(vm = %record.id, %error, "cannot undo a create; the next start tries again");
            }
        });
    }

    /// Starts a VM's task and makes it known.
    fn insert(
        self: &Arc<Self>,
        record: VmRecord,
        beginning: Beginning,
        progress: Option<Progress>,
    ) {
        let mut inner = self.inner();
        let handle = Vm::spawn(self.host.clone(), self.clone(), record.clone(), beginning);
        if let Some(name) = &record.name {
            inner
                .names
                .insert((record.owner.clone(), name.clone()), record.id.clone());
        }
        inner.keys.insert(
            (record.owner.clone(), record.key),
            Known {
                arguments: record.arguments,
                id: record.id.clone(),
                progress,
                deleted: None,
            },
        );
        inner.vms.insert(record.id.clone(), handle);
    }

    /// Forgets a VM. With `deleted` its create stays known.
    pub(crate) fn remove(&self, record: &VmRecord, deleted: Option<DeletedVm>) {
        let mut inner = self.inner();
        inner.vms.remove(&record.id);
        if let Some(name) = &record.name {
            inner.names.remove(&(record.owner.clone(), name.clone()));
        }
        let key = (record.owner.clone(), record.key);
        match deleted {
            None => drop(inner.keys.remove(&key)),
            Some(deleted) => {
                inner.keys.insert(
                    key,
                    Known {
                        arguments: record.arguments,
                        id: record.id.clone(),
                        progress: None,
                        deleted: Some(deleted),
                    },
                );
            }
        }
    }

    /// The VM that a reference of this owner means.
    pub(crate) fn find(&self, owner: &Owner, vm: &VmRef) -> Result<VmHandle, ErrorBody> {
        let inner = self.inner();
        let id = match vm {
            VmRef::Id(id) => Some(id),
            VmRef::Name(name) => inner.names.get(&(owner.clone(), name.clone())),
        };
        id.and_then(|id| inner.vms.get(id))
            .filter(|handle| handle.owner == *owner)
            .cloned()
            .ok_or_else(|| not_found(vm.as_str()))
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

    /// Makes a VM, or finds the one that the same create made before.
    pub(crate) async fn create(
        self: &Arc<Self>,
        owner: &Owner,
        create: CreateVm,
    ) -> Result<VmInfo, ErrorBody> {
        self.host.refuse_when_going_down()?;
        let wanted = Wanted::check(create, &self.host.settings)?;
        let (id, progress) = match self.begin(owner, wanted)? {
            Begun::There(id) => (id, None),
            Begun::UnderWay(id, progress) => (id, Some(progress)),
        };
        if let Some(mut progress) = progress {
            match progress.wait_for(Option::is_some).await {
                Ok(outcome) => {
                    if let Some(Err(error)) = &*outcome {
                        return Err(error.clone());
                    }
                }
                Err(_) => return Err(internal("the create ended without an outcome")),
            }
        }
        let handle = self.find(owner, &VmRef::Id(id))?;
        Ok(self.info(&handle))
    }

    /// Finds a create that was seen, or begins this one.
    fn begin(self: &Arc<Self>, owner: &Owner, wanted: Wanted) -> Result<Begun, ErrorBody> {
        let mut inner = self.inner();
        self.forget_expired(&mut inner);
        let key = (owner.clone(), wanted.key);
        if let Some(known) = inner.keys.get(&key) {
            if known.arguments != wanted.arguments {
                return Err(ErrorBody::caller(
                    ErrorCode::IdempotencyConflict,
                    format!(
                        "this idempotency key made {} with other arguments; use a new key",
                        known.id
                    ),
                ));
            }
            if known.deleted.is_some() {
                return Err(ErrorBody::caller(
                    ErrorCode::VmNotFound,
                    format!(
                        "{}, which this idempotency key made, was deleted; use a new key",
                        known.id
                    ),
                ));
            }
            return Ok(match &known.progress {
                Some(progress) => Begun::UnderWay(known.id.clone(), progress.clone()),
                None => Begun::There(known.id.clone()),
            });
        }
        if inner.keys.len() >= MAX_VMS.saturating_mul(2) || inner.vms.len() >= MAX_VMS {
            return Err(ErrorBody::host(
                ErrorCode::NoCapacity,
                format!(
                    "{} VMs are kept, which is the most; delete some",
                    inner.vms.len()
                ),
            ));
        }
        if let Some(name) = &wanted.name
            && let Some(other) = inner.names.get(&(owner.clone(), name.clone()))
        {
            return Err(ErrorBody::caller(
                ErrorCode::InvalidArgument,
                format!("the name `{name}` is taken by {other}; choose another or delete that VM"),
            ));
        }
        let id = loop {
            let id = VmId::from_random(random());
            if !inner.vms.contains_key(&id) && !inner.keys.values().any(|known| known.id == id) {
                break id;
            }
        };
        let (sender, progress) = watch::channel(None);
        inner.keys.insert(
            key.clone(),
            Known {
                arguments: wanted.arguments,
                id: id.clone(),
                progress: Some(progress.clone()),
                deleted: None,
            },
        );
        if let Some(name) = &wanted.name {
            inner
                .names
                .insert((owner.clone(), name.clone()), id.clone());
        }
        drop(inner);
        let waiting = progress.clone();
        let (registry, owner, made) = (self.clone(), owner.clone(), id.clone());
        // A task of its own: whoever asked may go away, the create is finished all the same.
        tokio::spawn(async move {
            let name = wanted.name.clone();
            let outcome = registry.make(&owner, wanted, made.clone(), progress).await;
            if let Err(error) = &outcome {
                tracing::warn!(vm = %made, %error, "create failed");
                let mut inner = registry.inner();
                inner.keys.remove(&key);
                if let Some(name) = name {
                    inner.names.remove(&(owner, name));
                }
            } else if let Some(known) = registry.inner().keys.get_mut(&key) {
                known.progress = None;
            }
            sender.send_replace(Some(outcome));
        });
        Ok(Begun::UnderWay(id, waiting))
    }

    fn forget_expired(&self, inner: &mut Inner) {
        inner.keys.retain(|_, known| match &known.deleted {
            Some(deleted) if expired(deleted) => {
                self.host.store.forget_deleted(&deleted.id);
                false
            }
            _ => true,
        });
    }

    async fn make(
        self: &Arc<Self>,
        owner: &Owner,
        wanted: Wanted,
        id: VmId,
        progress: Progress,
    ) -> Result<(), ErrorBody> {
        let memory = self
            .host
            .capacity
            .reserve(wanted.memory_mib)
            .map_err(|error| {
                ErrorBody::host(ErrorCode::NoCapacity, error.to_string()).retryable_after_ms(5000)
            })?;
        let plan = self.plan(wanted).await?;
        let record = self.record(owner, &plan, id).await?;
        let (made, disk) = (record.clone(), plan.template.disk.clone());
        let copied = self
            .host
            .blocking(move |host| host.store.make_vm(&made, &disk))
            .await?;
        tracing::info!(vm = %record.id, %owner, template = %record.template, version = %record.template_version, ?copied, "VM made");
        let (reply, ready) = oneshot::channel();
        self.insert(record, Beginning::Create { memory, reply }, Some(progress));
        match ready.await {
            Ok(outcome) => outcome.map(drop),
            Err(_) => Err(internal("the VM's task ended before the VM was ready")),
        }
    }

    /// Finds the template, waiting for the import when that may bring it.
    async fn plan(&self, wanted: Wanted) -> Result<Plan, ErrorBody> {
        let find = |wanted: &Wanted| {
            let name = wanted.template.clone();
            self.host
                .blocking(move |host| Ok(host.store.template(&name)))
        };
        let mut template = find(&wanted).await?;
        if template.is_none() && !*self.imported.borrow() {
            let _ = self.imported.clone().wait_for(|done| *done).await;
            template = find(&wanted).await?;
        }
        match template {
            Some(template) => wanted.with_template(template, &self.host.settings),
            None => Err(ErrorBody::caller(
                ErrorCode::TemplateNotFound,
                format!("there is no template `{}`", wanted.template),
            )),
        }
    }

    async fn record(&self, owner: &Owner, plan: &Plan, id: VmId) -> Result<VmRecord, ErrorBody> {
        let uid = match self.host.privileged {
            true => self.host.blocking(|host| host.store.next_uid()).await?,
            false => 0,
        };
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(VmRecord {
            id,
            owner: owner.clone(),
            name: plan.wanted.name.clone(),
            template: plan.template.name.clone(),
            template_version: plan.template.version.clone(),
            model: super::create::MACHINE_MODEL,
            cpus: plan.wanted.cpus,
            memory_mib: plan.wanted.memory_mib,
            disk_mib: plan.disk_mib,
            labels: plan.wanted.labels.clone(),
            env: plan.wanted.env.clone(),
            created_unix_ms: since.map_or(0, |since| {
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            }),
            subdomain: Subdomain::from_random(random()),
            machine_id: random(),
            uid,
            key: plan.wanted.key,
            arguments: plan.wanted.arguments,
            acknowledged: false,
            generation: 0,
            run: RunState::Off,
            end_reason: EndReason::None,
            end_message: String::new(),
        })
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

enum Begun {
    There(VmId),
    UnderWay(VmId, Progress),
}

/// Random bytes. A kernel without any is a host that cannot go on: the identifiers of VMs are
/// secrets.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::error!(%error, "no random bytes from the kernel");
        std::process::abort();
    }
    bytes
}

/// Why control cannot go on from where it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    /// The supervisor does not answer.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// The state directory cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Reading it panicked.
    #[error("reading the state directory failed: {0}")]
    Panicked(tokio::task::JoinError),
}
