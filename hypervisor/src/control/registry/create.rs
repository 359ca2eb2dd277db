//! Creates: each is one task that goes on whoever still waits for it, and is found again by its
//! idempotency key. One that fails or panics leaves neither a disk nor an entry behind.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use protocol::id::{Owner, Subdomain, VmId};
use protocol::vm::{CreateVm, EndReason, VmInfo, VmRef};
use protocol::{ErrorBody, ErrorCode};
use tokio::sync::{oneshot, watch};

use super::super::create::{MACHINE_MODEL, Plan, Wanted};
use super::super::injected_panic;
use super::super::random::random;
use super::super::store::Copied;
use super::super::store::record::{RunState, VmRecord};
use super::super::vm::{Beginning, internal};
use super::index::Known;
use super::{Progress, Registry};

/// How long a create that panicked may take to be undone: a monitor has to end.
const UNDO: Duration = Duration::from_secs(20);

/// VMs that one appliance keeps.
const MAX_VMS: usize = 10_000;

impl Registry {
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
        let forgotten = inner.index.forget_old();
        self.forget_deleted(&forgotten);
        if let Some(known) = inner.index.create(owner, wanted.key) {
            if known.arguments != wanted.arguments {
                return Err(ErrorBody::caller(
                    ErrorCode::IdempotencyConflict,
                    format!(
                        "this idempotency key made {} with other arguments; use a new key",
                        known.id
                    ),
                ));
            }
            if known.is_deleted {
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
        if inner.vms.len() >= MAX_VMS {
            return Err(ErrorBody::host(
                ErrorCode::NoCapacity,
                format!("{MAX_VMS} VMs are kept, which is the most; delete some"),
            ));
        }
        if let Some(name) = &wanted.name
            && let Some(other) = inner.index.named(owner, name)
        {
            return Err(ErrorBody::caller(
                ErrorCode::NameTaken,
                format!("the name `{name}` is taken by {other}; choose another or delete that VM"),
            ));
        }
        let id = loop {
            let id = VmId::from_random(random());
            if !inner.vms.contains_key(&id) && !inner.index.knows(&id) {
                break id;
            }
        };
        let (sender, progress) = watch::channel(None);
        let known = Known {
            arguments: wanted.arguments,
            id: id.clone(),
            progress: Some(progress.clone()),
            is_deleted: false,
        };
        inner
            .index
            .note(owner, wanted.name.as_ref(), wanted.key, known);
        drop(inner);
        let waiting = progress.clone();
        let (registry, owner, made) = (self.clone(), owner.clone(), id.clone());
        // A task of its own: whoever asked may go away, the create is finished all the same.
        tokio::spawn(async move {
            let (name, key) = (wanted.name.clone(), wanted.key);
            let making = registry.make(&owner, wanted, made.clone(), progress);
            let outcome = AssertUnwindSafe(making)
                .catch_unwind()
                .await
                .unwrap_or_else(|_| {
                    Err(internal(format!(
                        "making {made} failed inside the appliance; its log says more"
                    )))
                });
            match &outcome {
                Ok(()) => registry.inner().index.settle(&owner, key, &made),
                Err(error) => {
                    tracing::warn!(vm = %made, %error, "create failed");
                    registry.clear(&made).await;
                    let mut inner = registry.inner();
                    inner.index.forget(&owner, name.as_ref(), key, &made);
                }
            }
            sender.send_replace(Some(outcome));
        });
        Ok(Begun::UnderWay(id, waiting))
    }

    /// Removes what a create that failed left on disk. Where a task had the VM already, that task
    /// has removed it.
    async fn clear(&self, id: &VmId) {
        if self.inner().vms.contains_key(id) {
            return;
        }
        let failed = id.clone();
        let cleared = self
            .host
            .blocking(move |host| host.store.clear_vm(&failed))
            .await;
        if let Err(error) = cleared {
            tracing::error!(vm = %id, %error, "cannot undo a create; the next start does");
        }
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
        injected_panic(&plan.wanted.labels, "make");
        let record = self.record(owner, &plan, id).await?;
        let (made, disk) = (record.clone(), plan.template.disk.clone());
        let copied = self
            .host
            .blocking(move |host| host.store.make_vm(&made, &disk))
            .await?;
        let shared = copied == Copied::Shared;
        tracing::info!(vm = %record.id, %owner, template = %record.template, version = %record.template_version, shared, "VM made");
        injected_panic(&record.labels, "made");
        let (reply, ready) = oneshot::channel();
        let beginning = Beginning::Create { memory, reply };
        let handle = self.insert(record, beginning, Some(progress));
        match ready.await {
            Ok(outcome) => outcome.map(drop),
            Err(_) => {
                // It panicked, and is done when it has undone what it began.
                let _ = tokio::time::timeout(UNDO, handle.commands.closed()).await;
                Err(internal(format!(
                    "{} failed inside the appliance before it was ready; the log says more",
                    handle.id
                )))
            }
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
            model: MACHINE_MODEL,
            cpus: plan.wanted.cpus,
            memory_mib: plan.wanted.memory_mib,
            disk_mib: plan.disk_mib,
            labels: plan.wanted.labels.clone(),
            env: plan.wanted.env.clone(),
            egress: plan.wanted.egress.clone(),
            publication: plan.wanted.publication.clone(),
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
}

enum Begun {
    There(VmId),
    UnderWay(VmId, Progress),
}
