//! PID 1 of the appliance: mounts, modules, disks, network set-up, power, and the supervisor on top.
//! It parses nothing that comes from a network, and it must never end but by stopping the machine.

mod console;
mod disks;
mod modules;
mod mounts;
mod network;
mod power;
mod sysctl;
mod uevent;

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::resource::{Resource, setrlimit};
use protocol::host::supervisor::Lease;

use self::console::Console;
use self::disks::Disks;
use self::modules::Modules;
use self::modules::loader::Loader;
pub(crate) use self::network::Links;
use self::power::Buttons;
use self::uevent::{News, Uevents};
use crate::settings::Settings;
use crate::supervisor::confinement::Capability;
use crate::supervisor::duties::{Demand, Duties, Outcome};
use crate::supervisor::prison::Prison;
use crate::supervisor::serve::{environment, services};
use crate::supervisor::service::{Kind, Rights, Service};
use crate::supervisor::spawn::Program;
use crate::supervisor::{Supervisor, SupervisorError, private_directory};

const RUN: &str = "/run/supvm";
const SETTINGS: &str = "/etc/supvm.toml";
/// User that net runs as.
const NET_UID: u32 = 190_002;
/// How long the last lines may take to the console.
const CONSOLE_WITHIN: Duration = Duration::from_secs(2);
/// How long the data disk may take to appear before its absence is told.
const DATA_WITHIN: Duration = Duration::from_secs(20);
/// How long the system slot may take once the data disk is there.
const SYSTEM_WITHIN: Duration = Duration::from_secs(5);
/// How long a machine whose init cannot go on stays up, for somebody to read why.
const READ_WITHIN: Duration = Duration::from_secs(60);
/// Pieces of news that are handled before others have their turn.
const NEWS_PER_TURN: usize = 256;
/// How long loading what VMs need may hold up the services once the disks are there.
const KVM_WITHIN: Duration = Duration::from_secs(30);

/// Why init cannot go on.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("cannot listen to the kernel's news of devices: {0}")]
    Uevents(nix::Error),
    #[error("cannot begin to load modules: {0}")]
    Loader(nix::Error),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Spawn(#[from] crate::supervisor::SpawnError),
}

/// Runs the machine until it is powered off.
pub fn run() -> ! {
    // Without it the console is written directly.
    let console = Console::take_over().ok();
    let outcome = match std::panic::catch_unwind(run_machine) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => fail(&error.to_string()),
        Err(_) => fail("init panicked"),
    };
    stop(outcome, console)
}

fn fail(error: &str) -> Outcome {
    tracing::error!(
        error,
        restart_in_s = READ_WITHIN.as_secs(),
        "init cannot go on"
    );
    std::thread::sleep(READ_WITHIN);
    Outcome::Restart
}

fn stop(outcome: Outcome, console: Option<Console>) -> ! {
    mounts::unmount_disks();
    let (mode, what) = match outcome {
        Outcome::PowerOff => (RebootMode::RB_POWER_OFF, "powering off"),
        Outcome::Restart => (RebootMode::RB_AUTOBOOT, "restarting"),
    };
    tracing::info!("{what}");
    if let Some(console) = console {
        console.finish(CONSOLE_WITHIN);
    }
    let Err(error) = reboot(mode);
    tracing::error!(%error, "{what} failed; halting");
    loop {
        nix::unistd::pause();
    }
}

fn run_machine() -> Result<Outcome, InitError> {
    let started = Instant::now();
    let not_mounted = mounts::mount_kernel();
    let settings = Settings::load(Some(Path::new(SETTINGS)));
    let level = settings.as_ref().map(|settings| settings.log.level.clone());
    let level = level.unwrap_or_else(|_| "info".to_owned());
    crate::log::start_at(&level);
    crate::supervisor::name_process("init");
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "supvm starts");
    for error in not_mounted {
        tracing::error!("{error}");
    }
    let settings = settings.unwrap_or_else(|error| {
        tracing::error!("{error}; the defaults hold");
        Settings::default()
    });
    prepare_kernel();
    let uevents = Uevents::listen().map_err(InitError::Uevents)?;
    let modules = Modules::of_running_kernel().unwrap_or_else(|error| {
        tracing::error!(%error, "no modules for the running kernel; what is built in must do");
        Modules::default()
    });
    let loader = Loader::start(modules, started).map_err(InitError::Loader)?;
    let mut duties = Init::new(uevents, loader, network::Fixed::of(&settings));
    duties.buttons.look();
    duties.links.bring_up();
    let supervisor = supervisor(&settings, &level, duties)?;
    let (outcome, _) = supervisor.run()?;
    Ok(outcome)
}

