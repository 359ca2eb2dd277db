//! VMs of a real appliance for a patch, by the library. A connection that is lost is made again and
//! what was under way goes on, as far as nothing can happen twice; whoever waits is interrupted.
//! The connection is made when the first VM is asked for.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use protocol::ErrorCode;
use protocol::id::{ProcessId, VmId};
use protocol::process::ProcessEnded;
use protocol::vm::VmRef;
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, watch};

use super::backend::{
    Backend, Command, Content, Program, Record, Records, Sink, Source, UNAUTHENTICATED,
    UNREACHABLE, VmFacts, Whence,
};
use super::output::marker;
use super::{Failure, Interrupt};
use crate::blocking::Own;
use crate::file::{FileRead, FileWrite};
use crate::{
    Client, ClientError, Endpoint, Execution, Follow, Output, Process, ReadFrom, Trust, Vm, new_vm,
};

/// How often in a row something goes on after a lost connection without having come further.
const ATTEMPTS: u32 = 5;

/// How long the end of a command is waited for when nobody wants it any more.
const FAREWELL: Duration = Duration::from_secs(10);

/// Bytes of a download that are taken at once.
const CHUNK: usize = 256 << 10;

/// See the module.
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use client::patch::{Appliance, Backend, Interrupt};
/// let runtime = tokio::runtime::Runtime::new()?;
/// let endpoint = "unix:/run/supvm/api.sock".parse()?;
/// let interrupt = Interrupt::default();
/// let trust = client::Trust::none();
/// let appliance = Appliance::new(runtime.handle().clone(), endpoint, "token".into(), trust, &interrupt);
/// println!("{}", appliance.create()?.url);
/// appliance.close();
/// # Ok(())
/// # }
/// ```
pub struct Appliance {
    runtime: Handle,
    endpoint: Endpoint,
    token: String,
    trust: Trust,
    client: OnceCell<Client>,
    interrupted: Arc<watch::Sender<bool>>,
}

impl Appliance {
    /// Nothing is asked yet. `runtime` has threads of its own: whoever uses this blocks.
    pub fn new(
        runtime: Handle,
        endpoint: Endpoint,
        token: String,
        trust: Trust,
        interrupt: &Interrupt,
    ) -> Self {
        let interrupted = Arc::new(watch::Sender::new(false));
        let set = Arc::clone(&interrupted);
        interrupt.on_set(move || {
            set.send_replace(true);
        });
        Self {
            runtime,
            endpoint,
            token,
            trust,
            client: OnceCell::new(),
            interrupted,
        }
    }

    /// Says goodbye to the appliance.
    pub fn close(&self) {
        if let Some(client) = self.client.get() {
            self.runtime.block_on(client.clone().close());
        }
    }

    /// Waits for the work's end or the interrupt.
    fn wait<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        wait(&self.runtime, &self.interrupted, work)
    }

    async fn client(&self) -> Result<&Client, Failure> {
        let connect = || {
            Client::connect(
                self.endpoint.clone(),
                self.token.clone(),
                self.trust.clone(),
            )
        };
        self.client.get_or_try_init(connect).await.map_err(failure)
    }

    async fn vm(&self, vm: &VmId) -> Result<Vm, Failure> {
        Ok(self.client().await?.vm(VmRef::Id(vm.clone())))
    }

    async fn process(&self, vm: &VmId, id: ProcessId) -> Result<Process, Failure> {
        Ok(self.vm(vm).await?.process(id))
    }

    /// Ends a command whose output nobody wants any more. It may be gone already.
    fn give_up(&self, vm: &VmId, id: ProcessId) {
        let killed = async {
            self.process(vm, id)
                .await?
                .kill(None)
                .await
                .map_err(failure)
        };
        let killed = async { tokio::time::timeout(FAREWELL, killed).await };
        let _ = self.runtime.block_on(killed);
    }
}

fn wait<T>(
    runtime: &Handle,
    interrupted: &watch::Sender<bool>,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut interrupted = interrupted.subscribe();
    runtime.block_on(async {
        tokio::select! {
            biased;
            _ = interrupted.wait_for(|is_set| *is_set) => Err(Failure::Interrupted),
            done = work => done,
        }
    })
}

