//! The end of a run: processes are asked, then ended; the disk is made safe; the machine goes off.
//! Works through even when nothing answers any more: every step has a deadline.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::agent::{PowerOff, PoweringOff};

use super::stream::{Stream, StreamError};
use super::{Agent, Machine};
use crate::boot::shutdown;
use crate::log;

/// The longest grace that is granted.
const MAX_GRACE: Duration = Duration::from_secs(600);
/// How long killed processes may take to go; longer ones wait for hardware that does not answer.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// How long the output of processes that have gone may take to reach its log: longer than others may
/// hold it open. The same again for writing it.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Answers, then powers off.
pub(crate) fn answer(
    agent: &Arc<Agent>,
    request: &PowerOff,
    stream: Stream,
) -> Result<(), StreamError> {
    let answered = stream.finish(&PoweringOff {});
    power_off(agent, Duration::from_millis(u64::from(request.grace_ms)));
    answered
}

/// Ends all processes and the machine, or the agent on a borrowed one. Returns only when another
/// thread is at it already.
pub(crate) fn power_off(agent: &Arc<Agent>, grace: Duration) {
    if agent.powering_off.swap(true, Ordering::AcqRel) {
        return;
    }
    log::info(format_args!(
        "event=powering_off grace_ms={}",
        grace.as_millis()
    ));
    signal(agent, Signal::SIGTERM);
    // Interactive shells hear only that their terminal is gone, and who was stopped hears nothing.
    agent.registry.hang_up_terminals(&agent.reaper);
    signal(agent, Signal::SIGCONT);
    if !agent.reaper.wait_for_none(after(grace.min(MAX_GRACE))) {
        signal(agent, Signal::SIGKILL);
        if let Some(groups) = &agent.cgroups {
            groups.kill_all();
        }
        if !agent.reaper.wait_for_none(after(AFTER_KILL)) {
            log::warn(format_args!(
                "event=processes_left reason=\"not ended by SIGKILL\""
            ));
        }
    }
    // Their last words are still on the way from the pipes to the log.
    let left = agent.registry.settle(after(LAST_WORDS));
    if left > 0 {
        log::warn(format_args!("event=ends_unseen processes={left}"));
    }
    agent.registry.logs.flush(after(LAST_WORDS));
    match agent.machine {
        Machine::Own => shutdown::disks_and_power(),
        Machine::Borrowed => std::process::exit(0),
    }
}

fn after(duration: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(duration).unwrap_or(now)
}

fn signal(agent: &Agent, signal: Signal) {
    match agent.machine {
        // Everybody but process 1, which this is. That nobody is left to be signalled is no error.
        Machine::Own => drop(kill(Pid::from_raw(-1), signal)),
        Machine::Borrowed => agent.reaper.signal_all(signal as i32),
    }
}
