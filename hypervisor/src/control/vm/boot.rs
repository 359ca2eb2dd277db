//! From a record to a machine whose agent has its configuration. [`launch`] starts the monitor and
//! is short; [`make_ready`] waits for the guest and can be dropped at any time. Whoever calls them
//! ends the run when they fail.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use protocol::agent::Configure;
use protocol::host::supervisor::Run;
use protocol::host::vmm::{VmmConfig, descriptor};
use protocol::vm::EndReason;
use protocol::{ErrorBody, ErrorCode};

use super::super::agent_client::{self, AgentError};
use super::super::monitor::{Monitor, MonitorError};
use super::super::store::record::VmRecord;
use super::super::supervisor_client::{Ended, Exit, SupervisorError, wait_end};
use super::Host;
use super::ending::{Asked, describe};

/// What of the console goes into an error.
const TAIL: u64 = 4 << 10;

/// What a monitor's process may use beyond the guest's memory: a fraction of a MiB of its own, and
/// what streams that nobody reads hold (512 of the agent's, a window and a socket buffer each).
const OVERHEAD: u64 = 320 << 20;

/// The name servers that every guest is given: the gateway of its own network.
const GATEWAY_DNS: [&str; 2] = ["10.213.0.1", "fd73:7570::1"];

/// Why a VM did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A file that the monitor needs cannot be opened or made.
    #[error("cannot open {path} for the VM: {cause}")]
    File {
        /// Which one.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The supervisor did not start the monitor.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// The monitor cannot be reached.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The agent did not take its configuration.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The deadline passed.
    #[error("the VM did not come up within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The monitor ended first.
    #[error("the VM ended before it came up: {message}")]
    Ended {
        /// Why.
        reason: EndReason,
        /// The same for a person.
        message: String,
    },
}

impl BootError {
    /// How the run ended, for the VM's record.
    pub(crate) fn end_reason(&self) -> EndReason {
        match self {
            Self::Timeout(_) => EndReason::BootTimeout,
            Self::Ended { reason, .. } => *reason,
            Self::Agent(_) => EndReason::BootTimeout,
            _ => EndReason::MonitorFailed,
        }
    }

    /// What the caller is told, with the end of the VM's console.
    pub(crate) fn body(&self, console: String) -> ErrorBody {
        let message = self.to_string();
        let body = match self {
            Self::Timeout(_) => ErrorBody::guest(
                ErrorCode::BootTimeout,
                format!("{message}; the end of its console is below"),
            ),
            Self::Ended {
                reason: EndReason::MonitorFailed,
                ..
            } => ErrorBody::host(ErrorCode::BootFailed, message),
            Self::Ended { .. } | Self::Agent(_) => ErrorBody::guest(ErrorCode::BootFailed, message),
            Self::Supervisor(SupervisorError::NotSpawned { .. })
            | Self::Monitor(_)
            | Self::File { .. } => ErrorBody::host(ErrorCode::BootFailed, message),
            Self::Supervisor(_) => {
                ErrorBody::host(ErrorCode::Unavailable, message).retryable_after_ms(1000)
            }
        };
        body.with_detail(console)
    }
}

/// The end of a VM's console.
pub(crate) async fn console_tail(host: &Arc<Host>, record: &VmRecord) -> String {
    let id = record.id.clone();
    let tail = host.blocking(move |host| Ok(host.store.console_tail(&id, TAIL)));
    String::from_utf8_lossy(&tail.await.unwrap_or_default()).into_owned()
}

/// What a monitor is handed, opened by us.
struct MachineFiles {
    named: Vec<(&'static str, OwnedFd)>,
}

impl MachineFiles {
    /// Opens and makes everything. Blocks.
    fn open(host: &Host, record: &VmRecord, run: &Run) -> Result<Self, BootError> {
        let settings = &host.settings.guest;
        let disk = host.store.disk(&record.id);
        let console = host.store.console(&record.id);
        let config = VmmConfig {
            run: run.clone(),
            model: record.model,
            cpus: record.cpus,
            memory_mib: record.memory_mib,
        };
        Ok(Self {
            named: vec![
                (descriptor::LISTEN, listener(&host.socket(&record.id))?),
                (descriptor::CONFIG, config_file(&config)?),
                (descriptor::KVM, open(&settings.kvm, true)?),
                (descriptor::MEMORY, memory_file(record.memory_mib)?),
                (descriptor::DISK, open(&disk, true)?),
                (descriptor::KERNEL, open(&settings.kernel, false)?),
                (descriptor::INITRAMFS, open(&settings.initramfs, false)?),
                (descriptor::LOG, console_file(&console)?),
            ],
        })
    }

    fn borrowed(&self) -> Vec<(&str, BorrowedFd<'_>)> {
        let named = self.named.iter();
        named.map(|(name, fd)| (*name, fd.as_fd())).collect()
    }
}

fn open(path: &Path, write: bool) -> Result<OwnedFd, BootError> {
    File::options()
        .read(true)
        .write(write)
        .open(path)
        .map(OwnedFd::from)
        .map_err(file_error(path.display()))
}

fn console_file(path: &Path) -> Result<OwnedFd, BootError> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map(OwnedFd::from)
        .map_err(file_error(path.display()))
}

