//! Processes by their ids: they belong to no stream and no connection, so whoever knows an id can
//! read, write, wait, signal and kill.

use std::time::Duration;

use protocol::frame::MAX_DATA;
use protocol::id::ProcessId;
use protocol::process::OutputMode;
use protocol::processes::{
    KillProcess, ListProcesses, ProcessInfo, ProcessPage, ProcessRemoved, RemoveProcess,
    SendSignal, StdinWritten, WaitProcess, WriteStdin,
};
use protocol::{ErrorCode, Frame, Kind};

use crate::agent::{Requests, converse, out_of_order};
use crate::command::Command;
use crate::error::ClientError;
use crate::exec::REPEATS;
use crate::follow::Follow;
use crate::output::{Output, ReadFrom, Utf8Decoder};
use crate::vm::{Repeat, Vm};

/// The most processes that [`Vm::processes`] takes; an agent looks after fewer.
const MOST_PROCESSES: usize = 100_000;
/// The most of our memory that a list of them may take, and one of them.
const MOST_LISTED: usize = 64 << 20;
const MOST_OF_ONE: usize = 64 << 10;

impl Vm {
    /// Starts a command that nobody has to follow: it is never held back, and its output is kept,
    /// the last 64 MiB of it. One that could not be started has ended at once, as
    /// [`Process::info`] tells.
    pub async fn start(&self, command: Command) -> Result<Process, ClientError> {
        let repeat = command.repeat();
        let request = command.into_request(OutputMode::Log)?;
        let mut left = REPEATS;
        let frame = loop {
            let started = async {
                let (mut replies, _requests) = self.begin(&request).await?;
                replies.next().await
            };
            match started.await {
                Ok(frame) => break frame,
                Err(ClientError::Lost { .. }) if left > 0 => left = left.saturating_sub(1),
                Err(error) => return Err(repeat.mark(error)),
            }
        };
        match frame.kind {
            Kind::PROCESS_STARTED | Kind::PROCESS_ENDED => Ok(self.process(request.id)),
            _ => Err(out_of_order(&frame)),
        }
    }

    /// A process by its id. Nothing is asked yet.
    pub fn process(&self, id: ProcessId) -> Process {
        Process {
            vm: self.clone(),
            id,
        }
    }

    /// What runs and what ended lately, in the order of the starts.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, ClientError> {
        let mut all: Vec<ProcessInfo> = Vec::new();
        let mut held: usize = 0;
        loop {
            let after = all.last().map_or(0, |last| last.number);
            let page: ProcessPage = self.ask(&ListProcesses { after }, Repeat::Safe).await?;
            held = held.saturating_add(check(after, &page)?);
            if held > MOST_LISTED || all.len() > MOST_PROCESSES {
                return Err(ClientError::Broken(
                    "the list of processes is longer than can be".into(),
                ));
            }
            all.extend(page.processes);
            if !page.more {
                return Ok(all);
            }
        }
    }
}

/// Refuses what an agent never says; gives how much memory the page takes.
fn check(after: u64, page: &ProcessPage) -> Result<usize, ClientError> {
    let numbers = std::iter::once(after).chain(page.processes.iter().map(|one| one.number));
    // An agent that turns in circles would keep us here for ever.
    if !numbers.is_sorted_by(|one, next| one < next) || (page.more && page.processes.is_empty()) {
        return Err(ClientError::Broken(
            "the list of processes is not in order".into(),
        ));
    }
    let mut total: usize = 0;
    for one in &page.processes {
        let texts = one.command.iter().map(Vec::len);
        let said = one.ended.as_ref().map_or(0, |ended| ended.message.len());
        let weight = texts.fold(size_of::<ProcessInfo>(), |sum, length| {
            sum.saturating_add(length)
                .saturating_add(size_of::<Vec<u8>>())
        });
        let weight = weight.saturating_add(said);
        if weight > MOST_OF_ONE {
            return Err(ClientError::Broken(format!(
                "what the agent says of process {} takes {weight} bytes, more than can be",
                one.id
            )));
        }
        total = total.saturating_add(weight);
    }
    Ok(total)
}

