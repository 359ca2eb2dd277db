//! One process as everybody sees it: who asks about it, reads it, writes to it or ends it holds this,
//! and none of them depends on the stream that started it. Only its [pump](super::pump) changes its
//! phase.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::eventfd::EventFd;
use protocol::id::ProcessId;
use protocol::process::{CommandMode, OutputMode, ProcessEnd, ProcessEnded, StartProcess};
use protocol::processes::{MAX_SHOWN_COMMAND, ProcessInfo};

use super::ending;
use super::input::Stdin;
use super::output::{Output, Phase};
use super::segment::{Recovered, Segments};
use crate::agent::lock;
use crate::cgroup::CommandGroup;
use crate::reaper::{Child, Reaper};

/// What is known before it runs.
pub(crate) struct About {
    pub(crate) mode: CommandMode,
    pub(crate) command: Vec<Vec<u8>>,
    pub(crate) output: OutputMode,
    pub(crate) terminal: bool,
    pub(crate) started_unix_ms: u64,
    /// Tells a repeated start from another one with the same id; unknown after a restart.
    pub(crate) fingerprint: Option<u64>,
}

impl About {
    pub(crate) fn of(request: &StartProcess, fingerprint: u64) -> Self {
        let mut room = MAX_SHOWN_COMMAND;
        let mut command = Vec::new();
        for word in &request.command {
            if room == 0 {
                break;
            }
            let shown = word.get(..room.min(word.len())).unwrap_or_default();
            // A word costs its length too, so that a million empty ones are not kept.
            room = room.saturating_sub(shown.len().saturating_add(1));
            command.push(shown.to_vec());
        }
        Self {
            mode: request.mode,
            command,
            output: request.output,
            terminal: request.terminal.is_some(),
            started_unix_ms: unix_ms(),
            fingerprint: Some(fingerprint),
        }
    }
}

/// What exists while it runs.
pub(crate) struct Body {
    pub(crate) child: Arc<Child>,
    pub(crate) group: Option<Arc<CommandGroup>>,
    /// Wakes the pump.
    pub(crate) wake: EventFd,
}

impl Body {
    /// Somebody is about to end it.
    pub(crate) fn expect_end(&self) {
        if let Some(group) = &self.group {
            group.expect_end();
        }
    }
}

/// See the module.
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    pub(crate) number: u64,
    pub(crate) about: About,
    pub(crate) pid: OnceLock<u32>,
    /// Gone again when it has ended.
    body: Mutex<Option<Arc<Body>>>,
    pub(crate) stdin: Stdin,
    pub(crate) output: Mutex<Output>,
    pub(crate) segments: Mutex<Segments>,
    /// A client asked for its end.
    pub(crate) killed: AtomicBool,
}

impl Process {
    pub(crate) fn new(id: ProcessId, number: u64, about: About, has_log: bool) -> Self {
        let holds = about.output == OutputMode::Follow;
        Self {
            id,
            number,
            about,
            pid: OnceLock::new(),
            body: Mutex::default(),
            stdin: Stdin::default(),
            output: Mutex::new(Output::new(holds, has_log)),
            segments: Mutex::default(),
            killed: AtomicBool::new(false),
        }
    }

    /// One that an earlier run of the machine has left a log of.
    pub(crate) fn recovered(id: ProcessId, found: Recovered) -> Self {
        let Recovered {
            info,
            has_ended,
            segments,
        } = found;
        let head = segments.list.back().map_or(0, |last| last.end);
        let how = match info.ended {
            Some(how) if has_ended && how.end != ProcessEnd::Lost => how,
            _ => ending::lost("VM was restarted"),
        };
        let phase = Phase::Ended {
            how,
            unix_ms: info.ended_unix_ms,
        };
        let about = About {
            mode: info.mode,
            command: info.command,
            output: info.output,
            terminal: info.terminal,
            started_unix_ms: info.started_unix_ms,
            fingerprint: None,
        };
        let dropped = head.saturating_sub(segments.bytes());
        // One that has ended without a number was never started; one that was lost may have run.
        let pid = match info.pid {
            0 if has_ended => OnceLock::new(),
            pid => OnceLock::from(pid),
        };
        Self {
            output: Mutex::new(Output::past(phase, head, dropped)),
            segments: Mutex::new(segments),
            pid,
            ..Self::new(id, info.number, about, true)
        }
    }

