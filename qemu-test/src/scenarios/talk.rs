//! Streams to the agent of a VM with the protocol's own messages, for what the client library does
//! not speak yet. Everything goes the way of a client: through the API and the relay.

use std::time::Duration;

use protocol::id::ProcessId;
use protocol::process::{
    CommandMode, OutputGap, OutputMode, ProcessEnd, ProcessEnded, ProcessStarted, StartProcess,
    StdinMode,
};
use protocol::processes::{
    AttachFrom, AttachProcess, OutputReplayed, ProcessAttached, ProcessInfo, WaitProcess,
};
use protocol::vm::{OpenVm, Opened, VmInfo, VmRef};
use protocol::{ErrorBody, ErrorCode, Kind, Message};
use tokio::time::{Instant, sleep};

use super::wire::{PATIENCE, Wire, WireStream};
use super::{Context, Failure, ensure};
use crate::appliance::Appliance;
use crate::vm;

/// A connection of its own whose streams all lead to one VM's agent.
pub(crate) struct Talk<'a> {
    appliance: &'a Appliance,
    wire: Wire,
    vm: VmRef,
}

/// What was read of a process.
#[derive(Debug)]
pub(crate) struct Replay {
    pub(crate) attached: ProcessAttached,
    /// Both outputs in the order of the frames.
    pub(crate) merged: String,
    /// Bytes that were said to be missing.
    pub(crate) missing: u64,
    /// The end of the process, or the offset to go on from.
    pub(crate) end: Result<ProcessEnded, u64>,
}

impl<'a> Talk<'a> {
    /// Connects as a client of its own.
    pub(crate) async fn with(context: &'a Context, made: &VmInfo) -> Result<Self, Failure> {
        Ok(Self {
            appliance: &context.appliance,
            wire: Wire::let_in(&context.appliance).await?,
            vm: vm::reference(made),
        })
    }

    /// Another client of the same VM.
    pub(crate) async fn another(&self) -> Result<Self, Failure> {
        Ok(Self {
            appliance: self.appliance,
            wire: Wire::let_in(self.appliance).await?,
            vm: self.vm.clone(),
        })
    }

    /// Ends the connection without a word.
    pub(crate) fn vanish(self) {
        self.wire.vanish();
    }

    /// A stream that has begun with `request`.
    pub(crate) async fn begin<Q: Message>(&self, request: &Q) -> Result<WireStream, Failure> {
        let mut stream = self.wire.stream().await?;
        let vm = self.vm.clone();
        stream.send(&OpenVm { vm }).await?;
        stream.message::<Opened>().await?;
        stream.send(request).await?;
        Ok(stream)
    }

    /// One request and its one answer.
    pub(crate) async fn ask<Q: Message, A: Message>(&self, request: &Q) -> Result<A, Failure> {
        let mut stream = self.begin(request).await?;
        let answer = stream.message().await?;
        nothing_follows(&mut stream).await?;
        Ok(answer)
    }

    /// One request that must be refused with `code`.
    pub(crate) async fn refused<Q: Message>(
        &self,
        request: &Q,
        code: ErrorCode,
    ) -> Result<ErrorBody, Failure> {
        let error = self.begin(request).await?.error().await?;
        is(&error, code)?;
        Ok(error)
    }

    /// Runs a shell line that must succeed and gives its output without the last line end.
    pub(crate) async fn shell(&self, line: &str) -> Result<String, Failure> {
        let (said, ended) = follow(&mut self.begin(&shell(line)?).await?).await?;
        ensure(
            ended.end == ProcessEnd::Exited && ended.exit_code == 0,
            || format!("`{line}`: {said:?}, {ended:?}"),
        )?;
        Ok(said.trim_end().to_owned())
    }

    /// Starts what nobody follows.
    pub(crate) async fn start_log(&self, request: &StartProcess) -> Result<ProcessId, Failure> {
        let request = StartProcess {
            output: OutputMode::Log,
            ..request.clone()
        };
        self.ask::<_, ProcessStarted>(&request).await?;
        Ok(request.id)
    }

    /// What is known of a process now.
    pub(crate) async fn look(&self, id: ProcessId) -> Result<ProcessInfo, Failure> {
        let timeout_ms = Some(0);
        self.ask(&WaitProcess { id, timeout_ms }).await
    }

    /// Waits for a process's end.
    pub(crate) async fn wait(&self, id: ProcessId) -> Result<ProcessEnded, Failure> {
        let timeout_ms = Some(50_000);
        let info: ProcessInfo = self.ask(&WaitProcess { id, timeout_ms }).await?;
        info.ended
            .ok_or_else(|| Failure::new(format!("{id} still runs")))
    }