/// A process in a VM.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use client::Command;
/// let server = vm.start(Command::shell("npm start")).await?;
/// for line in server.tail(10).await? {
///     println!("{line}");
/// }
/// let ended = server.kill(None).await?;
/// println!("{:?}", ended.ended);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Process {
    vm: Vm,
    id: ProcessId,
}

impl Process {
    /// Its identifier.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// The VM that it is in.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// What is known of it now.
    pub async fn info(&self) -> Result<ProcessInfo, ClientError> {
        self.wait_at_most(Some(0)).await
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Result<ProcessInfo, ClientError> {
        self.wait_at_most(None).await
    }

    /// Waits for its end, but no longer than this; then it may still run.
    pub async fn wait_for(&self, time: Duration) -> Result<ProcessInfo, ClientError> {
        let milliseconds = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        self.wait_at_most(Some(milliseconds)).await
    }

    async fn wait_at_most(&self, timeout_ms: Option<u32>) -> Result<ProcessInfo, ClientError> {
        let id = self.id;
        self.vm
            .ask(&WaitProcess { id, timeout_ms }, Repeat::Safe)
            .await
    }

    /// Reads its output until it ends. While this reader does not read, a process that was started
    /// by [`Vm::exec`] is held back.
    pub async fn follow(&self, from: ReadFrom) -> Result<Follow, ClientError> {
        Follow::begin(self.clone(), from, true).await
    }

    /// Reads what there is of its output now, and no further.
    pub async fn replay(&self, from: ReadFrom) -> Result<Follow, ClientError> {
        Follow::begin(self.clone(), from, false).await
    }

    /// The last lines of its output without their ends, of the last MiB at most. A last line that
    /// has no end yet counts; what is no UTF-8 becomes U+FFFD.
    pub async fn tail(&self, lines: u32) -> Result<Vec<String>, ClientError> {
        if lines == 0 {
            return Ok(Vec::new());
        }
        let mut reader = self.replay(ReadFrom::LastLines(lines.into())).await?;
        let (mut out, mut err) = (Utf8Decoder::default(), Utf8Decoder::default());
        let mut text = String::new();
        while let Some(record) = reader.next().await? {
            match record.output {
                Output::Stdout(bytes) => text += &out.push(&bytes),
                Output::Stderr(bytes) => text += &err.push(&bytes),
                _ => {}
            }
            // The agent goes back no further than 1 MiB; U+FFFD is longer than what it stands for.
            if text.len() > 4 << 20 {
                return Err(ClientError::Broken(
                    "the agent sent more than the last lines".into(),
                ));
            }
        }
        text += &out.finish();
        text += &err.finish();
        // A line ends with a line feed, or as on a terminal with a carriage return before it.
        let all: Vec<&str> = text.lines().collect();
        let most = usize::try_from(lines).unwrap_or(usize::MAX);
        let first = all.len().saturating_sub(most);
        Ok(all.into_iter().skip(first).map(str::to_owned).collect())
    }

    /// Writes to its standard input, which stays open. Returns when the process's pipe has taken
    /// everything.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<(), ClientError> {
        self.type_in(async |requests: &mut Requests| {
            for chunk in bytes.chunks(MAX_DATA) {
                requests.send_raw(Kind::STDIN, chunk).await?;
            }
            requests.end().await
        })
        .await
    }

    /// Closes its standard input. To close what is closed is no error.
    pub async fn close_stdin(&self) -> Result<(), ClientError> {
        let closed = self
            .type_in(async |requests: &mut Requests| requests.send_raw(Kind::STDIN_END, &[]).await);
        closed.await.map_err(ClientError::repeatable)
    }

