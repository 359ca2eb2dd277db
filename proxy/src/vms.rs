//! The VMs whose network proxy has: by identifier for control, by the label of the public address for
//! the edge. It also asks control for what is not here: a VM that sleeps, a stream to an agent. It
//! must never ask twice at once for the same, nor remember without bound what visitors ask for.

mod unknown;
mod waking;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::host::proxy::{
    AttachVm, Attached, DetachVm, DialAgent, FramesLost, ServeGateway, UpdateVm,
};
use protocol::id::{Subdomain, VmId};
use protocol::network::{Egress, NetworkCounters, Publication};
use protocol::{ErrorBody, ErrorCode, Kind};
use tokio::sync::{Notify, watch};

use crate::api::desk::{Answer, Desk};
use unknown::Unknown;
use waking::Waking;

/// VMs in one page of the list.
const PAGE: usize = 1024;

/// One VM that is attached, from [`Vms::attach`] until it is replaced or detached. Whoever holds it
/// may use what it says until [`gone`](Self::gone).
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) id: VmId,
    /// Which of its starts.
    pub(crate) generation: u64,
    /// The name it has in itself.
    pub(crate) hostname: String,
    /// The label of its public address.
    pub(crate) subdomain: Subdomain,
    /// Requests at its public address.
    pub(crate) requests: AtomicU64,
    egress: watch::Sender<Arc<Egress>>,
    publication: watch::Sender<Arc<Publication>>,
    gone: watch::Sender<bool>,
    /// Its channel or its stack failed.
    lost: AtomicBool,
    /// Proxy's end of the frame channel, until somebody takes it.
    frames: Mutex<Option<OwnedFd>>,
}

impl Vm {
    /// What it may reach, and news of that.
    pub(crate) fn egress(&self) -> watch::Receiver<Arc<Egress>> {
        self.egress.subscribe()
    }

    /// How it can be reached now.
    pub(crate) fn publication(&self) -> Arc<Publication> {
        Arc::clone(&self.publication.borrow())
    }