    /// Waits until so many bytes of output are there.
    pub(crate) async fn until_said(&self, id: ProcessId, bytes: u64) -> Result<(), Failure> {
        eventually("the process has said enough", async || {
            Ok(self.look(id).await?.bytes >= bytes)
        })
        .await
    }

    /// Reads a process's output to the last frame.
    pub(crate) async fn replay(
        &self,
        id: ProcessId,
        from: AttachFrom,
        value: u64,
    ) -> Result<Replay, Failure> {
        let follow = false;
        let request = AttachProcess {
            id,
            from,
            value,
            follow,
        };
        replay(&mut self.begin(&request).await?).await
    }
}

/// Reads an attach to its last frame.
pub(crate) async fn replay(stream: &mut WireStream) -> Result<Replay, Failure> {
    let attached = stream.message().await?;
    let (mut merged, mut missing) = (Vec::new(), 0);
    let end = loop {
        let frame = stream.frame().await?;
        let frame = frame.ok_or_else(|| Failure::new("the replay ended without a last frame"))?;
        match frame.kind {
            Kind::STDOUT | Kind::STDERR => merged.extend_from_slice(&frame.body),
            Kind::OUTPUT_GAP => missing += protocol::decode::<OutputGap>(&frame)?.bytes,
            Kind::OUTPUT_REPLAYED => {
                break Err(protocol::decode::<OutputReplayed>(&frame)?.offset);
            }
            _ => break Ok(protocol::decode(&frame)?),
        }
    };
    nothing_follows(stream).await?;
    Ok(Replay {
        attached,
        merged: String::from_utf8_lossy(&merged).into_owned(),
        missing,
        end,
    })
}

/// Reads a start that is followed to its last frame: what was said after `PROCESS_STARTED`, and the
/// end.
pub(crate) async fn follow(stream: &mut WireStream) -> Result<(String, ProcessEnded), Failure> {
    let mut merged = Vec::new();
    let ended = loop {
        let frame = stream.frame().await?;
        let frame = frame.ok_or_else(|| Failure::new("the output ended without a last frame"))?;
        match frame.kind {
            Kind::PROCESS_STARTED => {}
            Kind::STDOUT | Kind::STDERR => merged.extend_from_slice(&frame.body),
            _ => break protocol::decode(&frame)?,
        }
    };
    nothing_follows(stream).await?;
    Ok((String::from_utf8_lossy(&merged).into_owned(), ended))
}

/// Reads output until `text` was said.
pub(crate) async fn until(stream: &mut WireStream, text: &str) -> Result<String, Failure> {
    let mut seen = String::new();
    while !seen.contains(text) {
        match stream.frame().await? {
            Some(frame) if frame.kind == Kind::PROCESS_STARTED => {}
            Some(frame) if matches!(frame.kind, Kind::STDOUT | Kind::STDERR) => {
                seen.push_str(&String::from_utf8_lossy(&frame.body));
            }
            other => {
                let reason = format!("{other:?} instead of {text:?}, after {seen:?}");
                return Err(Failure::new(reason));
            }
        }
    }
    Ok(seen)
}

/// Fails unless the stream has ended.
pub(crate) async fn nothing_follows(stream: &mut WireStream) -> Result<(), Failure> {
    let frame = stream.frame().await?;
    ensure(frame.is_none(), || {
        format!("{frame:?} follows the last frame")
    })
}

/// Fails unless the error has this code, and words for a person.
pub(crate) fn is(error: &ErrorBody, code: ErrorCode) -> Result<(), Failure> {
    ensure(error.code == code && !error.message.is_empty(), || {
        format!("expected {code:?}, got {error:?}")
    })
}

/// Asks again until it is so; for what another process does and no event tells.
pub(crate) async fn eventually(
    what: &str,
    mut holds: impl AsyncFnMut() -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await? {
        ensure(Instant::now() < deadline, || format!("never: {what}"))?;
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Names the part of a scenario that failed.
pub(crate) async fn part<T>(
    name: &str,
    played: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    played
        .await
        .map_err(|failure| Failure::new(format!("{name}: {failure}")))
}

/// A line for `sh -c`.
pub(crate) fn shell(line: &str) -> Result<StartProcess, Failure> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    Ok(StartProcess {
        id: ProcessId(id),
        mode: CommandMode::Shell,
        command: vec![line.into()],
        cwd: Vec::new(),
        env: Vec::new(),
        stdin: StdinMode::Null,
        output: OutputMode::Follow,
        user: Vec::new(),
        deadline_ms: None,
        memory_bytes: None,
        terminal: None,
    })
}
