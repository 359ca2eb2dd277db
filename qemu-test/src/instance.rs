//! One emulated server: its directory, its processes, its sockets. Starting ends what an earlier,
//! crashed run left in the directory; dropping an attached instance ends QEMU. It knows nothing of
//! the API.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde_json::json;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout_at};

use crate::console::{Console, Growth};
use crate::probe::{Probe, ProbeError};
use crate::qemu::{self, Accelerator, file};
use crate::qmp::{Qmp, QmpError};
use crate::watch::Identity;

/// How long QEMU may take to open its control socket.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// How long the appliance has to power off after its button was pressed.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(90);

/// Why an emulated server could not be started or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstanceError {
    /// A file of the instance's cannot be used.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Another qemu-test uses the directory.
    #[error("{} is used by another qemu-test; wait for it or give another --target", .0.display())]
    InUse(PathBuf),
    /// The disk's overlay could not be made.
    #[error("qemu-img failed: {0}")]
    Overlay(String),
    /// QEMU ended.
    #[error("QEMU ended: {0}")]
    Ended(String),
    /// QEMU's control socket.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The probe.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An instance's directory.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    directory: OwnedFd,
}

impl Home {
    /// Opens the directory and makes it when it is missing. Others may not look into it: it holds
    /// the token.
    pub(crate) fn open(path: &Path) -> Result<Self, InstanceError> {
        use std::os::unix::fs::DirBuilderExt;
        let failed = |cause| InstanceError::File {
            path: path.to_owned(),
            cause,
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let directory = std::fs::File::open(&path).map_err(failed)?.into();
        Ok(Self { path, directory })
    }

    /// The directory, absolute.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A file in the directory.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The same for a socket: short enough for one's address wherever the checkout is.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Who runs here, if anybody does.
    pub(crate) fn running(&self) -> Option<Identity> {
        Identity::running(&self.join(file::PID))
    }

    /// The console's log.
    pub(crate) fn console(&self) -> Console {
        Console::new(self.join(file::CONSOLE))
    }

    /// Keeps other qemu-tests out of the directory while the guard lives.
    pub(crate) fn lock(&self) -> Result<Flock<std::fs::File>, InstanceError> {
        let path = self.join("lock");
        let lock = std::fs::File::create(&path).map_err(self.failed("lock"))?;
        Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| InstanceError::InUse(self.path.clone()))
    }

    /// Writes a file that only its owner can read.
    pub(crate) fn write_private(&self, name: &str, bytes: &[u8]) -> Result<(), InstanceError> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = std::fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.join(name))
            .map_err(self.failed(name))?;
        file.write_all(bytes).map_err(self.failed(name))
    }

    fn failed(&self, name: &str) -> impl Fn(io::Error) -> InstanceError + use<> {
        let path = self.join(name);
        move |cause| InstanceError::File {
            path: path.clone(),
            cause,
        }
    }

    /// Makes an empty overlay over the prepared data disk, unless one is there that may be kept.
    pub(crate) async fn overlay(&self, base: &Path, keep: bool) -> Result<(), InstanceError> {
        let overlay = self.join(file::DATA);
        if keep && overlay.exists() {
            return Ok(());
        }
        let base = base.canonicalize().map_err(|cause| InstanceError::File {
            path: base.to_owned(),
            cause,
        })?;
        let _ = std::fs::remove_file(&overlay);
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&base, &overlay])
            .output()
            .await?;
        if output.status.success() {
            Ok(())
        } else {
            let text = String::from_utf8_lossy(&output.stderr);
            Err(InstanceError::Overlay(text.trim().to_owned()))
        }
    }

    /// Presses the power button and waits for the end; true when the appliance went down by itself.
    pub(crate) async fn power_off(&self) -> Result<bool, InstanceError> {
        let Some(identity) = self.running() else {
            return Ok(true);
        };
        // QEMU may end before it answers; what counts is whether it ends.
        if let Ok(mut qmp) = Qmp::connect(&self.socket(file::QMP)).await {
            let _ = qmp.execute("system_powerdown", json!({})).await;
        }
        if identity.gone_within(POWER_OFF_PATIENCE).await? {
            return Ok(true);
        }
        identity.end().await?;
        Ok(false)
    }

    /// Cuts the power: QEMU gets no chance to write anything.
    pub(crate) async fn cut_power(&self) -> Result<(), InstanceError> {
        let Some(identity) = self.running() else {
            return Ok(());
        };
        if let Some(qemu) = Identity::qemu(&self.join(file::PID)) {
            kill(Pid::from_raw(qemu), Signal::SIGKILL).map_err(io::Error::from)?;
        }
        if !identity.gone_within(START_PATIENCE).await? {
            identity.end().await?;
        }
        Ok(())
    }
}