    async fn type_in(
        &self,
        saying: impl AsyncFnOnce(&mut Requests) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        let (mut replies, mut requests) = self.vm.begin(&WriteStdin { id: self.id }).await?;
        let saying = saying(&mut requests);
        let answer: Frame = converse(&mut replies, saying, |_| false).await?;
        protocol::decode::<StdinWritten>(&answer)?;
        Ok(())
    }

    /// Sends a signal to its process group, by its number on Linux x86-64.
    pub async fn signal(&self, signal: u8) -> Result<(), ClientError> {
        let id = self.id;
        let request = SendSignal { id, signal };
        self.vm
            .ask::<_, ProcessInfo>(&request, Repeat::Unsafe)
            .await?;
        Ok(())
    }

    /// Ends it and everything it started, politely at first, and returns when it is gone. Without
    /// a grace it has five seconds to end by itself.
    pub async fn kill(&self, grace: Option<Duration>) -> Result<ProcessInfo, ClientError> {
        let grace_ms = grace.map(|time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX));
        let id = self.id;
        self.vm
            .ask(&KillProcess { id, grace_ms }, Repeat::Safe)
            .await
    }

    /// Changes the size of its terminal; without a terminal nothing happens.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), ClientError> {
        let mut reader = self.follow(ReadFrom::Now).await?;
        let input = reader.input();
        let resized = async {
            input.resize(columns, rows).await?;
            // A new size is not answered. What the agent cannot take here is, and in order.
            input.ask_for_an_answer().await
        };
        let mut resized = std::pin::pin!(resized);
        let mut sent = false;
        loop {
            tokio::select! {
                record = reader.next() => match record {
                    Ok(Some(_)) => {}
                    Ok(None) => return Ok(()),
                    Err(error) if error.code() == Some(ErrorCode::Unsupported) => return Ok(()),
                    Err(error) => return Err(error),
                },
                result = &mut resized, if !sent => {
                    result?;
                    sent = true;
                }
            }
        }
    }

    /// Forgets it and its output, once it has ended.
    pub async fn forget(&self) -> Result<(), ClientError> {
        let request = RemoveProcess { id: self.id };
        self.vm
            .ask::<_, ProcessRemoved>(&request, Repeat::Unsafe)
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use protocol::process::{CommandMode, ProcessEnd, ProcessEnded};

    use super::*;

    fn process(number: u64, command: Vec<Vec<u8>>, message: String) -> ProcessInfo {
        ProcessInfo {
            id: ProcessId([7; 16]),
            number,
            pid: 1,
            mode: CommandMode::Argv,
            command,
            output: OutputMode::Log,
            terminal: false,
            started_unix_ms: 1,
            ended_unix_ms: 2,
            ended: Some(ProcessEnded {
                end: ProcessEnd::Exited,
                exit_code: 0,
                signal: 0,
                output_open: false,
                message,
            }),
            bytes: 0,
            dropped: 0,
        }
    }

    #[test]
    fn a_page_of_processes_that_goes_back_or_is_longer_than_can_be_is_refused() {
        let few = |number| process(number, vec![vec![b'x'; 1024]], "killed".into());
        let page = |processes, more| ProcessPage { processes, more };
        assert!(check(3, &page(vec![few(4), few(9)], true)).unwrap() > 2048);
        assert_eq!(check(3, &page(vec![], false)).unwrap(), 0);
        let bad = [
            page(vec![few(3)], false),
            page(vec![few(5), few(4)], false),
            page(vec![], true),
            page(
                vec![process(4, vec![vec![0; 1 << 20]], String::new())],
                false,
            ),
            page(
                vec![process(4, vec![Vec::new(); 1 << 20], String::new())],
                false,
            ),
            page(vec![process(4, Vec::new(), "x".repeat(1 << 20))], false),
        ];
        for page in bad {
            assert!(check(3, &page).is_err(), "{}", page.processes.len());
        }
    }
}
