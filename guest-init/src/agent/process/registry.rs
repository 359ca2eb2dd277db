//! All processes by their ids: those that run, those that ended lately, and those that an earlier run
//! of the machine has left a log of. Keeps the bounds: what is dropped is the oldest, and never a
//! process that runs.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use protocol::id::ProcessId;
use protocol::process::{ProcessEnded, StartProcess};
use protocol::processes::{MAX_PAGE, ProcessPage};
use protocol::{ErrorBody, ErrorCode};

use super::life::{About, Process};
use super::logs::Logs;
use super::output::Phase;
use super::segment::{self, Name};
use crate::agent::lock;
use crate::log;
use crate::reaper::Reaper;

/// Processes that run at once.
const MAX_RUNNING: usize = 512;
/// Ended processes that are remembered.
const MAX_ENDED: usize = 1024;
/// What ended processes may keep in memory because no disk took it.
const MAX_UNLOGGED: u64 = 2 << 20;

const SIGHUP: u8 = 1;

/// See the module.
pub(crate) struct Registry {
    pub(crate) logs: Logs,
    state: Mutex<State>,
    /// Told when the last process that ran has ended.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    /// How many processes run or are being started.
    running: usize,
    processes: HashMap<ProcessId, Arc<Process>>,
    /// Logs of an earlier run that nobody has asked about yet.
    unread: HashMap<ProcessId, Vec<Name>>,
    order: BTreeMap<u64, ProcessId>,
    /// In the order of their ends.
    ended: VecDeque<ProcessId>,
    last: u64,
}

/// What an id stands for.
pub(crate) enum Claim {
    /// A process that is to be started.
    New(Arc<Process>),
    /// One that was started before by the same request.
    Known(Arc<Process>),
}