    /// Waits until it was replaced or detached.
    pub(crate) async fn gone(&self) {
        // The sender lives as long as this.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Takes proxy's end of the frame channel; once.
    pub(crate) fn take_frames(&self) -> Option<OwnedFd> {
        self.frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// What was counted. What the stack counts is added where the stack is.
    pub(crate) fn counters(&self) -> NetworkCounters {
        NetworkCounters {
            requests: self.requests.load(Ordering::Relaxed),
            ..NetworkCounters::default()
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Vms {
    desk: Arc<Desk>,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    gateway: watch::Sender<Arc<ServeGateway>>,
    /// Rung when `lost` may have grown.
    losses: Notify,
}

#[derive(Debug, Default)]
struct State {
    by_id: BTreeMap<VmId, Arc<Vm>>,
    by_label: HashMap<Subdomain, VmId>,
    unknown: Unknown,
    waking: Waking,
    /// VMs whose channel was lost, until control knows.
    lost: BTreeSet<VmId>,
}

impl Vms {
    pub(crate) fn new(desk: Arc<Desk>) -> Arc<Self> {
        Arc::new(Self {
            desk,
            state: Mutex::default(),
            changes: watch::Sender::new(0),
            gateway: watch::Sender::default(),
            losses: Notify::new(),
        })
    }

    /// Takes a VM in. One of the same identifier is replaced.
    pub(crate) fn attach(&self, attach: AttachVm, frames: OwnedFd) {
        let vm = Arc::new(Vm {
            id: attach.vm,
            generation: attach.generation,
            hostname: attach.hostname,
            subdomain: attach.subdomain,
            requests: AtomicU64::new(0),
            egress: watch::Sender::new(Arc::new(attach.egress)),
            publication: watch::Sender::new(Arc::new(attach.publication)),
            gone: watch::Sender::new(false),
            lost: AtomicBool::new(false),
            frames: Mutex::new(Some(frames)),
        });
        let before = {
            let mut state = self.lock();
            state.unknown.forget(&vm.subdomain);
            state.lost.remove(&vm.id);
            state.by_label.insert(vm.subdomain.clone(), vm.id.clone());
            state.by_id.insert(vm.id.clone(), Arc::clone(&vm))
        };
        tracing::info!(vm = %vm.id, generation = vm.generation, "VM attached");
        if let Some(before) = before {
            self.end(&before);
        }
    }

    /// Changes the settings of a VM that is attached.
    pub(crate) fn update(&self, update: UpdateVm) {
        let Some(vm) = self.get(&update.vm) else {
            return;
        };
        vm.egress
            .send_if_modified(|egress| replace(egress, update.egress));
        vm.publication
            .send_if_modified(|publication| replace(publication, update.publication));
    }

    /// Lets a VM go, unless a later start of it is attached.
    pub(crate) fn detach(&self, detach: &DetachVm) {
        let gone = {
            let mut state = self.lock();
            let vm = state.by_id.get(&detach.vm);
            if vm.is_none_or(|vm| vm.generation > detach.generation) {
                return;
            }
            let gone = state.by_id.remove(&detach.vm);
            if let Some(gone) = &gone {
                state.by_label.remove(&gone.subdomain);
                state.lost.remove(&gone.id);
            }
            gone
        };
        if let Some(gone) = gone {
            tracing::info!(vm = %gone.id, generation = gone.generation, "VM detached");
            self.end(&gone);
        }
    }

    fn end(&self, vm: &Vm) {
        vm.gone.send_replace(true);
        // Nobody took it: nobody else closes it.
        drop(vm.take_frames());
        self.changes
            .send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// The VM of an identifier.
    pub(crate) fn get(&self, id: &VmId) -> Option<Arc<Vm>> {
        self.lock().by_id.get(id).cloned()
    }

    /// The VM of a public address.
    pub(crate) fn find(&self, subdomain: &Subdomain) -> Option<Arc<Vm>> {
        let state = self.lock();
        state.by_id.get(state.by_label.get(subdomain)?).cloned()
    }

    /// Changes whenever a VM was replaced or detached.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A page of what is attached.
    pub(crate) fn list(&self, after: Option<&VmId>) -> Attached {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let state = self.lock();
        let mut vms = state.by_id.range::<VmId, _>((from, Bound::Unbounded));
        let page = vms.by_ref().take(PAGE);
        let page = page.map(|(id, vm)| (id.clone(), vm.generation)).collect();
        Attached {
            vms: page,
            more: vms.next().is_some(),
        }
    }

    /// By what and under which rules all VMs reach the world, and news of that.
    pub(crate) fn gateway(&self) -> watch::Receiver<Arc<ServeGateway>> {
        self.gateway.subscribe()
    }

    /// Control says by what they do.
    pub(crate) fn set_gateway(&self, gateway: ServeGateway) {
        self.gateway
            .send_if_modified(|current| replace(current, gateway));
    }

    /// The frame channel or the stack of a VM failed: control makes a new one.
    pub(crate) fn lost(&self, vm: &Vm) {
        let mut state = self.lock();
        let current = state.by_id.get(&vm.id);
        if current.is_some_and(|current| std::ptr::eq(&raw const **current, vm)) {
            vm.lost.store(true, Ordering::Relaxed);
            state.lost.insert(vm.id.clone());
            drop(state);
            self.losses.notify_one();
        }
    }

    /// Waits for the next VM whose channel was lost.
    pub(crate) async fn next_lost(&self) -> FramesLost {
        loop {
            let losses = self.losses.notified();
            {
                let mut state = self.lock();
                while let Some(id) = state.lost.pop_first() {
                    if let Some(vm) = state.by_id.get(&id) {
                        return FramesLost {
                            generation: vm.generation,
                            vm: id,
                        };
                    }
                }
            }
            losses.await;
        }
    }

    /// A new control is there: it is told of every loss that the one before did not make good.
    pub(crate) fn connected(&self) {
        let mut state = self.lock();
        let State { by_id, lost, .. } = &mut *state;
        let failed = by_id.values().filter(|vm| vm.lost.load(Ordering::Relaxed));
        lost.extend(failed.map(|vm| vm.id.clone()));
        drop(state);
        self.losses.notify_one();
    }

    /// Asks control for a stream to the agent of a VM that runs.
    pub(crate) async fn dial_agent(&self, vm: &VmId) -> Result<OwnedFd, ErrorBody> {
        let answer = self.desk.ask_edge(&DialAgent { vm: vm.clone() }).await?;
        let Answer { frame, stream } = answer;
        match stream {
            Some(stream) if frame.kind == Kind::OPENED => Ok(stream),
            _ => Err(refusal(&frame)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts a new value in place; says whether it is another one.
fn replace<T: PartialEq>(current: &mut Arc<T>, new: T) -> bool {
    let is_other = **current != new;
    if is_other {
        *current = Arc::new(new);
    }
    is_other
}

/// What control refused, or a complaint that it answered with something else.
fn refusal(frame: &protocol::Frame) -> ErrorBody {
    match protocol::decode::<ErrorBody>(frame) {
        Ok(refusal) => refusal,
        Err(_) => ErrorBody::host(
            ErrorCode::Internal,
            format!("control answered the edge with kind {}", frame.kind),
        ),
    }
}

#[cfg(test)]
mod tests;
