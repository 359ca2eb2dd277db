//! The frame channels of running VMs. Control makes the socket pairs and keeps neither end: one goes to
//! the VM's monitor, the other to proxy, and the two live on without control. Here is what proxy is to
//! have; a line to proxy brings what it has in accord with that, one VM after the other. A proxy that is
//! away or slow must never keep a VM from running.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use protocol::host::channel::ChannelError;
use protocol::host::proxy::{
    AdmitLink, AttachVm, Attached, Count, Counted, DetachVm, FramesLost, ListAttached, UpdateVm,
};
use protocol::host::supervisor::Run;
use protocol::id::VmId;
use protocol::network::NetworkCounters;
use proxy::channel::Channel;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::monitor::{Monitor, MonitorError};
use super::store::record::VmRecord;

/// How long a monitor may take to take its end.
const MONITOR: Duration = Duration::from_secs(1);

/// How long to wait for proxy at most before going on without it.
const PROXY: Duration = Duration::from_secs(5);

/// How long proxy may take to say what it has counted.
const COUNT: Duration = Duration::from_secs(2);

/// A channel that fails again is not made again sooner than this.
const AGAIN: Duration = Duration::from_secs(1);

/// See the module. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Frames(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Rung when there is something to do.
    work: Notify,
    /// Changes when something was done.
    done: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            work: Notify::new(),
            done: watch::Sender::new(0),
        }
    }
}

#[derive(Default)]
struct State {
    /// What proxy is to have.
    machines: BTreeMap<VmId, Machine>,
    /// The line to proxy, when there is one.
    line: Option<Line>,
    last_line: u64,
    last_ticket: u64,
}

/// A VM that runs.
struct Machine {
    generation: u64,
    /// None while a control that is new has not found the monitor yet: what proxy has stays.
    connected: Option<(Monitor, Arc<VmRecord>)>,
    /// When its channel was last made because the one before had failed.
    renewed: Option<Instant>,
}

struct Line {
    number: u64,
    channel: Arc<Channel>,
    /// What proxy has; not known before it has said so.
    attached: Option<BTreeMap<VmId, u64>>,
    listed: BTreeMap<VmId, u64>,
    /// Channels that failed before all was listed.
    lost: BTreeSet<VmId>,
    /// What may differ.
    open: BTreeSet<VmId>,
    /// What is being brought in accord right now.
    at: Option<VmId>,
    counting: HashMap<u64, oneshot::Sender<Option<NetworkCounters>>>,
}

/// One step to accord.
enum Step {
    Attach(Monitor, Arc<VmRecord>),
    Update(Arc<VmRecord>),
    Detach(u64),
    Nothing,
}

impl Frames {
    /// A VM runs since before control was started; [`up`](Self::up) follows when it was found.
    pub(crate) fn expect(&self, run: &Run) {
        let machine = Machine {
            generation: run.generation,
            connected: None,
            renewed: None,
        };
        self.state().machines.insert(run.vm.clone(), machine);
    }

    /// A VM runs, or its record has changed. Waits until proxy knows, where there is a proxy that
    /// listens.
    pub(crate) async fn up(&self, record: &VmRecord, monitor: &Monitor) {
        {
            let mut state = self.state();
            let renewed = state.machines.get(&record.id).and_then(|old| old.renewed);
            let machine = Machine {
                generation: record.generation,
                connected: Some((monitor.clone(), Arc::new(record.clone()))),
                renewed,
            };
            state.machines.insert(record.id.clone(), machine);
            state.look_at(&record.id);
        }
        self.0.work.notify_waiters();
        self.settled(&record.id).await;
    }

    /// The record of a VM has changed. Waits as [`up`](Self::up); one that does not run is none of
    /// proxy's business.
    pub(crate) async fn update(&self, record: &VmRecord) {
        let monitor = {
            let state = self.state();
            let machine = state.machines.get(&record.id);
            machine.and_then(|machine| Some(machine.connected.as_ref()?.0.clone()))
        };
        if let Some(monitor) = monitor {
            self.up(record, &monitor).await;
        }
    }

