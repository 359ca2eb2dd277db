//! Control: lifecycle, disks, registry and the API's meaning. It may be killed at any time: what it
//! acknowledged is on disk, monitors and streams live on without it, and the next one picks them up.
//! It never talks to the network; proxy does, and hands it requests.

mod addresses;
mod agent_client;
mod api;
mod capacity;
mod certificates;
mod clock;
mod create;
mod frames;
mod keys;
mod links;
mod monitor;
mod name_servers;
mod random;
mod registry;
mod requests;
mod store;
mod supervisor_client;
#[cfg(test)]
mod tests;
mod tokens;
mod vm;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::descriptors::{DescriptorError, Descriptors};
use crate::role::ControlArgs;
use crate::settings::{Settings, SettingsError};

use api::Api;
use capacity::Capacity;
use certificates::Certificates;
use frames::Frames;
use keys::{Authority, KeyError};
use registry::{RecoverError, Registry};
use requests::Requests;
use store::{Store, StoreError};
use supervisor_client::{Supervisor, SupervisorError};
use tokens::Tokens;
use vm::Host;

/// Why control ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It was not started with what it needs.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The settings cannot be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The state directory cannot be used, the supervisor is gone, or the like.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The system refused what every process gets.
    #[error("cannot {what}: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The run directory's name is too long for the sockets in it.
    #[error("the socket path {} has {length} bytes, at most 107 work; use a shorter state directory", path.display())]
    PathTooLong {
        /// The longest path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
}

/// The error of one of control's parts.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct PartError(Part);

#[derive(Debug, thiserror::Error)]
enum Part {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Recover(#[from] RecoverError),
}

impl<E: Into<Part>> From<E> for PartError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// Runs until the supervisor says to stop. The descriptors hold `supervisor`.
pub fn run(mut descriptors: Descriptors, arguments: ControlArgs) -> Result<(), ControlError> {
    let supervisor = descriptors.take("supervisor")?;
    let settings = Settings::load(arguments.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(32)
        .enable_all()
        .build()
        .map_err(|cause| ControlError::System {
            what: "start the asynchronous threads",
            cause,
        })?;
    let ended = runtime.block_on(serve(supervisor, arguments, settings));
    // File work that still runs is safe to leave: it is crash-safe.
    runtime.shutdown_background();
    ended
}

/// Everything control does, on a runtime.
async fn serve(
    supervisor: OwnedFd,
    arguments: ControlArgs,
    settings: Settings,
) -> Result<(), ControlError> {
    let system = |what| move |cause| ControlError::System { what, cause };
    let sockets = arguments.run.join("vmm");
    check_length(&sockets)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&sockets)
        .map_err(system("make the run directory"))?;
    let supervisor = Supervisor::new(supervisor).map_err(system("use the supervisor's socket"))?;
    let store = Store::open(&arguments.state).map_err(PartError::from)?;
    let authority = Authority::open(&store).map_err(PartError::from)?;
    tracing::info!("certificate authority {}", authority.fingerprint());
    let certificates = Arc::new(Certificates::open(authority, &settings, &store.keys()));
    let total = match settings.limits.total_memory_mib {
        0 => capacity::host_memory_mib(),
        total => total,
    };
    let host = Arc::new(Host {
        store,
        supervisor: supervisor.clone(),
        capacity: Capacity::new(total),
        frames: Frames::default(),
        sockets,
        privileged: nix::unistd::geteuid().is_root(),
        going_down: AtomicBool::new(false),
        settings,
    });
    let imported = import_templates(&host, arguments.system);
    let registry = Registry::new(host.clone(), imported);
    let mut shut_down = supervisor.shut_down();
    let serving = async {
        registry.recover().await.map_err(PartError::from)?;
        let api = Api {
            socket: arguments.run.join("proxy.sock"),
            certificates: certificates.clone(),
            requests: Arc::new(Requests {
                tokens: Tokens::new(host.settings.tokens.clone()),
                host: host.clone(),
                registry: registry.clone(),
            }),
        };
        let deadline = async {
            let deadline = shut_down.wait_for(Option::is_some).await;
            deadline.ok().and_then(|deadline| *deadline)
        };
        let deadline = tokio::select! {
            () = api.run() => None,
            () = certificates.follow() => None,
            deadline = deadline => deadline,
        };
        tracing::info!("the host goes down; stopping all VMs");
        host.going_down.store(true, Ordering::Relaxed);
        registry.shut_down(deadline.unwrap_or_default()).await;
        Ok(())
    };
    tokio::select! {
        ended = serving => ended,
        error = supervisor.listen() => match error {
            Ok(()) => Ok(()),
            Err(error) => Err(PartError::from(error).into()),
        },
    }
}

/// A defect that is yet to be found: a test's label says where it strikes.
#[cfg(test)]
fn injected_panic(labels: &[(String, String)], place: &str) {
    let strikes = |(key, value): &(String, String)| key == "panic" && value == place;
    assert!(!labels.iter().any(strikes), "injected panic");
}

#[cfg(not(test))]
fn injected_panic(_labels: &[(String, String)], _place: &str) {}

/// A Unix socket's path has at most 107 bytes.
fn check_length(sockets: &std::path::Path) -> Result<(), ControlError> {
    let path = sockets.join("vm-00000000.sock");
    match path.as_os_str().len() {
        length if length > 107 => Err(ControlError::PathTooLong { path, length }),
        _ => Ok(()),
    }
}

/// Imports the system slot's templates beside everything else; true when that is done.
fn import_templates(host: &Arc<Host>, system: Option<PathBuf>) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(system.is_none());
    if let Some(system) = system {
        let host = host.clone();
        tokio::task::spawn_blocking(move || {
            host.store.import_templates(&system);
            sender.send_replace(true);
        });
    }
    receiver
}