impl Registry {
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        let state = directory.as_deref().map(read_names).unwrap_or_default();
        let size = state.unread.values().flatten().map(|name| name.size).sum();
        Self {
            logs: Logs::new(directory, size),
            state: Mutex::new(state),
            settled: Condvar::new(),
        }
    }

    /// Makes a process for a request, or finds the one that it has made before.
    pub(crate) fn claim(&self, request: &StartProcess) -> Result<Claim, ErrorBody> {
        let id = request.id;
        let fingerprint = fingerprint(request);
        // One that an earlier run has left a log of is among the others from here on.
        let _ = self.get(id);
        let mut state = lock(&self.state);
        if let Some(process) = state.processes.get(&id) {
            let process = Arc::clone(process);
            return match process.about.fingerprint {
                Some(other) if other != fingerprint => {
                    let message =
                        format!("the id {id} belongs to a process that was started otherwise");
                    Err(ErrorBody::caller(ErrorCode::ProcessExists, message))
                }
                _ => Ok(Claim::Known(process)),
            };
        }
        if state.running >= MAX_RUNNING {
            let message = format!("{MAX_RUNNING} processes run; end one and try again");
            let error = ErrorBody::guest(ErrorCode::TooManyProcesses, message);
            return Err(error.retryable_after_ms(1000));
        }
        let number = state.last.saturating_add(1);
        let about = About::of(request, fingerprint);
        let has_log = self.logs.directory().is_some();
        let process = Arc::new(Process::new(id, number, about, has_log));
        state.last = number;
        state.running = state.running.saturating_add(1);
        state.order.insert(number, id);
        state.processes.insert(id, Arc::clone(&process));
        Ok(Claim::New(process))
    }

    /// The process with this id.
    pub(crate) fn find(&self, id: ProcessId) -> Result<Arc<Process>, ErrorBody> {
        self.get(id).ok_or_else(|| no_such(id))
    }

    fn get(&self, id: ProcessId) -> Option<Arc<Process>> {
        let names = {
            let state = lock(&self.state);
            if let Some(process) = state.processes.get(&id) {
                return Some(Arc::clone(process));
            }
            state.unread.get(&id)?.clone()
        };
        let number = names.first().map_or(0, |name| name.number);
        // A long log takes long to read. Nobody else waits for that.
        let found = segment::recover(self.logs.directory()?, names);
        let mut state = lock(&self.state);
        // Somebody else may have read it meanwhile, or it may have been forgotten.
        if state.unread.remove(&id).is_none() {
            return state.processes.get(&id).map(Arc::clone);
        }
        let Some(found) = found else {
            state.order.remove(&number);
            state.ended.retain(|one| *one != id);
            return None;
        };
        let process = Arc::new(Process::recovered(id, found));
        state.processes.insert(id, Arc::clone(&process));
        Some(process)
    }

    pub(crate) fn list(&self, after: u64) -> ProcessPage {
        let ids: Vec<ProcessId> = lock(&self.state)
            .order
            .range(after.saturating_add(1)..)
            .map(|(_, id)| *id)
            .take(MAX_PAGE.saturating_add(1))
            .collect();
        let more = ids.len() > MAX_PAGE;
        let processes = ids
            .into_iter()
            .take(MAX_PAGE)
            .filter_map(|id| self.get(id))
            .collect::<Vec<_>>();
        ProcessPage {
            processes: processes.iter().map(|process| process.info()).collect(),
            more,
        }
    }

    /// The process has ended, like this: from now on it may be forgotten. Gives the one that is
    /// forgotten for it, whose log is to be [removed](Gone::remove_log) when nobody waits.
    ///
    /// One step for everybody: who hears of the end finds it among the ended ones, and when nothing
    /// runs any more, all that was said waits for the log.
    pub(crate) fn retire(&self, process: &Arc<Process>, how: ProcessEnded) -> Option<Gone> {
        let mut state = lock(&self.state);
        process.set_ended(how);
        self.logs.note(process);
        self.count_end(&mut state);
        state.ended.push_back(process.id);
        if state.ended.len() <= MAX_ENDED {
            return None;
        }
        let oldest = state.ended.pop_front()?;
        Some(self.take(&mut state, oldest))
    }

    /// Forgets a process whose start was refused.
    pub(crate) fn forget(&self, process: &Process) {
        let gone = {
            let mut state = lock(&self.state);
            self.count_end(&mut state);
            self.take(&mut state, process.id)
        };
        gone.remove_log(&self.logs);
        let mut output = lock(&process.output);
        output.phase = Phase::Refused;
        output.notify();
    }

    fn count_end(&self, state: &mut State) {
        state.running = state.running.saturating_sub(1);
        if state.running == 0 {
            self.settled.notify_all();
        }
    }

    /// Tells all processes that have a terminal that it is gone.
    pub(crate) fn hang_up_terminals(&self, reaper: &Reaper) {
        let with_terminal: Vec<_> = lock(&self.state)
            .processes
            .values()
            .filter(|process| process.about.terminal)
            .map(Arc::clone)
            .collect();
        for process in with_terminal {
            // One that has ended has no group to be told.
            process.signal(reaper, SIGHUP);
        }
    }

    /// Waits until no process runs, or until the deadline. Says how many still do.
    pub(crate) fn settle(&self, deadline: Instant) -> usize {
        let left = deadline.saturating_duration_since(Instant::now());
        let state = lock(&self.state);
        let waited = self
            .settled
            .wait_timeout_while(state, left, |state| state.running > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.running
    }

    /// Forgets an ended process and its log.
    pub(crate) fn remove(&self, id: ProcessId) -> Result<(), ErrorBody> {
        let mut state = lock(&self.state);
        if !state.processes.contains_key(&id) && !state.unread.contains_key(&id) {
            return Err(no_such(id));
        }
        if !state.ended.contains(&id) {
            let message = format!("process {id} still runs; end it first");
            return Err(ErrorBody::caller(ErrorCode::ProcessRunning, message));
        }
        state.ended.retain(|one| *one != id);
        let gone = self.take(&mut state, id);
        drop(state);
        gone.remove_log(&self.logs);
        Ok(())
    }

    fn take(&self, state: &mut State, id: ProcessId) -> Gone {
        let process = state.processes.remove(&id);
        let names = state.unread.remove(&id).unwrap_or_default();
        let number = match (&process, names.first()) {
            (Some(process), _) => process.number,
            (None, Some(name)) => name.number,
            (None, None) => 0,
        };
        state.order.remove(&number);
        Gone {
            process,
            files: names
                .into_iter()
                .filter_map(|name| Some((self.logs.directory()?.join(name.text()), name.size)))
                .collect(),
        }
    }

    /// Keeps the bound on all logs after `written` has grown.
    pub(crate) fn trim(&self, written: &Arc<Process>) {
        // A process that was forgotten while it was written has no log any more.
        let is_known = lock(&self.state).processes.contains_key(&written.id);
        if !is_known {
            while self.logs.drop_oldest(written) {}
        }
        while self.logs.are_too_large() {
            let oldest = {
                let mut state = lock(&self.state);
                let oldest = state.ended.pop_front();
                oldest.map(|id| self.take(&mut state, id))
            };
            match oldest {
                Some(gone) => gone.remove_log(&self.logs),
                // Only running ones are left: the one that has just written pays.
                None if self.logs.drop_oldest(written) => {}
                None => return,
            }
        }
        if lock(&written.output).has_ended() {
            self.trim_memory();
        }
    }

    /// Lets go of what ended processes keep in memory beyond the bound, oldest first.
    fn trim_memory(&self) {
        let state = lock(&self.state);
        let mut kept = 0_u64;
        for process in state.ended.iter().rev() {
            if let Some(process) = state.processes.get(process) {
                let mut output = lock(&process.output);
                kept = kept.saturating_add(output.unlogged());
                if kept > MAX_UNLOGGED {
                    output.forget();
                }
            }
        }
    }
}

