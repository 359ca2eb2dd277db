//! `supvm serve`: the supervisor on an ordinary Linux host, without PID 1's duties. Ctrl-C stops
//! the VMs and then everything else. What is started for each VM is a value, so that a development
//! program can put something else in a monitor's place; nothing in `supvm` itself does.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::confinement::Capability;
use super::duties::NoDuties;
use super::prison::Prison;
use super::service::{Kind, Rights, Service};
use super::spawn::{Program, SpawnError};
use super::{Supervisor, SupervisorError, private_directory, sockets};
use crate::settings::{Settings, SettingsError};

/// Arguments of `supvm serve`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct ServeArgs {
    /// State directory: templates, VMs, keys. Made when missing.
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Settings file. Without it the defaults hold; one that is named must be there.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What is started for each VM: this very program with these arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monitors {
    /// The role and its arguments.
    pub arguments: Vec<String>,
    /// Whether monitors and proxy are locked in: see what the host allows. Only a stand-in for a
    /// machine, which needs paths, does without.
    pub confined: bool,
}

impl Default for Monitors {
    fn default() -> Self {
        Self {
            arguments: vec!["vmm".into()],
            confined: true,
        }
    }
}

/// Runs until it is told to stop.
pub fn run(arguments: &ServeArgs, monitors: &Monitors) -> Result<(), SupervisorError> {
    let settings = settings(arguments.config.as_deref())?;
    crate::log::start_at(&settings.log.level);
    private_directory(&arguments.state)?;
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|cause| SupervisorError::Directory {
            path: path.display().to_string(),
            cause,
        })
    };
    raise_descriptor_limit();
    let state = absolute(&arguments.state)?;
    let run = state.join("run");
    // The longest name that control will bind there.
    sockets::check_length(&run.join("vmm/vm-00000000.sock"))?;
    private_directory(&run.join("vmm"))?;
    let _lock = lock(&state, &run)?;
    let config = arguments.config.as_deref().map(absolute).transpose()?;
    let services = services(&state, &run, None, config.as_deref())?;
    let role: Vec<&str> = monitors.arguments.iter().map(String::as_str).collect();
    let vmm = Program::role(&role)?;
    let prison = match monitors.confined {
        true => Prison::make(&run),
        false => Prison::default(),
    };
    let supervisor = Supervisor::new(
        &run,
        prison,
        vmm,
        services,
        environment(&settings.log.level),
        NoDuties,
    )?;
    tracing::info!(state = %state.display(), "serving; Ctrl-C stops the VMs and exits");
    supervisor.run()?;
    Ok(())
}

fn settings(path: Option<&Path>) -> Result<Settings, SettingsError> {
    if let Some(path) = path {
        // Reading it without this would take a slip of the pen for an absent file.
        std::fs::metadata(path).map_err(|cause| SettingsError::Unreadable {
            path: path.to_owned(),
            cause,
        })?;
    }
    Settings::load(path)
}

/// Two supervisors on one state directory would start each VM twice, on the same disk. The lock goes
/// with the process that holds it.
fn lock(state: &Path, run: &Path) -> Result<Flock<File>, SupervisorError> {
    let path = run.join("lock");
    let failed = |cause: std::io::Error| SupervisorError::Directory {
        path: path.display().to_string(),
        cause,
    };
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::Error::EWOULDBLOCK)) => Err(SupervisorError::InUse(state.to_owned())),
        Err((_, error)) => Err(failed(error.into())),
    }
}

/// Control and proxy hold descriptors for every VM and every connection.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "descriptor limit not raised");
    }
}

/// User that proxy runs as where the supervisor may choose.
const PROXY_UID: u32 = 190_001;

/// Control and proxy.
pub(crate) fn services(
    state: &Path,
    run: &Path,
    system: Option<&Path>,
    config: Option<&Path>,
) -> Result<Vec<Service>, SpawnError> {
    let text = |path: &Path| path.to_str().map(str::to_owned).ok_or(SpawnError::BadText);
    let mut arguments = vec!["control".to_owned()];
    let paths = [
        ("--state", Some(state)),
        ("--run", Some(run)),
        ("--system", system),
        ("--config", config),
    ];
    for (name, path) in paths {
        if let Some(path) = path {
            arguments.extend([name.to_owned(), text(path)?]);
        }
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let proxy = Rights {
        uid: PROXY_UID,
        capability: Some(Capability::NET_BIND_SERVICE),
        locked_in: true,
    };
    Ok(vec![
        Service::new(Kind::Control, Program::role(&arguments)?, Rights::default()),
        Service::new(Kind::Proxy, Program::role(&["proxy"])?, proxy),
    ])
}

/// What every child gets. It logs at this level unless the environment names another.
pub(crate) fn environment(level: &str) -> Vec<(String, String)> {
    let log = std::env::var(crate::log::VARIABLE).unwrap_or_else(|_| level.to_owned());
    let mut passed = vec![(crate::log::VARIABLE.to_owned(), log)];
    if let Ok(value) = std::env::var("RUST_BACKTRACE") {
        passed.push(("RUST_BACKTRACE".to_owned(), value));
    }
    passed
}