/// How an instance is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// How instructions are run.
    pub(crate) accelerator: Accelerator,
    /// After so long QEMU is ended in any case.
    pub(crate) deadline: Duration,
    /// Whether QEMU ends when this process does.
    pub(crate) attached: bool,
    /// The host's port that leads to the edge.
    pub(crate) edge_port: u16,
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Instance {
    watcher: Child,
    /// Open while an attached instance may run.
    lifeline: Option<ChildStdin>,
    api_port: u16,
}

impl Instance {
    /// Starts QEMU in `home`, where initramfs and overlay must be in place.
    pub(crate) async fn start(
        home: &Home,
        image: &Path,
        start: Start,
    ) -> Result<Self, InstanceError> {
        if let Some(stale) = home.running() {
            stale.end().await?;
        }
        for socket in [file::QMP, file::PROBE] {
            let _ = std::fs::remove_file(home.join(socket));
        }
        let _ = std::fs::rename(home.join(file::CONSOLE), home.join("console.previous.log"));
        home.write_private(file::CONSOLE, b"")?;
        let image = image.canonicalize().map_err(|cause| InstanceError::File {
            path: image.to_owned(),
            cause,
        })?;
        let made = Growth::watch(home.path())?;
        let mut watcher = watcher(home, &image, start)?.spawn()?;
        // Taken out because waiting for a child closes its input, which would end QEMU.
        let lifeline = watcher.stdin.take();
        let mut instance = Self {
            watcher,
            lifeline,
            api_port: 0,
        };
        let deadline = Instant::now() + START_PATIENCE;
        instance.api_port = tokio::select! {
            port = api_port(home, &made, deadline) => port?,
            _ = instance.watcher.wait() => return Err(InstanceError::Ended(log_tail(home))),
        };
        Ok(instance)
    }

    /// The host's port that leads to the API.
    pub(crate) fn api_port(&self) -> u16 {
        self.api_port
    }

    /// Returns when QEMU has ended.
    pub(crate) async fn ended(&mut self) -> io::Result<()> {
        self.watcher.wait().await.map(drop)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The end of its input tells the watcher to end QEMU; it takes no longer than its grace.
        if self.lifeline.take().is_none() {
            return;
        }
        if let Some(pid) = self.watcher.id().and_then(|pid| i32::try_from(pid).ok()) {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            let _ = waitid(Id::Pid(Pid::from_raw(pid)), flags);
        }
    }
}

fn watcher(home: &Home, image: &Path, start: Start) -> Result<Command, InstanceError> {
    let log = std::fs::File::create(home.join(file::LOG)).map_err(home.failed(file::LOG))?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("watch")
        .arg("--deadline-s")
        .arg(start.deadline.as_secs().to_string())
        .args(["--pidfile", file::PID])
        .args(start.attached.then_some("--attached"))
        .arg("--")
        .args(qemu::command(start.accelerator, image, start.edge_port))
        .current_dir(home.path())
        .stdin(if start.attached {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(command)
}

async fn api_port(home: &Home, made: &Growth, deadline: Instant) -> Result<u16, InstanceError> {
    let mut qmp = connect(home, made, deadline).await?;
    Ok(qmp.forwarded_port(qemu::API_PORT).await?)
}

/// Opens the probe's shell.
pub(crate) async fn probe(home: &Home) -> Result<Probe, InstanceError> {
    Ok(Probe::connect(&home.socket(file::PROBE)).await?)
}

async fn connect(home: &Home, made: &Growth, deadline: Instant) -> Result<Qmp, InstanceError> {
    let path = home.socket(file::QMP);
    loop {
        match Qmp::connect(&path).await {
            Err(QmpError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                // Something was made in the directory: perhaps the socket.
                match timeout_at(deadline, made.next()).await {
                    Ok(next) => next?,
                    Err(_) => return Err(QmpError::Deadline.into()),
                }
            }
            Err(QmpError::Io(error))
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() < deadline =>
            {
                // Bound but not listening yet: QEMU is between two system calls, and no event
                // tells of the second.
                sleep(Duration::from_millis(10)).await;
            }
            other => return Ok(other?),
        }
    }
}

fn log_tail(home: &Home) -> String {
    let text = Console::new(home.join(file::LOG)).tail();
    match text.trim() {
        "" => "it said nothing".into(),
        text => text.to_owned(),
    }
}
