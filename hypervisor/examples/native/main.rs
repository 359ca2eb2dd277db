//! The appliance without virtual machines, for tests and for work on the host's side: the real
//! supervisor, control and proxy, and for each VM, in the monitor's place, a stand-in that runs the
//! guest's agent in namespaces of its own. It needs root and nothing else: no KVM, no kernel, no
//! template. It confines nothing and must never be shipped.
//!
//! `cargo run -p hypervisor --example native -- serve --state DIR --guest-init PATH --token TOKEN`

mod guest;
mod stand_in;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use hypervisor::descriptors::Descriptors;
use hypervisor::supervisor::name_process;
use hypervisor::supervisor::serve::{self, Monitors, ServeArgs};
use hypervisor::{control, log, role};

#[derive(Parser)]
#[command(name = "native")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serves VMs that are processes of this machine.
    Serve(Serve),
    /// As `supvm control`.
    #[command(hide = true)]
    Control(role::ControlArgs),
    /// As `supvm proxy`.
    #[command(hide = true)]
    Proxy,
    /// In the place of `supvm vmm`.
    #[command(hide = true)]
    Vmm(Vmm),
}

#[derive(Args)]
struct Serve {
    /// State directory, made when missing. Its path has to be short: sockets are in it.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The guest's agent.
    #[arg(long, value_name = "PATH")]
    guest_init: PathBuf,
    /// The token that lets a client in.
    #[arg(long)]
    token: String,
    /// Where the API listens beside `DIR/run/api.sock`; the log says at which port.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(Args)]
struct Vmm {
    #[arg(long)]
    guest_init: PathBuf,
}

fn main() -> ExitCode {
    let role = Arguments::parse().role;
    if !matches!(role, Role::Serve(_)) {
        log::start();
    }
    match run(role) {
        Ok(code) => code,
        Err(error) => {
            log::start();
            tracing::error!(%error, "stopped");
            ExitCode::FAILURE
        }
    }
}

fn run(role: Role) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match role {
        Role::Serve(arguments) => {
            let program = fs::canonicalize(&arguments.guest_init)?;
            let program = program.to_str().ok_or("--guest-init is not UTF-8")?;
            let monitors = Monitors {
                arguments: vec!["vmm".into(), "--guest-init".into(), program.into()],
                confined: false,
            };
            let config = prepare(&arguments)?;
            let serve = ServeArgs {
                state: arguments.state,
                config: Some(config),
            };
            serve::run(&serve, &monitors)?;
        }
        Role::Control(arguments) => {
            name_process("control");
            control::run(Descriptors::take_from_environment()?, arguments)?;
        }
        Role::Proxy => {
            use protocol::host::proxy::descriptor::{API, LISTEN};
            name_process("proxy");
            let mut descriptors = Descriptors::take_from_environment()?;
            proxy::run(descriptors.take(LISTEN)?, descriptors.take(API)?)?;
        }
        Role::Vmm(arguments) => {
            name_process("vmm");
            let descriptors = Descriptors::take_from_environment()?;
            return Ok(stand_in::main(descriptors, &arguments.guest_init).into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the settings and a template whose disk is never read. What a start before made stays.
fn prepare(arguments: &Serve) -> io::Result<PathBuf> {
    let template = arguments.state.join("templates/debian@native");
    if !template.exists() {
        fs::create_dir_all(&template)?;
        fs::File::create(template.join("disk.img"))?.set_len(DISK)?;
        let text = format!("name = \"debian\"\nversion = \"native\"\ndisk_bytes = {DISK}\n");
        fs::write(template.join("template.toml"), text)?;
    }
    let settings = arguments.state.join("native.toml");
    let hash = blake3::hash(arguments.token.as_bytes()).to_hex();
    let nothing = Path::new("/dev/null");
    let text = format!(
        "api = {{ listen = \"{}\" }}\n\
         edge = {{ listen = \"127.0.0.1:0\", http = \"127.0.0.1:0\" }}\n\
         guest = {{ kernel = {nothing:?}, initramfs = {nothing:?}, kvm = {nothing:?} }}\n\
         tokens = [{{ owner = \"native\", blake3 = \"{hash}\" }}]\n",
        arguments.listen
    );
    fs::write(&settings, text)?;
    Ok(settings)
}

/// Bytes of the template's disk.
const DISK: u64 = 1 << 20;
