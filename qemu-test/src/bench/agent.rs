//! What the agent costs inside a VM: each figure of a client stands beside the same work done by the
//! guest's own programs in the same run. Bytes that are lost are an error; times are only shown.

use client::file::FileWrite;
use client::{Client, Command, Output};
use protocol::vm::VmInfo;
use tokio::io::{AsyncReadExt, copy, sink};
use tokio::time::Instant;

use super::{BenchError, MEBIBYTES, number, rate, row};
use crate::vm;

const BYTES: u64 = MEBIBYTES << 20;

/// Commands that run at once, and what each prints.
const AT_ONCE: usize = 200;
const LINES: usize = 50;

/// A shell line with what is timed in the guest; it prints microseconds.
fn timed(line: &str) -> String {
    format!("a=$(date +%s%N); {line}; b=$(date +%s%N); echo $(((b - a) / 1000))")
}

async fn in_guest(client: &Client, made: &VmInfo, line: &str) -> Result<f64, BenchError> {
    let done = vm::shell(client, made, &timed(line)).await?;
    Ok(number(&done.stdout)? as f64 / 1e6)
}

/// Shows all rows.
pub(super) async fn measure(client: &Client, made: &VmInfo) -> Result<(), BenchError> {
    let handle = client.vm(vm::reference(made));
    let spawn = in_guest(client, made, "for i in $(seq 50); do sh -c true; done").await?;
    row(
        "plain `sh -c true` by the guest's shell, mean of 50",
        format!("{:.1} ms", spawn / 50.0 * 1e3),
    );

    let begun = Instant::now();
    let command = Command::shell(format!("head -c {MEBIBYTES}M /dev/zero"));
    let mut run = handle.exec(command).await?;
    let mut came = 0;
    while let Some(output) = run.next().await? {
        if let Output::Stdout(bytes) = output {
            came += bytes.len() as u64;
        }
    }
    complete("a command's output", came)?;
    row(
        &format!("{MEBIBYTES} MiB of output to a client"),
        rate(begun.elapsed().as_secs_f64()),
    );
    let plain = format!("head -c {MEBIBYTES}M /dev/zero | cat > /dev/null");
    row(
        "the same through a pipe to `cat` in the guest",
        rate(in_guest(client, made, &plain).await?),
    );

    for (place, path) in [("tmpfs", "/dev/shm/up"), ("disk", "/workspace/up")] {
        let begun = Instant::now();
        let what = FileWrite::new(path).size(BYTES).checked();
        handle
            .upload(what, tokio::io::repeat(7).take(BYTES))
            .await?;
        row(
            &format!("upload of {MEBIBYTES} MiB to {place}, with checksum"),
            rate(begun.elapsed().as_secs_f64()),
        );
        let plain = format!("cat {path} > {path}2; sync {path}2; rm {path}2");
        row(
            &format!("`cat > f; sync f` on {place} in the guest"),
            rate(in_guest(client, made, &plain).await?),
        );
        let begun = Instant::now();
        let mut download = handle.download(path).await?;
        complete("a download", copy(&mut download, &mut sink()).await?)?;
        row(
            &format!("download of {MEBIBYTES} MiB from {place}"),
            rate(begun.elapsed().as_secs_f64()),
        );
    }

    let begun = Instant::now();
    if !vm::at_once(client, made, AT_ONCE, LINES).await? {
        return Err(BenchError::Lost("one of many commands".into()));
    }
    row(
        &format!("{AT_ONCE} commands at once, no byte lost"),
        format!("{:.1} s", begun.elapsed().as_secs_f64()),
    );
    let health = handle.health().await?;
    row(
        "guest-init after all that, resident",
        format!("{:.1} MiB", health.agent_bytes as f64 / f64::from(1 << 20)),
    );
    Ok(())
}

fn complete(what: &str, came: u64) -> Result<(), BenchError> {
    if came == BYTES {
        Ok(())
    } else {
        Err(BenchError::Lost(format!("{what} ({came} of {BYTES} came)")))
    }
}
