//! How a run ended: from a monitor's exit to a reason that the VM's owner can read.

use std::sync::Arc;
use std::time::Duration;

use protocol::host::supervisor::Run;
use protocol::host::vmm::Ending;
use protocol::vm::EndReason;

use super::super::supervisor_client::{Ended, Exit, wait_end};
use super::Host;

/// How long a monitor that was killed may take to be gone.
pub(crate) const KILL: Duration = Duration::from_secs(10);

/// What control had asked of the VM when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Nothing.
    Nothing,
    /// To power off.
    Stop,
    /// Control switched it off because its deadline had passed or it could not be asked.
    SwitchOff,
    /// The host goes down.
    HostDown,
}

/// The reason and the sentence for an exit.
pub(crate) fn describe(exit: Exit, asked: Asked) -> (EndReason, String) {
    let code = match exit {
        Exit::Code(code) => code,
        Exit::Signal(_) if asked == Asked::SwitchOff => {
            return (EndReason::Killed, "it was switched off".into());
        }
        Exit::Signal(_) if asked == Asked::HostDown => {
            return (EndReason::HostRestarted, "the host went down".into());
        }
        Exit::Signal(signal) => {
            return (
                EndReason::MonitorFailed,
                format!("its monitor was ended by signal {signal}; the VM can be started again"),
            );
        }
    };
    let (reason, message) = match Ending::from_wire(code) {
        Ending::PoweredOff if asked == Asked::Nothing => {
            (EndReason::PoweredOff, "it powered itself off")
        }
        Ending::PoweredOff | Ending::SwitchedOff if asked == Asked::HostDown => {
            (EndReason::HostRestarted, "the host went down")
        }
        Ending::PoweredOff => (EndReason::Stopped, "it was stopped by request"),
        Ending::Reset if asked == Asked::Nothing => (EndReason::Rebooted, "it rebooted itself"),
        Ending::Reset => (EndReason::Stopped, "it was stopped by request"),
        Ending::GuestPanic => (
            EndReason::GuestPanic,
            "its kernel panicked; the end of its console says why",
        ),
        Ending::TripleFault => (
            EndReason::TripleFault,
            "its CPU shut down after a triple fault",
        ),
        Ending::SwitchedOff => (EndReason::Killed, "it was switched off"),
        Ending::DeviceFault => (
            EndReason::DeviceFault,
            "it broke the rules of a device; the end of its console says which",
        ),
        Ending::Failed => (
            EndReason::MonitorFailed,
            "its monitor could not run it; the end of its console says why",
        ),
        _ => {
            return (
                EndReason::MonitorFailed,
                format!("its monitor failed with exit code {code}; the VM can be started again"),
            );
        }
    };
    (reason, message.into())
}

/// Ends a run that nobody wants any more, and its socket with it. Says whether it is gone.
pub(crate) async fn give_up_run(host: &Arc<Host>, run: &Run, ended: &mut Ended) -> bool {
    let gone = end_run(host, run, ended).await;
    if gone {
        let _ = std::fs::remove_file(host.socket(&run.vm));
    }
    gone
}

/// Ends a run that nobody wants any more and makes init forget it. Says whether it is gone.
pub(crate) async fn end_run(host: &Arc<Host>, run: &Run, ended: &mut Ended) -> bool {
    if ended.borrow().is_none() {
        if let Err(error) = host.supervisor.kill(run).await {
            tracing::error!(vm = %run.vm, %error, "cannot end a monitor");
        }
        if tokio::time::timeout(KILL, wait_end(ended)).await.is_err() {
            tracing::error!(vm = %run.vm, generation = run.generation, "a monitor does not end");
            return false;
        }
    }
    forget(host, run).await;
    true
}

/// Makes init forget a run whose end is written down, and removes its socket.
pub(crate) async fn forget_run(host: &Arc<Host>, run: &Run) {
    forget(host, run).await;
    let _ = std::fs::remove_file(host.socket(&run.vm));
}

async fn forget(host: &Arc<Host>, run: &Run) {
    host.frames.down(run);
    if let Err(error) = host.supervisor.forget(run).await {
        tracing::error!(vm = %run.vm, %error, "cannot tell init to forget a run");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ending_has_its_own_reason() {
        let code = |ending: Ending| Exit::Code(ending.to_wire());
        for (exit, asked, reason) in [
            (
                code(Ending::PoweredOff),
                Asked::Nothing,
                EndReason::PoweredOff,
            ),
            (code(Ending::PoweredOff), Asked::Stop, EndReason::Stopped),
            (
                code(Ending::PoweredOff),
                Asked::HostDown,
                EndReason::HostRestarted,
            ),
            (code(Ending::Reset), Asked::Nothing, EndReason::Rebooted),
            (code(Ending::Reset), Asked::Stop, EndReason::Stopped),
            (
                code(Ending::GuestPanic),
                Asked::Nothing,
                EndReason::GuestPanic,
            ),
            (code(Ending::GuestPanic), Asked::Stop, EndReason::GuestPanic),
            (
                code(Ending::TripleFault),
                Asked::Nothing,
                EndReason::TripleFault,
            ),
            (
                code(Ending::SwitchedOff),
                Asked::SwitchOff,
                EndReason::Killed,
            ),
            (
                code(Ending::DeviceFault),
                Asked::Nothing,
                EndReason::DeviceFault,
            ),
            (
                code(Ending::Failed),
                Asked::Nothing,
                EndReason::MonitorFailed,
            ),
            (Exit::Code(99), Asked::Nothing, EndReason::MonitorFailed),
            (Exit::Signal(9), Asked::Nothing, EndReason::MonitorFailed),
            (Exit::Signal(9), Asked::SwitchOff, EndReason::Killed),
        ] {
            let (found, message) = describe(exit, asked);
            assert_eq!(found, reason, "{exit:?} {asked:?}");
            assert!(!message.is_empty());
        }
        assert!(
            describe(Exit::Signal(11), Asked::Nothing)
                .1
                .contains("signal 11")
        );
        assert!(describe(Exit::Code(99), Asked::Nothing).1.contains("99"));
    }
}