    /// There is a child, which is to become the program.
    pub(crate) fn embody(&self, body: Body) -> Arc<Body> {
        let body = Arc::new(body);
        *lock(&self.body) = Some(Arc::clone(&body));
        lock(&self.output).notify();
        body
    }

    /// The child has become the program.
    pub(crate) fn set_running(&self) {
        if let Some(body) = self.body() {
            // Set once: a process is started once.
            let _ = self.pid.set(body.child.pid.unsigned_abs());
        }
        let mut output = lock(&self.output);
        output.phase = Phase::Running;
        output.notify();
    }

    /// It has ended, or never ran.
    pub(crate) fn set_ended(&self, how: ProcessEnded) {
        let mut output = lock(&self.output);
        output.phase = Phase::Ended {
            how,
            unix_ms: unix_ms(),
        };
        output.notify();
    }

    /// Nobody knows yet whether it will run.
    pub(crate) fn is_starting(&self) -> bool {
        matches!(lock(&self.output).phase, Phase::Starting)
    }

    /// It was not to be started after all, and whoever found it before that has found nothing.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(lock(&self.output).phase, Phase::Refused)
    }

    /// The child and its group, while the process runs.
    pub(crate) fn body(&self) -> Option<Arc<Body>> {
        lock(&self.body).clone()
    }

    /// Lets go of the child and its group. The group goes away with its last process.
    pub(crate) fn bury(&self) -> Option<Arc<Body>> {
        lock(&self.body).take()
    }

    pub(crate) fn ended(&self) -> Option<ProcessEnded> {
        match &lock(&self.output).phase {
            Phase::Ended { how, .. } => Some(how.clone()),
            Phase::Starting | Phase::Refused | Phase::Running => None,
        }
    }

    pub(crate) fn info(&self) -> ProcessInfo {
        let output = lock(&self.output);
        let (ended, ended_unix_ms) = match &output.phase {
            Phase::Ended { how, unix_ms } => (Some(how.clone()), *unix_ms),
            Phase::Starting | Phase::Refused | Phase::Running => (None, 0),
        };
        ProcessInfo {
            id: self.id,
            number: self.number,
            pid: self.pid.get().copied().unwrap_or(0),
            mode: self.about.mode,
            command: self.about.command.clone(),
            output: self.about.output,
            terminal: self.about.terminal,
            started_unix_ms: self.about.started_unix_ms,
            ended_unix_ms,
            ended,
            bytes: output.head(),
            dropped: output.dropped,
        }
    }

    /// Wakes the pump if it waits for room and there is some.
    pub(crate) fn wake_pump_if_held(&self) {
        let mut output = lock(&self.output);
        if output.pump_held && output.room() > 0 {
            output.pump_held = false;
            drop(output);
            if let Some(body) = self.body() {
                // The counter cannot overflow: it is written once per wait.
                let _ = body.wake.write(1);
            }
        }
    }

    /// Signals the group that the process leads. Says whether it still runs.
    pub(crate) fn signal(&self, reaper: &Reaper, signal: u8) -> bool {
        let Some(body) = self.body() else {
            return false;
        };
        let ends = [libc::SIGTERM, libc::SIGKILL].contains(&i32::from(signal));
        if ends && body.child.status().is_none() {
            body.expect_end();
        }
        let sent = reaper.signal_group(&body.child, signal);
        // SIGKILL is no request that a child could have been shielded from by a group of its own,
        // or by the main process's having ended before it.
        if i32::from(signal) == libc::SIGKILL
            && let Some(group) = &body.group
        {
            group.kill();
            return true;
        }
        sent
    }

    /// The descriptor of its terminal, while there is one.
    pub(crate) fn terminal(&self) -> Option<Arc<OwnedFd>> {
        self.about
            .terminal
            .then(|| self.stdin.descriptor())
            .flatten()
    }

    pub(crate) fn mark_killed(&self) {
        self.killed.store(true, Ordering::Release);
    }
}

pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|passed| u64::try_from(passed.as_millis()).ok())
        .unwrap_or(0)
}