/// A process that nobody can find any more.
pub(crate) struct Gone {
    process: Option<Arc<Process>>,
    files: Vec<(PathBuf, u64)>,
}

impl Gone {
    /// Outside of the registry's lock: it waits for the disk.
    pub(crate) fn remove_log(self, logs: &Logs) {
        if let Some(process) = self.process {
            lock(&process.segments).close();
            while logs.drop_oldest(&process) {}
        }
        for (file, size) in self.files {
            // One that the user has removed is gone all the same.
            let _ = std::fs::remove_file(file);
            logs.count_removed(size);
        }
    }
}

fn no_such(id: ProcessId) -> ErrorBody {
    let message = format!("no process with the id {id} is running or remembered");
    ErrorBody::caller(ErrorCode::NoSuchProcess, message)
}

/// Equal requests have equal ones, within one run.
fn fingerprint(request: &StartProcess) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    request.mode.hash(&mut hasher);
    request.command.hash(&mut hasher);
    request.cwd.hash(&mut hasher);
    request.env.hash(&mut hasher);
    request.stdin.hash(&mut hasher);
    request.output.hash(&mut hasher);
    request.user.hash(&mut hasher);
    request.deadline_ms.hash(&mut hasher);
    request.memory_bytes.hash(&mut hasher);
    let size = request.terminal;
    size.map(|size| (size.columns, size.rows)).hash(&mut hasher);
    hasher.finish()
}

/// The logs that an earlier run has left behind, by their names only.
fn read_names(directory: &Path) -> State {
    let mut state = State::default();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let Some(mut name) = entry.file_name().to_str().and_then(Name::parse) else {
            continue;
        };
        name.size = entry.metadata().map_or(0, |about| about.len());
        state.last = state.last.max(name.number);
        state.unread.entry(name.id).or_default().push(name);
        state.order.insert(name.number, name.id);
    }
    // A number that is too high to go on from is no number of ours.
    if state.last > u64::MAX / 2 {
        log::warn(format_args!(
            "event=process_logs_ignored reason=\"bad names\""
        ));
        return State::default();
    }
    state.ended = state.order.values().copied().collect();
    state
}