fn supervisor(
    settings: &Settings,
    level: &str,
    duties: Init,
) -> Result<Supervisor<Init>, InitError> {
    let run = Path::new(RUN);
    private_directory(&run.join("vmm"))?;
    let state = Path::new(disks::DATA);
    let system = Path::new(disks::SYSTEM);
    let config = Path::new(SETTINGS);
    let held = services(state, run, Some(system), Some(config))?;
    let mut services: Vec<Service> = held.into_iter().map(Service::held).collect();
    let net = Rights {
        uid: NET_UID,
        capability: Some(Capability::NET_RAW),
        locked_in: true,
    };
    if settings.network.dhcp {
        services.push(Service::new(Kind::Net, Program::role(&["net"])?, net));
    }
    services.extend(debug_shell(settings));
    let mut environment = environment(level);
    environment.push((
        "PATH".to_owned(),
        "/usr/sbin:/usr/bin:/sbin:/bin:/debug".to_owned(),
    ));
    let vmm = Program::role(&["vmm"])?;
    Ok(Supervisor::new(
        run,
        Prison::make(run),
        vmm,
        services,
        environment,
        duties,
    )?)
}

fn debug_shell(settings: &Settings) -> Option<Service> {
    let program = settings.debug.shell.first()?;
    let arguments: Vec<&str> = settings.debug.shell.iter().map(String::as_str).collect();
    let terminal = PathBuf::from("/dev").join(&settings.debug.tty);
    let terminal_name = terminal.display().to_string();
    match Program::open(Path::new(program), &arguments) {
        Ok(opened) => {
            tracing::warn!(
                program,
                terminal = terminal_name,
                "DEBUG SHELL: whoever has this terminal has this machine; remove [debug] from the settings"
            );
            let shell = Service::new(Kind::DebugShell, opened, Rights::default());
            Some(shell.on_terminal(terminal))
        }
        Err(error) => {
            tracing::error!(%error, "no debug shell");
            None
        }
    }
}

/// What the kernel is told before anything runs.
fn prepare_kernel() {
    const DESCRIPTORS: u64 = 1 << 20;
    sysctl::apply();
    let tell = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            tracing::warn!(%error, "{what}");
        }
    };
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    tell(
        "hostname not set",
        nix::unistd::sethostname("supvm").map_err(Into::into),
    );
    tell(
        "Ctrl-Alt-Del not taken over",
        set_cad_enabled(false).map_err(Into::into),
    );
    tell(
        "descriptor limit not raised",
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).map_err(Into::into),
    );
}

/// The module that makes KVM work on this processor.
fn kvm_module() -> Option<&'static str> {
    let facts = fs::read_to_string("/proc/cpuinfo").ok()?;
    let vendor = facts.lines().find(|line| line.starts_with("vendor_id"))?;
    if vendor.contains("AuthenticAMD") || vendor.contains("HygonGenuine") {
        Some("kvm_amd")
    } else if vendor.contains("GenuineIntel") {
        Some("kvm_intel")
    } else {
        None
    }
}

/// How far waiting for the disks has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// Nobody has looked yet.
    Start,
    Data {
        complain_at: Option<Instant>,
    },
    System {
        until: Instant,
    },
    /// What VMs need is still being loaded.
    Kvm {
        until: Instant,
    },
    Done,
}

/// PID 1's duties beside supervising.
#[derive(Debug)]
struct Init {
    uevents: Uevents,
    loader: Loader,
    disks: Disks,
    buttons: Buttons,
    links: Links,
    waiting: Waiting,
}

/// Number of the news' descriptor.
const NEWS: usize = 0;
/// Number of the loader's descriptor.
const LOADER: usize = 1;
/// Number of the first button's descriptor.
const BUTTONS: usize = 2;

