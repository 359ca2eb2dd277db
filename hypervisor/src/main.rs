//! One binary, many roles: `supvm init` is PID 1 of the appliance, `supvm serve` the same
//! supervisor on an ordinary Linux host, the others are started by it.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hypervisor::descriptors::Descriptors;
use hypervisor::supervisor::{name_process, serve};
use hypervisor::{control, init, log, net, role, token};

/// musl's own has one lock for all threads, under which proxy did half of what it does now.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Turns a server into a place that hands out Linux virtual machines.
#[derive(Parser)]
#[command(name = "supvm", version)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serves VMs on an ordinary Linux host.
    Serve(serve::ServeArgs),
    /// Makes a token and prints it with the lines that let it in.
    Token(token::TokenArgs),
    /// Prints the version.
    Version,
    /// Lifecycle, disks, registry (started by the supervisor).
    #[command(hide = true)]
    Control(role::ControlArgs),
    /// Everything that talks to the world (started by the supervisor).
    #[command(hide = true)]
    Proxy,
    /// The host's addresses (started by the supervisor).
    #[command(hide = true)]
    Net,
    /// One virtual machine (started by the supervisor).
    #[command(hide = true)]
    Vmm,
}

fn main() -> ExitCode {
    // The kernel starts init with arguments of its own.
    if std::process::id() == 1 {
        init::run();
    }
    let role = Arguments::parse().role;
    // Serve's settings say how much is logged.
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
        Role::Serve(arguments) => serve::run(&arguments, &serve::Monitors::default())?,
        Role::Token(arguments) => print!("{}", token::make(&arguments)?),
        Role::Version => println!("supvm {}", env!("CARGO_PKG_VERSION")),
        Role::Control(arguments) => {
            name_process("control");
            control::run(Descriptors::take_from_environment()?, arguments)?;
        }
        Role::Net => {
            name_process("net");
            net::run(Descriptors::take_from_environment()?)?;
        }
        Role::Vmm => {
            name_process("vmm");
            return Ok(ExitCode::from(vmm::main()));
        }
        Role::Proxy => {
            use protocol::host::proxy::descriptor::{API, LISTEN};
            name_process("proxy");
            let mut descriptors = Descriptors::take_from_environment()?;
            proxy::run(descriptors.take(LISTEN)?, descriptors.take(API)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
