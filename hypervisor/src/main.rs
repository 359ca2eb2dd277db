//! One binary, many roles: `supvm init` is PID 1 of the appliance, `supvm serve` the same
//! supervisor on an ordinary Linux host, the others are started by it.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hypervisor::descriptors::Descriptors;
use hypervisor::{control, log, role};

/// Turns a server into a place that hands out Linux virtual machines.
#[derive(Parser)]
#[command(name = "supvm", version)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Lifecycle, disks, registry (started by the supervisor).
    #[command(hide = true)]
    Control(role::ControlArgs),
    /// Prints the version.
    Version,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::start();
    match run(arguments.role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "stopped");
            ExitCode::FAILURE
        }
    }
}

fn run(role: Role) -> Result<(), Box<dyn std::error::Error>> {
    match role {
        Role::Control(arguments) => {
            control::run(Descriptors::take_from_environment()?, arguments)?;
        }
        Role::Version => println!("supvm {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(())
}
