//! The monitors: started as control asks, watched by pidfd, their ends kept until control has
//! written them down. What control sends is checked; nothing it says may stop the supervisor.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use protocol::host::supervisor::{Run, SpawnVmm, VmmEnded};

use super::Shared;
use super::cgroup::Group;
use super::confinement::Confinement;
use super::spawn::{Child, End, Program, Spawn, SpawnError};

/// Most runs that are known at the same time, ended ones included.
const MOST: usize = 4096;
/// Open descriptors of one monitor: its streams into the guest, its devices, and some.
const MAX_DESCRIPTORS: u64 = 4096;
/// Ids below this belong to the host.
const LOWEST_UID: u32 = 100_000;
/// Keeps a monitor's allocator from memory in large pieces, which the kernel may back with huge pages,
/// one for each thread: it needs little beyond its guest's memory, and there are many of it.
const LITTLE_MEMORY: [(&str, &str); 2] = [
    ("MIMALLOC_ARENA_EAGER_COMMIT", "0"),
    ("MIMALLOC_EAGER_COMMIT", "0"),
];

/// Why a monitor was not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum VmmError {
    /// This VM has a monitor, or one whose end control has not taken note of.
    #[error("VM {vm} has a monitor already (run {generation}); kill and forget it first", vm = .0.vm, generation = .0.generation)]
    Exists(Run),
    /// Too many.
    #[error("{MOST} monitors are known already; forget those that have ended")]
    TooMany,
    /// Names and descriptors do not match.
    #[error("{names} descriptor names came with {descriptors} descriptors")]
    Unmatched {
        /// How many names.
        names: usize,
        /// How many descriptors.
        descriptors: usize,
    },
    /// A user that is not a VM's.
    #[error("user id {0} is not for a monitor; it must be zero or at least {LOWEST_UID}")]
    Uid(u32),
    /// No control group where there should be one.
    #[error("cannot make the control group: {0}")]
    Group(std::io::Error),
    /// It did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

#[derive(Debug)]
enum State {
    Running { child: Child, group: Option<Group> },
    Ended(End),
}

/// All monitors by run.
#[derive(Debug, Default)]
pub(super) struct Vmms {
    runs: BTreeMap<Run, State>,
}

impl Vmms {
    /// Starts a monitor and gives its process id.
    pub(super) fn spawn(
        &mut self,
        program: &Program,
        shared: &Shared,
        request: &SpawnVmm,
        descriptors: &[OwnedFd],
    ) -> Result<u32, VmmError> {
        if self.runs.len() >= MOST {
            return Err(VmmError::TooMany);
        }
        if let Some(run) = self.run_of(&request.run) {
            return Err(VmmError::Exists(run.clone()));
        }
        if request.descriptors.len() != descriptors.len() {
            return Err(VmmError::Unmatched {
                names: request.descriptors.len(),
                descriptors: descriptors.len(),
            });
        }
        if request.uid != 0 && request.uid < LOWEST_UID {
            return Err(VmmError::Uid(request.uid));
        }
        let groups = shared.prison.groups.as_ref();
        let group = groups
            .map(|groups| groups.group(&request.run.vm, request.memory_max))
            .transpose()
            .map_err(VmmError::Group)?;
        let named: Vec<(&str, BorrowedFd<'_>)> = request
            .descriptors
            .iter()
            .map(|name| name.as_str())
            .zip(descriptors.iter().map(AsFd::as_fd))
            .collect();
        let mut environment = shared.environment.clone();
        let little = LITTLE_MEMORY.map(|(name, value)| (name.to_owned(), value.to_owned()));
        environment.extend(little);
        let started = Spawn {
            program,
            descriptors: &named,
            environment: &environment,
            confinement: Confinement {
                uid: if shared.prison.privileged {
                    request.uid
                } else {
                    0
                },
                capability: None,
                network: shared.prison.network.as_ref().map(AsFd::as_fd),
                root: shared.prison.root.as_deref(),
                cgroup: group.as_ref().map(|group| group.join.as_fd()),
                max_descriptors: MAX_DESCRIPTORS,
                no_new_privileges: true,
            },
            terminal: None,
        }
        .start();
        match started {
            Ok(child) => {
                let pid = child.pid().as_raw().unsigned_abs();
                let state = State::Running { child, group };
                self.runs.insert(request.run.clone(), state);
                Ok(pid)
            }
            Err(error) => {
                remove(group, &request.run);
                Err(error.into())
            }
        }
    }

    /// A run of the same VM with a monitor that is not forgotten: another generation that has
    /// ended does not count.
    fn run_of(&self, run: &Run) -> Option<&Run> {
        let same_vm = self.runs.iter().filter(|(other, _)| other.vm == run.vm);
        same_vm
            .filter(|(other, state)| *other == run || matches!(state, State::Running { .. }))
            .map(|(other, _)| other)
            .next()
    }

    /// Ends a monitor, if it runs.
    pub(super) fn kill(&self, run: &Run) {
        if let Some(State::Running { child, .. }) = self.runs.get(run) {
            child.signal(Signal::SIGKILL);
        }
    }

    /// Ends all.
    pub(super) fn kill_all(&self) {
        self.runs.keys().for_each(|run| self.kill(run));
    }

    /// Forgets how a run ended; one that runs cannot be forgotten.
    pub(super) fn forget(&mut self, run: &Run) {
        if matches!(self.runs.get(run), Some(State::Ended(_))) {
            self.runs.remove(run);
        }
    }

    /// The descriptors that tell when a monitor has ended.
    pub(super) fn watched(&self) -> impl Iterator<Item = (&Run, BorrowedFd<'_>)> {
        self.runs.iter().filter_map(|(run, state)| match state {
            State::Running { child, .. } => Some((run, child.pidfd())),
            State::Ended(_) => None,
        })
    }

    /// Whether one runs.
    pub(super) fn any_running(&self) -> bool {
        self.watched().next().is_some()
    }

    /// Looks whether a monitor has ended, and keeps how.
    pub(super) fn look_at(&mut self, run: &Run) -> Option<VmmEnded> {
        let State::Running { child, group } = self.runs.get_mut(run)? else {
            return None;
        };
        let end = child.ended()?;
        remove(group.take(), run);
        self.runs.insert(run.clone(), State::Ended(end));
        Some(told(run, end))
    }

    /// The runs that go on, with their process ids.
    pub(super) fn running(&self) -> Vec<(Run, u32)> {
        let listed = self.runs.iter().filter_map(|(run, state)| match state {
            State::Running { child, .. } => {
                Some((run.clone(), child.pid().as_raw().unsigned_abs()))
            }
            State::Ended(_) => None,
        });
        listed.collect()
    }

    /// The ends that nobody has forgotten.
    pub(super) fn ends(&self) -> Vec<VmmEnded> {
        let ends = self.runs.iter().filter_map(|(run, state)| match state {
            State::Ended(end) => Some(told(run, *end)),
            State::Running { .. } => None,
        });
        ends.collect()
    }
}

fn told(run: &Run, end: End) -> VmmEnded {
    VmmEnded {
        run: run.clone(),
        exit_code: end.exit_code(),
        signal: end.signal(),
    }
}

fn remove(group: Option<Group>, run: &Run) {
    if let Some(Err(error)) = group.map(Group::remove) {
        tracing::warn!(vm = %run.vm, %error, "control group not removed");
    }
}