impl Backend for Appliance {
    fn create(&self) -> Result<VmFacts, Failure> {
        self.wait(async {
            let client = self.client().await?;
            // The request's key makes one VM of all attempts.
            let request = new_vm().map_err(failure)?;
            let made = again(async || client.create(request.clone()).await).await?;
            let url = made.url.to_string();
            Ok(VmFacts { id: made.id, url })
        })
    }

    fn delete(&self, vm: &VmId) -> Result<(), Failure> {
        self.wait(async {
            let client = self.client().await?;
            let deleted = again(async || match client.delete(VmRef::Id(vm.clone())).await {
                Err(error) if error.code() == Some(ErrorCode::VmNotFound) => Ok(()),
                other => other,
            });
            deleted.await
        })
    }

    fn exec(
        &self,
        vm: &VmId,
        command: &Command,
        sink: &mut Sink<'_>,
    ) -> Result<ProcessEnded, Failure> {
        let id = crate::new_process_id().map_err(failure)?;
        let mut unwanted = false;
        let done = self.wait(async {
            let vm = self.vm(vm).await?;
            let mut left = ATTEMPTS;
            let mut run = Run::start(&vm, id, command).await.map_err(failure)?;
            loop {
                match run.next().await {
                    Ok(Some(output)) => {
                        left = ATTEMPTS;
                        give(output, sink).inspect_err(|_| unwanted = true)?;
                    }
                    Ok(None) => return run.ended().map_err(failure),
                    Err(mut error) => {
                        let offset = run.offset();
                        run = loop {
                            may_go_on(error, &mut left)?;
                            let more = match offset {
                                0 => Run::start(&vm, id, command).await,
                                _ => Run::rest(&vm, id, offset).await,
                            };
                            match more {
                                Ok(more) => break more,
                                Err(next) => error = next,
                            }
                        };
                    }
                }
            }
        });
        if unwanted || matches!(done, Err(Failure::Interrupted)) {
            self.give_up(vm, id);
        }
        done
    }

    fn start(&self, vm: &VmId, id: ProcessId, command: &Command) -> Result<(), Failure> {
        self.wait(async {
            let command = order(command).id(id).stdin_pipe();
            let started = self.vm(vm).await?.start(command).await;
            started.map(drop).map_err(failure)
        })
    }

    fn attach(
        &self,
        vm: &VmId,
        id: ProcessId,
        from: Whence,
        follow: bool,
    ) -> Result<Box<dyn Records>, Failure> {
        let from = match from {
            // What is no longer kept is told as a gap.
            Whence::Oldest => ReadFrom::Offset(0),
            Whence::Lines(lines) => ReadFrom::LastLines(lines),
        };
        let reader = self.wait(async {
            let process = self.process(vm, id).await?;
            let reader = again(async || match follow {
                true => process.follow(from).await,
                false => process.replay(from).await,
            });
            reader.await
        })?;
        Ok(Box::new(Reader {
            runtime: self.runtime.clone(),
            interrupted: Arc::clone(&self.interrupted),
            reader,
        }))
    }

    fn status(&self, vm: &VmId, id: ProcessId) -> Result<Option<ProcessEnded>, Failure> {
        self.wait(async {
            let process = self.process(vm, id).await?;
            Ok(again(async || process.info().await).await?.ended)
        })
    }

    fn stdin(&self, vm: &VmId, id: ProcessId, bytes: &[u8]) -> Result<(), Failure> {
        self.wait(async {
            // Whether what was lost on the way has arrived nobody knows: no second attempt.
            let process = self.process(vm, id).await?;
            process.stdin(bytes).await.map_err(failure)
        })
    }

    fn stdin_end(&self, vm: &VmId, id: ProcessId) -> Result<(), Failure> {
        self.wait(async {
            let process = self.process(vm, id).await?;
            let closed = again(async || match process.close_stdin().await {
                Err(error) if error.code() == Some(ErrorCode::ProcessNotRunning) => Ok(()),
                other => other,
            });
            closed.await
        })
    }

    fn kill(&self, vm: &VmId, id: ProcessId) -> Result<(), Failure> {
        self.wait(async {
            let process = self.process(vm, id).await?;
            again(async || process.kill(None).await).await.map(drop)
        })
    }

    fn upload(
        &self,
        vm: &VmId,
        path: &str,
        source: &mut dyn Content,
        size: Option<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        self.wait(async {
            let mut to = FileWrite::new(path);
            if let Some(size) = size {
                to = to.size(size);
            }
            let source = Own::new(Counted {
                source,
                done: 0,
                progress,
            });
            let written = self.vm(vm).await?.upload_resumable(to, source).await;
            written.map(drop).map_err(|error| file_failure(error, path))
        })
    }

