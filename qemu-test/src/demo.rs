//! What `make run` shows: one appliance, one VM, a few commands, and how long each step took.

use std::time::Duration;

use client::{Client, Command};
use protocol::vm::VmInfo;
use tokio::time::{Instant, timeout};

use crate::appliance::{Appliance, Boot, Layout};
use crate::qemu::Accelerator;
use crate::settings::Options;
use crate::{show_tail, vm};

/// After so long it has failed.
const DEADLINE: Duration = Duration::from_secs(600);

/// Why the demonstration failed.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    Appliance(#[from] crate::appliance::ApplianceError),
    #[error(transparent)]
    Instance(#[from] crate::instance::InstanceError),
    #[error(transparent)]
    Client(#[from] client::ClientError),
    #[error("`{command}` ended with {code}: {stderr}")]
    Command {
        command: String,
        code: u8,
        stderr: String,
    },
    #[error("the appliance did not power off in time and was ended")]
    PowerOff,
    #[error("not done within {} s", DEADLINE.as_secs())]
    Deadline,
}

/// Runs it; the exit code says whether it worked.
pub(crate) async fn demo(layout: &Layout) -> u8 {
    let result = timeout(DEADLINE, steps(layout)).await;
    match result.unwrap_or(Err(DemoError::Deadline)) {
        Ok(()) => 0,
        Err(error) => {
            show_tail(layout);
            eprintln!("qemu-test: {error}");
            1
        }
    }
}

async fn steps(layout: &Layout) -> Result<(), DemoError> {
    println!("Booting the appliance in QEMU: {}.", Accelerator::detect());
    let boot = Boot {
        options: Options::DEFAULT,
        keep_data: false,
        deadline: DEADLINE + Duration::from_secs(60),
        attached: true,
    };
    let appliance = Appliance::boot(layout, boot).await?;
    step(
        appliance.boot_time,
        "the API answers, its certificate authority is the console's",
    );

    let client = appliance.client().await?;
    let begun = Instant::now();
    let made = vm::create_default(&client).await?;
    let what = format!(
        "created {} ({} CPUs, {} MiB memory, {} MiB disk, {} {})",
        made.id, made.cpus, made.memory_mib, made.disk_mib, made.template, made.template_version
    );
    step(begun.elapsed(), &what);
    let python = "import sys, hashlib; print(sys.version.split()[0], hashlib.sha256(b'supvm').hexdigest()[:16])";
    for command in [
        &["uname", "-a"][..],
        &["python3", "-c", python],
        &["node", "--version"],
    ] {
        show(&client, &made, command).await?;
    }
    let begun = Instant::now();
    client.delete(vm::reference(&made)).await?;
    step(begun.elapsed(), &format!("deleted {}", made.id));
    let begun = Instant::now();
    if !appliance.home().power_off().await? {
        return Err(DemoError::PowerOff);
    }
    step(begun.elapsed(), "the appliance is off");
    Ok(())
}

async fn show(client: &Client, made: &VmInfo, command: &[&str]) -> Result<(), DemoError> {
    let begun = Instant::now();
    let finished = vm::run(client, made, Command::argv(command.iter().copied())).await?;
    let line = command.join(" ");
    if !finished.succeeded() {
        return Err(DemoError::Command {
            command: line,
            code: finished.ended.exit_code,
            stderr: finished.stderr,
        });
    }
    step(begun.elapsed(), &format!("$ {line}"));
    for line in finished.stdout.lines() {
        println!("              {line}");
    }
    Ok(())
}

fn step(time: Duration, what: &str) {
    println!("{:>10.2} s  {what}", time.as_secs_f64());
}
