//! Boots the appliance under QEMU and drives it from outside, as its owner does: over its API. The
//! end-to-end scenarios, the demonstration of `make run` and the measurements of `make bench` live
//! here. Nothing here replaces the appliance by something easier to boot.

mod appliance;
mod bench;
mod busybox;
mod console;
mod cpio;
mod demo;
mod instance;
mod peer;
mod probe;
mod qemu;
mod qmp;
mod run;
mod scenarios;
mod settings;
mod vm;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::appliance::{Appliance, ApplianceError, Boot, Layout};
use crate::console::Growth;
use crate::instance::{Home, InstanceError};
use crate::settings::Options;

/// Boots the supvm appliance under QEMU and drives it from outside.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Cargo's target directory, with the images in `image`; instances go into `qemu-test`.
    #[arg(
        long,
        global = true,
        env = "CARGO_TARGET_DIR",
        default_value = "target"
    )]
    target: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boots the appliance and leaves it running; writes target/qemu-test/env.
    Up {
        /// Begin with an empty data disk.
        #[arg(long)]
        fresh: bool,
        /// Hours after which it is ended in any case.
        #[arg(long, default_value_t = 12)]
        hours: u64,
    },
    /// Powers it off.
    Down,
    /// Says whether it runs.
    Status,
    /// Shows its console.
    Console {
        /// Go on as it grows.
        #[arg(short)]
        follow: bool,
    },
    /// Boots, makes a VM, runs a few commands in it, deletes it, powers off.
    Demo,
    /// Runs the end-to-end scenarios whose name contains FILTER.
    Run {
        /// A part of a name.
        filter: Option<String>,
    },
    /// Lists the scenarios.
    List,
    /// Measures and prints a Markdown table.
    Bench {
        /// The archive that `image-builder peer-qemu` made: QEMU, to be measured beside us.
        #[arg(long)]
        peer: Option<PathBuf>,
    },
    #[command(hide = true)]
    Watch(watch::WatchArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("qemu-test: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        if let Command::Watch(watched) = arguments.command {
            return watch::watch(watched).await.unwrap_or_else(|error| {
                eprintln!("qemu-test watch: {error}");
                1
            });
        }
        // Whoever is interrupted drops what it holds, and with it what it started.
        tokio::select! {
            code = command(arguments) => code,
            code = interrupted() => code,
        }
    });
    // Blocked reads of ours need not end first.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ExitCode::from(code)
}

async fn interrupted() -> u8 {
    let signals = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
        signal(SignalKind::hangup()),
    );
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = signals else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    eprintln!("qemu-test: interrupted; ending what was started");
    130
}

async fn command(arguments: Arguments) -> u8 {
    let image = arguments.target.join("image");
    let base = arguments.target.join("qemu-test");
    let layout = |name: &str| Layout {
        image: image.clone(),
        home: match name {
            "" => base.clone(),
            name => base.join(name),
        },
        extra: None,
    };
    let done = match arguments.command {
        Command::Up { fresh, hours } => up(&layout(""), fresh, hours).await,
        Command::Down => down(&layout("")).await,
        Command::Status => status(&layout("")),
        Command::Console { follow } => show_console(&layout(""), follow).await,
        Command::Demo => return demo::demo(&layout("demo")).await,
        Command::Run { filter } => return run::run(&layout("run"), filter.as_deref()).await,
        Command::List => {
            for scenario in scenarios::ALL {
                println!("{}", scenario.name);
            }
            Ok(())
        }
        Command::Bench { peer } => {
            return bench::bench(&layout("bench"), &arguments.target, peer).await;
        }
        Command::Watch(_) => Ok(()),
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("qemu-test: {error}");
            1
        }
    }
}

async fn up(layout: &Layout, fresh: bool, hours: u64) -> Result<(), ApplianceError> {
    let boot = Boot {
        options: Options::DEFAULT,
        keep_data: !fresh,
        deadline: Duration::from_secs(hours.saturating_mul(3600)),
        attached: false,
    };
    eprintln!("qemu-test: booting ({})", qemu::Accelerator::detect());
    let appliance = match Appliance::boot(layout, boot).await {
        Ok(appliance) => appliance,
        Err(error) => {
            show_tail(layout);
            return Err(error);
        }
    };
    println!(
        "The appliance answers after {:.1} s. To use it:\n    . {}",
        appliance.boot_time.as_secs_f64(),
        appliance.home().join("env").display()
    );
    Ok(())
}

async fn down(layout: &Layout) -> Result<(), ApplianceError> {
    let home = Home::open(&layout.home)?;
    if home.running().is_none() {
        println!("The appliance is not running.");
    } else if home.power_off().await? {
        println!("The appliance is off.");
    } else {
        println!("The appliance did not power off in time and was ended.");
    }
    Ok(())
}

fn status(layout: &Layout) -> Result<(), ApplianceError> {
    let home = Home::open(&layout.home)?;
    println!(
        "{}",
        if home.running().is_some() {
            "up"
        } else {
            "down"
        }
    );
    Ok(())
}

async fn show_console(layout: &Layout, follow: bool) -> Result<(), ApplianceError> {
    let home = Home::open(&layout.home)?;
    let console = home.console();
    let mut output = tokio::io::stdout();
    let mut shown = 0;
    let growth = Growth::watch(console.path()).map_err(InstanceError::from)?;
    loop {
        let text = console.text()?;
        let new = text.get(shown..).unwrap_or(&text);
        output
            .write_all(new.as_bytes())
            .await
            .map_err(InstanceError::from)?;
        output.flush().await.map_err(InstanceError::from)?;
        shown = text.len();
        if !follow || home.running().is_none() {
            return Ok(());
        }
        growth.next().await.map_err(InstanceError::from)?;
    }
}

/// Shows the end of the console on standard error.
fn show_tail(layout: &Layout) {
    if let Ok(home) = Home::open(&layout.home) {
        for line in home.console().tail().lines() {
            eprintln!("    | {line}");
        }
    }
}
