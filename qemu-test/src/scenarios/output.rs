//! A flood of output: memory stays flat, and others are still served.
//!
//! With two CPUs per machine this load under QEMU's emulated SVM ended again and again in a
//! shutdown of a vCPU and in a corrupted stack of the appliance's own kernel, which no process of
//! ours can cause. One of two busy two-CPU machines of QEMU's own (`-M microvm`) died in the same
//! place after some minutes too, without a word: the emulation is at fault, as far as can be seen.

use std::time::Duration;

use client::{Client, Command, Output};
use protocol::vm::VmInfo;
use tokio::time::Instant;

use super::{Context, Failure, ensure};
use crate::vm;

const MEGABYTES: usize = 300;

/// Memory that the host's processes may take more during the flood than before it.
const SLACK_KIB: u64 = 24 << 10;

pub(crate) async fn three_hundred_megabytes_on_both_outputs_leave_memory_flat(
    context: &mut Context,
) -> Result<(), Failure> {
    let flooding = context.create().await?;
    let other = context.create().await?;
    let mut probe = context.probe().await?;
    // What the host's own processes hold, guest memory (a memory file) not counted.
    let memory = "for p in $(role control; role proxy; role vmm); do grep -E '^(RssAnon):' /proc/$p/status; done | awk '{s += $2} END {print s}'";
    let idle = round_trip(&context.client, &other, 30).await?;
    let before: u64 = probe.run(memory).await?.trim().parse()?;

    let line = format!("head -c {MEGABYTES}M /dev/zero >&2 & head -c {MEGABYTES}M /dev/zero; wait");
    let flood = flood(&context.client, &flooding, &line);
    tokio::pin!(flood);
    let mut peak = before;
    let mut busy = Vec::new();
    let begun = Instant::now();
    let (out, err) = loop {
        let look = async {
            let trip = round_trip(&context.client, &other, 5).await?;
            let now: u64 = probe.run(memory).await?.trim().parse()?;
            Ok::<_, Failure>((trip, now))
        };
        tokio::pin!(look);
        tokio::select! {
            done = &mut flood => match done {
                Ok(done) => break done,
                Err(failure) => {
                    // Whether the machine ended, and how, says more than the broken stream.
                    let info = context.client.get(vm::reference(&flooding)).await?;
                    return Err(Failure::new(format!("{failure}; {info:?}")));
                }
            },
            looked = &mut look => {
                let (trip, now) = looked?;
                busy.push(trip);
                peak = peak.max(now);
            }
        }
    };
    let seconds = begun.elapsed().as_secs_f64();
    let wanted = MEGABYTES << 20;
    ensure(out == wanted && err == wanted, || {
        format!("{out} and {err} bytes came, {wanted} each were written")
    })?;
    ensure(
        !busy.is_empty(),
        || "the flood was over before anything was measured",
    )?;
    busy.sort_unstable();
    let median = busy.get(busy.len() / 2).copied().unwrap_or_default();
    let ratio = median.as_secs_f64() / idle.as_secs_f64();
    println!(
        "                   {MEGABYTES} MB twice in {seconds:.1} s; host memory {before} -> {peak} KiB; another VM's exec {:.0} -> {:.0} ms ({ratio:.1}x)",
        idle.as_secs_f64() * 1e3,
        median.as_secs_f64() * 1e3,
    );
    ensure(peak <= before + SLACK_KIB, || {
        format!("host memory grew from {before} to {peak} KiB")
    })?;
    // Promised are 2x on a server's cores; two emulated ones that three machines share get room.
    ensure(ratio <= 10.0, || {
        format!("another VM's exec took {ratio:.1} times as long")
    })?;
    context.delete(&flooding).await?;
    context.delete(&other).await
}

async fn flood(client: &Client, vm: &VmInfo, line: &str) -> Result<(usize, usize), Failure> {
    let mut run = client
        .vm(vm::reference(vm))
        .exec(Command::shell(line))
        .await?;
    let (mut out, mut err) = (0, 0);
    while let Some(output) = run.next().await? {
        match output {
            Output::Stdout(bytes) => out += bytes.len(),
            Output::Stderr(bytes) => err += bytes.len(),
            _ => {}
        }
    }
    Ok((out, err))
}

/// The median time of `true`.
async fn round_trip(client: &Client, vm: &VmInfo, times: usize) -> Result<Duration, Failure> {
    let mut all = Vec::with_capacity(times);
    for _ in 0..times {
        let begun = Instant::now();
        let done = vm::run(client, vm, Command::argv(["true"])).await?;
        all.push(begun.elapsed());
        ensure(done.succeeded(), || format!("{done:?}"))?;
    }
    all.sort_unstable();
    Ok(all.get(times / 2).copied().unwrap_or_default())
}