fn file_error<E: Into<io::Error>>(path: impl std::fmt::Display) -> impl FnOnce(E) -> BootError {
    let path = path.to_string();
    |cause| BootError::File {
        path,
        cause: cause.into(),
    }
}

fn listener(path: &Path) -> Result<OwnedFd, BootError> {
    let make = || -> nix::Result<OwnedFd> {
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        // What an earlier run left there has no listener any more.
        let _ = std::fs::remove_file(path);
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(socket)
    };
    make().map_err(file_error(path.display()))
}

fn config_file(config: &VmmConfig) -> Result<OwnedFd, BootError> {
    let body = postcard::to_allocvec(config).unwrap_or_default();
    let make = || -> io::Result<OwnedFd> {
        let mut file = File::from(memfd_create(c"supvm-config", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&body)?;
        io::Seek::rewind(&mut file)?;
        Ok(file.into())
    };
    make().map_err(file_error("a memory file"))
}

fn memory_file(mib: u32) -> Result<OwnedFd, BootError> {
    let make = || -> io::Result<OwnedFd> {
        let file = File::from(memfd_create(c"supvm-memory", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(u64::from(mib) << 20)?;
        Ok(file.into())
    };
    make().map_err(file_error("guest memory"))
}

/// Starts the monitor of a run.
pub(crate) async fn launch(
    host: &Arc<Host>,
    record: &VmRecord,
    run: &Run,
) -> Result<(), BootError> {
    let files = {
        let (host, record, run) = (host.clone(), record.clone(), run.clone());
        tokio::task::spawn_blocking(move || MachineFiles::open(&host, &record, &run))
            .await
            .map_err(|error| BootError::File {
                path: "the VM's files".into(),
                cause: io::Error::other(error),
            })??
    };
    let uid = if host.privileged { record.uid } else { 0 };
    let memory_max = (u64::from(record.memory_mib) << 20).saturating_add(OVERHEAD);
    let pid = host
        .supervisor
        .spawn(run, uid, memory_max, &files.borrowed())
        .await?;
    tracing::info!(vm = %run.vm, generation = run.generation, pid, "monitor started");
    Ok(())
}

/// Waits until the VM's agent has its configuration, its monitor ends or the deadline passes.
pub(crate) async fn make_ready(
    host: Arc<Host>,
    record: Arc<VmRecord>,
    run: Run,
    mut ended: Ended,
) -> Result<Monitor, BootError> {
    let deadline = Duration::from_secs(host.settings.boot.deadline_s.into());
    let ready = async {
        let monitor = Monitor::connect(&host.socket(&run.vm), &run).await?;
        let stream = monitor.open(true).await?;
        if let Some(configured) = agent_client::configure(stream, &identity(&record)).await? {
            tracing::info!(
                vm = %run.vm,
                generation = run.generation,
                agent = configured.agent_version,
                boot_id = configured.boot_id,
                disk_bytes = configured.disk_bytes,
                "agent configured"
            );
        }
        Ok::<_, BootError>(monitor)
    };
    let mut watched = ended.clone();
    let outcome = tokio::select! {
        exit = wait_end(&mut watched) => return Err(ended_early(exit)),
        outcome = tokio::time::timeout(deadline, ready) => outcome,
    };
    match outcome {
        Ok(Ok(monitor)) => Ok(monitor),
        // A monitor that ends closes its socket first: its exit says more than that.
        Ok(Err(error @ (BootError::Monitor(_) | BootError::Agent(_)))) => {
            let grace = Duration::from_secs(2);
            match tokio::time::timeout(grace, wait_end(&mut ended)).await {
                Ok(exit) => Err(ended_early(exit)),
                Err(_) => Err(error),
            }
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(BootError::Timeout(deadline)),
    }
}

fn ended_early(exit: Exit) -> BootError {
    let (reason, message) = describe(exit, Asked::Nothing);
    BootError::Ended { reason, message }
}

fn identity(record: &VmRecord) -> Configure {
    let mut entropy = [0; 32];
    if let Err(error) = getrandom::fill(&mut entropy) {
        tracing::error!(%error, "no entropy for a VM");
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Configure {
        vm: record.id.to_string(),
        generation: record.generation,
        hostname: record.id.hostname(),
        machine_id: record.machine_id,
        unix_ns: since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }),
        entropy,
        dns: GATEWAY_DNS.map(str::to_owned).to_vec(),
        env: record.env.clone(),
        grow_disk: true,
    }
}

/// Connects to the monitor of a run that was up before control was started.
pub(crate) async fn reconnect(host: &Arc<Host>, run: &Run) -> Result<Monitor, BootError> {
    Ok(Monitor::connect(&host.socket(&run.vm), run).await?)
}