    fn download(
        &self,
        vm: &VmId,
        path: &str,
        sink: &mut dyn Write,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.wait(async {
            let wrong = |error| file_failure(error, path);
            let from = FileRead::new(path).checked();
            let mut file = self.vm(vm).await?.download(from).await.map_err(wrong)?;
            let size = file.total().unwrap_or(file.info().size);
            let mut left = ATTEMPTS;
            let mut buffer = vec![0; CHUNK];
            progress(0, size)?;
            loop {
                match file.read(&mut buffer).await {
                    Ok(0) => return Ok(()),
                    Ok(count) => {
                        left = ATTEMPTS;
                        sink.write_all(buffer.get(..count).unwrap_or_default())
                            .map_err(|error| Failure::io(path, "keeping", &error))?;
                        progress(file.offset(), size)?;
                    }
                    Err(error) => {
                        let mut error = ClientError::from(error);
                        loop {
                            if !is_lost(&error) {
                                return Err(wrong(error));
                            }
                            may_go_on(error, &mut left)?;
                            match file.resume().await {
                                Ok(()) => break,
                                Err(next) => error = next,
                            }
                        }
                    }
                }
            }
        })
    }
}

/// A command's output, on the stream that started it or, after that was lost, on another one.
enum Run {
    Started(Execution),
    Rest(Box<Follow>),
}

impl Run {
    /// Starts it, or finds it started.
    async fn start(vm: &Vm, id: ProcessId, command: &Command) -> Result<Self, ClientError> {
        vm.exec(order(command).id(id)).await.map(Self::Started)
    }

    async fn rest(vm: &Vm, id: ProcessId, offset: u64) -> Result<Self, ClientError> {
        let reader = vm.process(id).follow(ReadFrom::Offset(offset)).await?;
        Ok(Self::Rest(Box::new(reader)))
    }

    async fn next(&mut self) -> Result<Option<Output>, ClientError> {
        match self {
            Self::Started(run) => run.next().await,
            Self::Rest(reader) => Ok(reader.next().await?.map(|record| record.output)),
        }
    }

    fn offset(&self) -> u64 {
        match self {
            Self::Started(run) => run.offset(),
            Self::Rest(reader) => reader.offset(),
        }
    }

    fn ended(&self) -> Result<ProcessEnded, ClientError> {
        let ended = match self {
            Self::Started(run) => run.ended(),
            Self::Rest(reader) => reader.ended(),
        };
        ended.cloned().ok_or(ClientError::AgentGone)
    }
}

struct Reader {
    runtime: Handle,
    interrupted: Arc<watch::Sender<bool>>,
    reader: Follow,
}

impl Records for Reader {
    fn next(&mut self) -> Result<Record, Failure> {
        let reader = &mut self.reader;
        wait(&self.runtime, &self.interrupted, async {
            let mut left = ATTEMPTS;
            loop {
                let mut error = match reader.next().await {
                    Ok(Some(record)) => match record.output {
                        Output::Stdout(bytes) => return Ok(Record::Data(Source::Stdout, bytes)),
                        Output::Stderr(bytes) => return Ok(Record::Data(Source::Stderr, bytes)),
                        Output::Gap { bytes } => return Ok(Record::Gap(bytes)),
                        _ => continue,
                    },
                    Ok(None) => {
                        let ended = reader.ended().cloned();
                        return Ok(ended.map_or(Record::Replayed, Record::Ended));
                    }
                    Err(error) => error,
                };
                loop {
                    may_go_on(error, &mut left)?;
                    match reader.resume().await {
                        Ok(()) => break,
                        Err(next) => error = next,
                    }
                }
            }
        })
    }
}

/// Counts what is read from a source.
struct Counted<'a> {
    source: &'a mut dyn Content,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.done = self
            .done
            .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        (self.progress)(self.done);
        Ok(count)
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.done = self.source.seek(to)?;
        Ok(self.done)
    }
}

