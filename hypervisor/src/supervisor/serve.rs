//! `supvm serve`: the supervisor on an ordinary Linux host, without PID 1's duties. Ctrl-C stops
//! the VMs and then everything else.

use std::path::{Path, PathBuf};

use super::confinement::Capability;
use super::duties::NoDuties;
use super::prison::Prison;
use super::service::{Kind, Rights, Service};
use super::spawn::{Program, SpawnError};
use super::{Supervisor, SupervisorError, private_directory, sockets};

/// Arguments of `supvm serve`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct ServeArgs {
    /// State directory: templates, VMs, keys. Made when missing.
    #[arg(long, value_name = "DIR")]
    pub state: PathBuf,
    /// Settings file. Without it the defaults hold.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Runs until it is told to stop.
pub fn run(arguments: &ServeArgs) -> Result<(), SupervisorError> {
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
    let config = arguments.config.as_deref().map(absolute).transpose()?;
    let services = services(&state, &run, None, config.as_deref())?;
    let vmm = Program::role(&["vmm"])?;
    let supervisor = Supervisor::new(
        &run,
        Prison::make(&run),
        vmm,
        services,
        environment(),
        NoDuties,
    )?;
    tracing::info!(state = %state.display(), "serving; Ctrl-C stops the VMs and exits");
    supervisor.run()?;
    Ok(())
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

/// What every child gets.
pub(crate) fn environment() -> Vec<(String, String)> {
    let passed = [crate::log::VARIABLE, "RUST_BACKTRACE"];
    let passed = passed
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
    passed.collect()
}
