//! The measurements that docs/performance.md shows, as a Markdown table. They are taken, never
//! asserted: a slow machine makes large numbers, not a failure.

mod agent;

use std::path::{Path, PathBuf};
use std::time::Duration;

use client::{Client, Command, Output};
use protocol::vm::VmInfo;
use tokio::time::{Instant, timeout};

use crate::appliance::{Appliance, Boot, Layout};
use crate::qemu::Accelerator;
use crate::settings::Options;
use crate::{peer, show_tail, vm};

const DEADLINE: Duration = Duration::from_secs(1200);
const CREATES: usize = 5;
const ROUND_TRIPS: usize = 200;

/// What goes through a VM's agent at a time; emulation makes some MiB a second of it.
const MEBIBYTES: u64 = 16;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Appliance(#[from] crate::appliance::ApplianceError),
    #[error(transparent)]
    Instance(#[from] crate::instance::InstanceError),
    #[error(transparent)]
    Probe(#[from] crate::probe::ProbeError),
    #[error(transparent)]
    Client(#[from] client::ClientError),
    #[error("no number in `{0}`")]
    NoNumber(String),
    #[error("bytes are missing of {0}")]
    Lost(String),
    #[error("lost in between: {0}")]
    Io(#[from] std::io::Error),
    #[error("not done within {} s", DEADLINE.as_secs())]
    Deadline,
}

/// Measures; `target` holds the programs whose sizes are shown.
pub(crate) async fn bench(layout: &Layout, target: &Path, peer: Option<PathBuf>) -> u8 {
    let measured = timeout(DEADLINE, measure_all(layout, target, peer)).await;
    match measured.unwrap_or(Err(BenchError::Deadline)) {
        Ok(()) => 0,
        Err(error) => {
            show_tail(layout);
            eprintln!("qemu-test: {error}");
            1
        }
    }
}

const BOOT: Boot = Boot {
    options: Options::DEFAULT,
    keep_data: false,
    deadline: Duration::from_secs(DEADLINE.as_secs() + 60),
    attached: true,
};

async fn measure_all(
    layout: &Layout,
    target: &Path,
    peer: Option<PathBuf>,
) -> Result<(), BenchError> {
    measure(layout, target).await?;
    match peer {
        Some(archive) => measure_peer(layout, archive).await,
        None => Ok(()),
    }
}

async fn measure_peer(layout: &Layout, archive: PathBuf) -> Result<(), BenchError> {
    let layout = Layout {
        extra: Some(archive),
        ..layout.clone()
    };
    let appliance = Appliance::boot(&layout, BOOT).await?;
    let mut probe = appliance.probe().await?;
    let mut firsts = Vec::new();
    for _ in 0..CREATES {
        firsts.push(peer::first_output(&mut probe).await?);
    }
    let label = format!("peer: `qemu -M microvm` to first output, median of {CREATES}");
    row(&label, spread(&mut firsts));
    appliance.home().power_off().await?;
    Ok(())
}

async fn measure(layout: &Layout, target: &Path) -> Result<(), BenchError> {
    let appliance = Appliance::boot(layout, BOOT).await?;
    let client = appliance.client().await?;
    println!("Measured with {} on 2 CPUs.\n", Accelerator::detect());
    println!("| What | Value |\n|---|---|");
    row("appliance: power to API", seconds(appliance.boot_time));

    let mut firsts = Vec::new();
    for _ in 0..CREATES {
        let begun = Instant::now();
        let made = vm::create(&client, |_| {}).await?;
        first_output(&client, &made).await?;
        firsts.push(begun.elapsed());
        client.delete(vm::reference(&made)).await?;
    }
    let label = format!("create to first command's output, median of {CREATES}");
    row(&label, spread(&mut firsts));

    let made = vm::create(&client, |_| {}).await?;
    round_trips(&client, &made, "").await?;

    let status = vm::shell(&client, &made, "grep ^VmRSS: /proc/1/status").await?;
    row("guest-init, resident", kib(number(&status.stdout)?));
    let mut probe = appliance.probe().await?;
    // Private pages of all mappings but the guest's memory, which is a memory file.
    let private = "awk '/^[0-9a-f]+-[0-9a-f]+ / {guest = /memfd:/} /^Private_/ {if (!guest) sum += $2} END {print sum}' /proc/$(role vmm)/smaps";
    row(
        "a vmm process, private memory beyond guest pages",
        kib(number(&probe.run(private).await?)?),
    );
    for (name, package) in [("`supvm`", "supvm"), ("`guest-init`", "guest-init")] {
        let file = target
            .join("x86_64-unknown-linux-musl/release")
            .join(package);
        let size = std::fs::metadata(&file).map(|metadata| metadata.len() >> 10);
        row(
            &format!("{name}, stripped"),
            size.map_or("not built".into(), kib),
        );
    }
    client.delete(vm::reference(&made)).await?;

    // With two the emulated processor does not survive many programs at once (docs/performance.md).
    let made = vm::create(&client, |request| request.cpus = Some(1)).await?;
    round_trips(&client, &made, " of a VM with one CPU").await?;
    agent::measure(&client, &made).await?;
    client.delete(vm::reference(&made)).await?;
    appliance.home().power_off().await?;
    Ok(())
}

async fn round_trips(client: &Client, made: &VmInfo, of: &str) -> Result<(), BenchError> {
    let mut trips = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let begun = Instant::now();
        vm::run(client, made, Command::argv(["true"])).await?;
        trips.push(begun.elapsed());
    }
    let label = format!("`exec true` on an open connection{of}, median of {ROUND_TRIPS}");
    row(&label, millis(quantile(&mut trips, 50)));
    row(
        "the same, 90th percentile",
        millis(quantile(&mut trips, 90)),
    );
    Ok(())
}

async fn first_output(client: &Client, made: &VmInfo) -> Result<(), BenchError> {
    let mut run = client
        .vm(vm::reference(made))
        .exec(Command::shell("echo first"))
        .await?;
    while let Some(output) = run.next().await? {
        if matches!(output, Output::Stdout(_)) {
            break;
        }
    }
    Ok(())
}

fn row(what: &str, value: String) {
    println!("| {what} | {value} |");
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// The median, and the least and the most.
fn spread(times: &mut [Duration]) -> String {
    format!(
        "{} ({} to {})",
        seconds(quantile(times, 50)),
        seconds(quantile(times, 0)),
        seconds(quantile(times, 100))
    )
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Of [`MEBIBYTES`] in so many seconds.
fn rate(seconds: f64) -> String {
    format!("{:.1} MiB/s", MEBIBYTES as f64 / seconds)
}

fn kib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

fn number(text: &str) -> Result<u64, BenchError> {
    text.split_whitespace()
        .find_map(|word| word.parse().ok())
        .ok_or_else(|| BenchError::NoNumber(text.to_owned()))
}

fn quantile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times.get(last * percent / 100).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let mut times: Vec<Duration> = (1..=11).rev().map(Duration::from_secs).collect();
        assert_eq!(quantile(&mut times, 50), Duration::from_secs(6));
        assert_eq!(quantile(&mut times, 90), Duration::from_secs(10));
        assert_eq!(quantile(&mut [], 50), Duration::ZERO);
    }
}