fn order(command: &Command) -> crate::Command {
    let order = match &command.program {
        Program::Shell(line) => crate::Command::shell(line.as_bytes()),
        Program::Argv(words) => crate::Command::argv(words.iter().map(String::as_bytes)),
    };
    let order = order.cwd(command.cwd.clone().unwrap_or_default());
    command
        .env
        .iter()
        .fold(order, |order, (key, value)| match value {
            Some(value) => order.env(key.as_bytes(), value.as_bytes()),
            None => order.env_remove(key.as_bytes()),
        })
}

fn give(output: Output, sink: &mut Sink<'_>) -> Result<(), Failure> {
    match output {
        Output::Stdout(bytes) => sink(Source::Stdout, &bytes),
        Output::Stderr(bytes) => sink(Source::Stderr, &bytes),
        Output::Gap { bytes } => sink(Source::Stdout, marker(bytes).as_bytes()),
        _ => Ok(()),
    }
}

/// Asks once more when the connection was lost; for what may be asked twice.
async fn again<T>(mut ask: impl AsyncFnMut() -> Result<T, ClientError>) -> Result<T, Failure> {
    let mut left = ATTEMPTS;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => may_go_on(error, &mut left)?,
        }
    }
}

fn is_lost(error: &ClientError) -> bool {
    matches!(error, ClientError::Lost { .. })
}

/// Lets a lost connection pass a few times.
fn may_go_on(error: ClientError, left: &mut u32) -> Result<(), Failure> {
    if *left == 0 || !is_lost(&error) {
        return Err(failure(error));
    }
    *left = left.saturating_sub(1);
    Ok(())
}

fn file_failure(error: ClientError, path: &str) -> Failure {
    match &error {
        ClientError::File(refused) => Failure::file(
            refused.errno().unwrap_or("EIO"),
            refused.path().unwrap_or(path),
            error.to_string(),
        ),
        ClientError::Changed { .. } | ClientError::Damaged { .. } => {
            Failure::file("EIO", path, error.to_string())
        }
        // A source that was asked to stop.
        ClientError::Source(cause) if cause.kind() == io::ErrorKind::ConnectionAborted => {
            Failure::Interrupted
        }
        ClientError::Source(cause) => {
            let own = cause
                .get_ref()
                .and_then(|own| own.downcast_ref::<Failure>());
            own.cloned().unwrap_or_else(|| Failure::Host {
                code: "FETCH_FAILED".into(),
                message: cause.to_string(),
            })
        }
        _ => failure(error),
    }
}

fn failure(error: ClientError) -> Failure {
    let message = error.to_string();
    let code = match &error {
        ClientError::AgentGone => return vm_stopped(),
        ClientError::File(_) => return file_failure(error, ""),
        ClientError::Refused(body) => body.code,
        ClientError::Connect { .. }
        | ClientError::TooSlow { .. }
        | ClientError::Tls { .. }
        | ClientError::Lost { .. }
        | ClientError::NoCa { .. } => return host(UNREACHABLE, message),
        ClientError::Unsendable(_) => return Failure::Usage(message),
        _ => return host("BROKEN", message),
    };
    let vm = |code: &str| Failure::Vm {
        code: code.into(),
        message: message.clone(),
    };
    match code {
        ErrorCode::VmNotFound => Failure::vm_not_found(),
        ErrorCode::VmStopped => vm_stopped(),
        ErrorCode::ProcessNotRunning | ErrorCode::InputClosed => vm("NOT_RUNNING"),
        ErrorCode::NoSuchProcess => vm("NO_SUCH_PROCESS"),
        ErrorCode::AgentUnreachable | ErrorCode::NotConfigured => vm("VM_UNREACHABLE"),
        ErrorCode::BootFailed | ErrorCode::BootTimeout => vm("VM_FAILED"),
        ErrorCode::NoCapacity | ErrorCode::DiskFull => vm("NO_CAPACITY"),
        ErrorCode::TooManyProcesses | ErrorCode::LimitUnavailable => vm("VM_LIMIT"),
        ErrorCode::Unavailable => host(UNREACHABLE, message),
        ErrorCode::TooManyStreams => host("TOO_MANY_STREAMS", message),
        ErrorCode::Unauthenticated => host(UNAUTHENTICATED, message),
        _ => host("REFUSED", message),
    }
}

fn vm_stopped() -> Failure {
    Failure::Vm {
        code: "VM_STOPPED".into(),
        message: "VM stopped".into(),
    }
}

fn host(code: &str, message: String) -> Failure {
    Failure::Host {
        code: code.into(),
        message,
    }
}