    /// A run has ended.
    pub(crate) fn down(&self, run: &Run) {
        let mut state = self.state();
        let current = state.machines.get(&run.vm);
        if current.is_some_and(|machine| machine.generation == run.generation) {
            state.machines.remove(&run.vm);
            state.look_at(&run.vm);
            drop(state);
            self.0.work.notify_waiters();
        }
    }

    /// Whether proxy has this start of a VM.
    pub(crate) fn is_attached(&self, vm: &VmId, generation: u64) -> bool {
        let state = self.state();
        let attached = state.line.as_ref().and_then(|line| line.attached.as_ref());
        attached.is_some_and(|attached| attached.get(vm) == Some(&generation))
    }

    /// Waits until what proxy has of a VM is what it is to have, or there is no proxy, or it has had
    /// its time.
    async fn settled(&self, vm: &VmId) {
        let mut done = self.0.done.subscribe();
        let waiting = async {
            while !self.state().is_settled(vm) {
                if done.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(PROXY, waiting).await.is_err() {
            tracing::warn!(%vm, "proxy has not taken this VM's network yet; going on without");
        }
    }

    /// What proxy has counted for a VM; zeros when it does not say in time.
    pub(crate) async fn count(&self, vm: &VmId) -> NetworkCounters {
        let (sender, receiver) = oneshot::channel();
        let (channel, ticket) = {
            let mut state = self.state();
            state.last_ticket = state.last_ticket.wrapping_add(1);
            let ticket = state.last_ticket;
            let Some(line) = &mut state.line else {
                return NetworkCounters::default();
            };
            line.counting.insert(ticket, sender);
            (line.channel.clone(), ticket)
        };
        let _forget = ForgetCount {
            frames: self,
            ticket,
        };
        let asked = async {
            let vm = vm.clone();
            channel.send(&Count { ticket, vm }, &[]).await.ok()?;
            receiver.await.ok().flatten()
        };
        timeout(COUNT, asked)
            .await
            .ok()
            .flatten()
            .unwrap_or_default()
    }

    /// Tells proxy of a link; whether there is one that was told. Answers that follow on this line
    /// come after it.
    pub(crate) async fn admit(&self, link: &AdmitLink) -> bool {
        let line = self.state().line.as_ref().map(|line| line.channel.clone());
        match line {
            Some(channel) => channel.send(link, &[]).await.is_ok(),
            None => false,
        }
    }

    /// Begins with a proxy that was connected to. What it has must be asked for first.
    pub(crate) async fn begin(&self, channel: &Arc<Channel>) -> Result<LineGuard, ChannelError> {
        let number = {
            let mut state = self.state();
            state.last_line = state.last_line.wrapping_add(1);
            let number = state.last_line;
            state.line = Some(Line {
                number,
                channel: channel.clone(),
                attached: None,
                listed: BTreeMap::new(),
                lost: BTreeSet::new(),
                open: BTreeSet::new(),
                at: None,
                counting: HashMap::new(),
            });
            number
        };
        let guard = LineGuard {
            frames: self.clone(),
            number,
        };
        channel.send(&ListAttached { after: None }, &[]).await?;
        Ok(guard)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything that could panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say_done(&self) {
        self.0
            .done
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl State {
    /// Notes that what proxy has of a VM may differ from what it is to have.
    fn look_at(&mut self, vm: &VmId) {
        if let Some(line) = &mut self.line {
            line.open.insert(vm.clone());
        }
    }

    fn is_settled(&self, vm: &VmId) -> bool {
        let Some(line) = &self.line else {
            return true;
        };
        line.attached.is_some() && !line.open.contains(vm) && line.at.as_ref() != Some(vm)
    }

    /// What is to be done next.
    fn next(&mut self, number: u64) -> Option<(VmId, Step)> {
        let line = self.line.as_mut().filter(|line| line.number == number)?;
        let attached = line.attached.as_ref()?;
        let vm = line.open.pop_first()?;
        let has = attached.get(&vm).copied();
        let step = match (self.machines.get(&vm), has) {
            (None, None) => Step::Nothing,
            (None, Some(generation)) => Step::Detach(generation),
            (Some(machine), has) => match &machine.connected {
                None => Step::Nothing,
                Some((_, record)) if has == Some(machine.generation) => {
                    Step::Update(record.clone())
                }
                Some((monitor, record)) => Step::Attach(monitor.clone(), record.clone()),
            },
        };
        line.at = Some(vm.clone());
        Some((vm, step))
    }
}

/// A line to proxy as it is served. When it is dropped, there is none.
pub(crate) struct LineGuard {
    frames: Frames,
    number: u64,
}

impl Drop for LineGuard {
    fn drop(&mut self) {
        let mut state = self.frames.state();
        if state
            .line
            .as_ref()
            .is_some_and(|line| line.number == self.number)
        {
            state.line = None;
        }
        drop(state);
        self.frames.say_done();
    }
}

impl LineGuard {
    /// A page of what proxy has.
    pub(crate) async fn listed(&self, page: Attached) -> Result<(), ChannelError> {
        let more = {
            let mut state = self.frames.state();
            let State { machines, line, .. } = &mut *state;
            let Some(line) = line.as_mut().filter(|line| line.number == self.number) else {
                return Ok(());
            };
            let last = page.vms.last().map(|(vm, _)| vm.clone());
            line.listed.extend(page.vms);
            match last.filter(|_| page.more) {
                Some(last) => Some((line.channel.clone(), last)),
                None => {
                    let mut attached = std::mem::take(&mut line.listed);
                    line.open.extend(attached.keys().cloned());
                    attached.retain(|vm, _| !line.lost.contains(vm));
                    line.open.extend(machines.keys().cloned());
                    line.attached = Some(attached);
                    None
                }
            }
        };
        match more {
            Some((channel, last)) => channel.send(&ListAttached { after: Some(last) }, &[]).await,
            None => {
                self.frames.0.work.notify_waiters();
                self.frames.say_done();
                Ok(())
            }
        }
    }

    /// Proxy says what it has counted.
    pub(crate) fn counted(&self, counted: Counted) {
        let mut state = self.frames.state();
        let waiter = state
            .line
            .as_mut()
            .and_then(|line| line.counting.remove(&counted.ticket));
        if let Some(waiter) = waiter {
            let _ = waiter.send(counted.counters);
        }
    }

    /// Proxy lost a VM's channel: it gets a new one, after a pause if that happens again.
    pub(crate) fn lost(&self, lost: FramesLost) {
        let now = Instant::now();
        let pause = {
            let mut state = self.frames.state();
            let machine = state.machines.get_mut(&lost.vm);
            let Some(machine) = machine.filter(|one| one.generation == lost.generation) else {
                return;
            };
            let due = match machine.renewed {
                Some(renewed) => (renewed + AGAIN).max(now),
                None => now,
            };
            machine.renewed = Some(due);
            due.saturating_duration_since(now)
        };
        // Most often this is the VM's own end, of which control learns a moment later.
        tracing::debug!(vm = %lost.vm, generation = lost.generation, "frame channel ended");
        let (frames, number) = (self.frames.clone(), self.number);
        tokio::spawn(async move {
            sleep(pause).await;
            let mut state = frames.state();
            let line = state.line.as_mut().filter(|line| line.number == number);
            let Some(line) = line else { return };
            match &mut line.attached {
                Some(attached) => drop(attached.remove(&lost.vm)),
                None => drop(line.lost.insert(lost.vm.clone())),
            }
            line.open.insert(lost.vm);
            drop(state);
            frames.0.work.notify_waiters();
        });
    }

    /// Brings what proxy has in accord with what it is to have, for ever.
    pub(crate) async fn sync(&self, channel: &Channel) -> ChannelError {
        loop {
            let work = self.frames.0.work.notified();
            tokio::pin!(work);
            // From here on a ring is not missed.
            work.as_mut().enable();
            loop {
                let next = self.frames.state().next(self.number);
                let Some((vm, step)) = next else { break };
                let now = match take(channel, &vm, step).await {
                    Ok(now) => now,
                    Err(error) => return error,
                };
                self.note(&vm, now);
                self.frames.say_done();
            }
            work.await;
        }
    }

    fn note(&self, vm: &VmId, now: Has) {
        let mut state = self.frames.state();
        let line = state.line.as_mut();
        let Some(line) = line.filter(|line| line.number == self.number) else {
            return;
        };
        line.at = None;
        let renewed = state.machines.get(vm).and_then(|one| one.renewed);
        if let (Has::This(generation), Some(_)) = (&now, renewed) {
            tracing::info!(%vm, generation, "frame channel was lost and made anew");
        }
        let Some(line) = state.line.as_mut() else {
            return;
        };
        let Some(attached) = &mut line.attached else {
            return;
        };
        match now {
            Has::Same => {}
            Has::This(generation) => drop(attached.insert(vm.clone(), generation)),
            Has::None => drop(attached.remove(vm)),
            Has::NotYet => {
                attached.remove(vm);
                drop(state);
                self.again(vm.clone());
            }
        }
    }

    /// Looks at a VM once more after a pause.
    fn again(&self, vm: VmId) {
        let (frames, number) = (self.frames.clone(), self.number);
        tokio::spawn(async move {
            sleep(AGAIN).await;
            let mut state = frames.state();
            let line = state.line.as_mut().filter(|line| line.number == number);
            let Some(line) = line else { return };
            line.open.insert(vm);
            drop(state);
            frames.0.work.notify_waiters();
        });
    }
}

/// What proxy has of a VM after a step.
enum Has {
    Same,
    This(u64),
    None,
    /// Nothing, and nothing that follows would change that by itself.
    NotYet,
}

async fn take(channel: &Channel, vm: &VmId, step: Step) -> Result<Has, ChannelError> {
    match step {
        Step::Nothing => Ok(Has::Same),
        Step::Update(record) => {
            let update = UpdateVm {
                vm: vm.clone(),
                egress: record.egress.clone(),
                publication: record.publication.clone(),
            };
            channel.send(&update, &[]).await?;
            Ok(Has::Same)
        }
        Step::Detach(generation) => {
            let vm = vm.clone();
            channel.send(&DetachVm { vm, generation }, &[]).await?;
            Ok(Has::None)
        }
        Step::Attach(monitor, record) => {
            let (ours, theirs) = match socketpair(
                AddressFamily::Unix,
                SockType::Stream,
                None,
                SockFlag::SOCK_CLOEXEC,
            ) {
                Ok(pair) => pair,
                Err(error) => {
                    tracing::error!(%vm, %error, "no frame channel; tried again");
                    return Ok(Has::NotYet);
                }
            };
            let told = timeout(MONITOR, monitor.attach_frames(theirs.as_fd())).await;
            match told {
                Ok(Ok(())) => {}
                // It ends, or is found again: either way more follows.
                Ok(Err(MonitorError::Gone | MonitorError::Channel(_))) => return Ok(Has::None),
                Ok(Err(error)) => {
                    tracing::error!(%vm, %error, "no frame channel; tried again");
                    return Ok(Has::NotYet);
                }
                Err(_) => {
                    tracing::error!(%vm, "its monitor takes no frame channel; tried again");
                    return Ok(Has::NotYet);
                }
            }
            let attach = AttachVm {
                vm: vm.clone(),
                generation: record.generation,
                hostname: record.id.hostname(),
                subdomain: record.subdomain.clone(),
                egress: record.egress.clone(),
                publication: record.publication.clone(),
            };
            channel.send(&attach, &[ours.as_fd()]).await?;
            Ok(Has::This(record.generation))
        }
    }
}

/// Forgets a question when nobody waits for its answer any more.
struct ForgetCount<'a> {
    frames: &'a Frames,
    ticket: u64,
}

impl Drop for ForgetCount<'_> {
    fn drop(&mut self) {
        if let Some(line) = &mut self.frames.state().line {
            line.counting.remove(&self.ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_channel_that_could_not_be_made_is_tried_again_and_nobody_waits_for_it() {
        let (ours, _proxy) = Channel::pair().unwrap();
        let frames = Frames::default();
        let line = frames.begin(&Arc::new(ours)).await.unwrap();
        let nothing = Attached {
            vms: Vec::new(),
            more: false,
        };
        line.listed(nothing).await.unwrap();
        let vm = "vm-1234abcd".parse().unwrap();
        let work = frames.0.work.notified();
        line.note(&vm, Has::NotYet);
        assert!(frames.state().is_settled(&vm));
        let rung = timeout(AGAIN.saturating_mul(20), work).await;
        rung.expect("it is forgotten");
        assert!(!frames.state().is_settled(&vm));
    }
}
