//! Streams to a running VM's agent. Each attempt is a task of its own with a deadline, so that an
//! agent that does not answer holds up nothing but the request itself.

use std::time::Duration;

use protocol::host::supervisor::Run;
use protocol::{ErrorBody, ErrorCode};
use tokio::time::timeout;

use super::super::monitor::MonitorError;
use super::{Machine, OpenedStream, Reply, internal};

/// How long an agent that was up may take to accept a stream.
const OPEN: Duration = Duration::from_secs(15);

/// Opens a stream to the agent without holding up the VM's task.
pub(super) fn open(machine: &Machine, mut reply: Reply<OpenedStream>) {
    let monitor = machine.monitor.clone();
    let run = machine.run.clone();
    tokio::spawn(async move {
        let opened = tokio::select! {
            () = reply.closed() => return,
            opened = timeout(OPEN, monitor.open(true)) => opened,
        };
        let answer = match opened {
            Ok(Ok(stream)) => Ok(OpenedStream {
                stream,
                generation: run.generation,
            }),
            Ok(Err(error)) => Err(open_error(&run, &error)),
            Err(_) => Err(ErrorBody::guest(
                ErrorCode::AgentUnreachable,
                format!(
                    "the agent of {} did not accept a connection within {} s; stop the VM and start it again",
                    run.vm,
                    OPEN.as_secs()
                ),
            )
            .retryable_after_ms(1000)),
        };
        let _ = reply.send(answer);
    });
}

fn open_error(run: &Run, error: &MonitorError) -> ErrorBody {
    match error {
        MonitorError::Gone | MonitorError::Channel(_) => ErrorBody::guest(
            ErrorCode::VmStopped,
            format!("{} ended meanwhile; start it again", run.vm),
        )
        .retryable_after_ms(500),
        MonitorError::TooMany => ErrorBody::caller(ErrorCode::Busy, format!("{}: {error}", run.vm))
            .retryable_after_ms(500),
        MonitorError::Refused(_) => {
            ErrorBody::guest(ErrorCode::AgentUnreachable, format!("{}: {error}", run.vm))
                .retryable_after_ms(1000)
        }
        _ => internal(format!("{}: {error}", run.vm)),
    }
}