impl Init {
    fn new(uevents: Uevents, loader: Loader, fixed: network::Fixed) -> Self {
        Self {
            uevents,
            loader,
            disks: Disks::default(),
            buttons: Buttons::default(),
            links: Links::new(fixed),
            waiting: Waiting::Start,
        }
    }

    fn look_at_everything(&mut self) -> Option<Demand> {
        self.buttons.look();
        self.links.bring_up();
        self.look_for_disks()
    }

    /// Mounts what has appeared and goes on when all is there.
    fn look_for_disks(&mut self) -> Option<Demand> {
        if self.waiting == Waiting::Done {
            return None;
        }
        self.disks.mount();
        let now = Instant::now();
        if self.waiting == Waiting::Start {
            let complain_at = Some(now + DATA_WITHIN);
            self.waiting = Waiting::Data { complain_at };
        }
        if matches!(self.waiting, Waiting::Data { .. }) && self.disks.has_data() {
            self.waiting = Waiting::System {
                until: now + SYSTEM_WITHIN,
            };
        }
        if let Waiting::System { until } = self.waiting {
            if !self.disks.has_system() {
                if now < until {
                    return None;
                }
                tracing::warn!("no system slot; only templates on the data disk can be used");
            }
            self.waiting = Waiting::Kvm {
                until: now + KVM_WITHIN,
            };
        }
        let Waiting::Kvm { until } = self.waiting else {
            return None;
        };
        if !self.loader.is_ready() {
            if now < until {
                return None;
            }
            tracing::error!("a module that VMs need is not loaded yet; going on without it");
        }
        self.waiting = Waiting::Done;
        Some(Demand::Release)
    }

    fn hear(&mut self) -> Option<Demand> {
        let mut demand = None;
        for _ in 0..NEWS_PER_TURN {
            let heard = match self.uevents.next() {
                None => break,
                Some(News::Lost) => {
                    tracing::warn!(
                        "the kernel's news of devices overflowed; looking at everything"
                    );
                    self.loader.look_at_everything();
                    self.look_at_everything()
                }
                Some(News::Device(device)) => {
                    if !device.modalias.is_empty() {
                        self.loader.serve(device.modalias);
                    }
                    match device.subsystem.as_str() {
                        "block" => self.look_for_disks(),
                        "net" => {
                            self.links.bring_up();
                            None
                        }
                        "input" => {
                            self.buttons.look();
                            None
                        }
                        _ => None,
                    }
                }
            };
            demand = demand.or(heard);
        }
        demand
    }
}

impl Duties for Init {
    fn watched(&self) -> Vec<(usize, BorrowedFd<'_>)> {
        let buttons = self.buttons.descriptors();
        let buttons =
            buttons.map(|(number, descriptor)| (number.saturating_add(BUTTONS), descriptor));
        let mut watched = vec![(NEWS, self.uevents.descriptor())];
        // Once the services run it has nothing more to say.
        if self.waiting != Waiting::Done {
            watched.push((LOADER, self.loader.descriptor()));
        }
        watched.extend(buttons);
        watched
    }

    fn ready(&mut self, number: usize) -> Option<Demand> {
        match (number, number.checked_sub(BUTTONS)) {
            (NEWS, _) => self.hear(),
            (_, Some(button)) => self.buttons.pressed(button).then(|| {
                tracing::info!("power button");
                Demand::ShutDown(Outcome::PowerOff)
            }),
            // It is asked before the services are released.
            (_, None) => {
                self.loader.is_ready();
                self.look_for_disks()
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.waiting {
            Waiting::Start => Some(Instant::now()),
            Waiting::Data { complain_at } => complain_at,
            Waiting::System { until } | Waiting::Kvm { until } => Some(until),
            Waiting::Done => None,
        }
    }

    fn elapsed(&mut self) -> Option<Demand> {
        let demand = self.look_for_disks();
        let now = Instant::now();
        if matches!(self.waiting, Waiting::Data { complain_at: Some(when) } if when <= now) {
            self.disks.complain_of_missing_data();
            self.waiting = Waiting::Data { complain_at: None };
        }
        demand
    }

    fn lease(&mut self, lease: Lease) {
        self.links.apply(&lease);
    }

    fn reaps_orphans(&self) -> bool {
        true
    }
}
