//! Connections into a VM that wait for the next request. They belong to one start of the VM and go
//! when it ends: a connection from before a state change is never used after it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::client::conn::{http1, http2};
use protocol::id::VmId;
use tokio::time::Instant;

use super::body::Upload;
use super::guests::Guest;
use super::limits::Limits;
use super::tasks::Tasks;

/// A connection to a guest, ready for HTTP/1.1.
pub(crate) type Sender = http1::SendRequest<Upload>;

/// A connection to a guest, ready for HTTP/2.
pub(crate) type Sender2 = http2::SendRequest<Upload>;

/// The VMs that the edge has spoken to.
#[derive(Debug, Default)]
pub(crate) struct Pools(Mutex<HashMap<VmId, Arc<VmPool>>>);

/// One start of a VM.
#[derive(Debug)]
pub(crate) struct VmPool {
    generation: u64,
    limits: Arc<Limits>,
    tasks: Tasks,
    requests: AtomicU32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    sweeping: bool,
    ports: HashMap<u16, Port>,
}

#[derive(Debug, Default)]
struct Port {
    idle: Vec<(Instant, Sender)>,
    http2: Option<(Instant, Sender2)>,
}

/// The use of a connection for one request.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) pool: Arc<VmPool>,
    pub(crate) port: u16,
    pub(crate) sender: Sender,
}

/// A request's place among those of its VM.
#[derive(Debug)]
pub(crate) struct VmPlace(Arc<VmPool>);

impl Pools {
    /// The pool of a VM, and whether it is new: then its end has to be watched.
    pub(crate) fn of(
        &self,
        guest: &Guest,
        limits: &Arc<Limits>,
        tasks: &Tasks,
    ) -> (Arc<VmPool>, bool) {
        let mut vms = self.lock();
        if let Some(pool) = vms.get(&guest.vm) {
            if pool.generation == guest.generation {
                return (Arc::clone(pool), false);
            }
            if pool.generation > guest.generation {
                // A visitor who waited too long: its VM is gone.
                return (Arc::new(VmPool::new(guest, limits, tasks, true)), false);
            }
        }
        let pool = Arc::new(VmPool::new(guest, limits, tasks, false));
        let old = vms.insert(guest.vm.clone(), Arc::clone(&pool));
        drop(vms);
        if let Some(old) = old {
            old.end();
        }
        (pool, true)
    }

    /// Drops a pool and everything in it.
    pub(crate) fn end(&self, vm: &VmId, pool: &Arc<VmPool>) {
        let mut vms = self.lock();
        if vms.get(vm).is_some_and(|known| Arc::ptr_eq(known, pool)) {
            vms.remove(vm);
        }
        drop(vms);
        pool.end();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Arc<VmPool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmPool {
    fn new(guest: &Guest, limits: &Arc<Limits>, tasks: &Tasks, ended: bool) -> Self {
        Self {
            generation: guest.generation,
            limits: Arc::clone(limits),
            tasks: tasks.clone(),
            requests: AtomicU32::new(0),
            state: Mutex::new(State {
                ended,
                ..State::default()
            }),
        }
    }

    /// A place for a request, while there are any.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<VmPlace> {
        let before = self.requests.fetch_add(1, Ordering::Relaxed);
        let place = VmPlace(Arc::clone(self));
        (before < self.limits.requests_per_vm).then_some(place)
    }

    /// A connection that waits. For a request that must not be sent twice it has to be one that was
    /// used just before, which its server does not close yet.
    pub(crate) fn take(&self, port: u16, repeatable: bool) -> Option<Sender> {
        let fresh = self.limits.upstream_fresh;
        let mut state = self.lock();
        let idle = &mut state.ports.get_mut(&port)?.idle;
        idle.retain(|(_, sender)| !sender.is_closed());
        // The youngest: the others may then go.
        let at = idle.iter().rposition(|(since, sender)| {
            sender.is_ready() && (repeatable || since.elapsed() < fresh)
        })?;
        Some(idle.swap_remove(at).1)
    }

    /// The connection by HTTP/2, which serves many requests at a time.
    pub(crate) fn http2(&self, port: u16) -> Option<Sender2> {
        let mut state = self.lock();
        let (used, sender) = state.ports.get_mut(&port)?.http2.as_mut()?;
        *used = Instant::now();
        (!sender.is_closed()).then(|| sender.clone())
    }

    /// Keeps a connection by HTTP/2 for others to use.
    pub(crate) fn share_http2(self: &Arc<Self>, port: u16, sender: &Sender2) {
        self.keep(port, |port| {
            port.http2 = Some((Instant::now(), sender.clone()));
        });
    }

    fn give_back(self: &Arc<Self>, port: u16, sender: Sender) {
        let most = self.limits.upstream_kept;
        self.keep(port, |port| {
            if !sender.is_closed() && port.idle.len() < most {
                port.idle.push((Instant::now(), sender));
            }
        });
    }

    fn keep(self: &Arc<Self>, port: u16, put: impl FnOnce(&mut Port)) {
        let mut state = self.lock();
        if state.ended {
            return;
        }
        put(state.ports.entry(port).or_default());
        if !std::mem::replace(&mut state.sweeping, true) {
            drop(state);
            let pool = Arc::clone(self);
            self.tasks.spawn(async move { pool.sweep().await });
        }
    }

    /// Closes connections that nobody used for long, until there are none.
    async fn sweep(&self) {
        loop {
            let next = {
                let mut state = self.lock();
                let now = Instant::now();
                let idle = self.limits.upstream_idle;
                let mut next: Option<Instant> = None;
                let mut due = |since: Instant, after| {
                    let due = since.checked_add(after).unwrap_or(now);
                    if due > now {
                        next = Some(next.map_or(due, |next| next.min(due)));
                    }
                    due > now
                };
                state.ports.retain(|_, port| {
                    port.idle
                        .retain(|(since, sender)| !sender.is_closed() && due(*since, idle));
                    // Requests that are still being answered keep the connection, not the place here.
                    let mut stays = |(used, sender): &(Instant, Sender2)| {
                        !sender.is_closed() && due(*used, idle)
                    };
                    if port.http2.as_ref().is_some_and(|http2| !stays(http2)) {
                        port.http2 = None;
                    }
                    !port.idle.is_empty() || port.http2.is_some()
                });
                state.sweeping = next.is_some();
                next
            };
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => return,
            }
        }
    }

    fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        let ports = std::mem::take(&mut state.ports);
        drop(state);
        drop(ports);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// The request has ended well.
    pub(crate) fn give_back(self) {
        self.pool.give_back(self.port, self.sender);
    }
}

impl Drop for VmPlace {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}
