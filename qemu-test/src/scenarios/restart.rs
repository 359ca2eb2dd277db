//! Parts of the host that are killed while VMs run.

use std::time::Duration;

use client::{Command, Output};
use protocol::vm::VmState;
use tokio::time::sleep;

use super::{Context, Failure, ensure};
use crate::vm;

pub(crate) async fn a_killed_control_loses_no_line_of_a_running_command(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let boot_id = context.boot_id(&made).await?;
    let mut probe = context.probe().await?;
    let count = "for i in $(seq 200); do echo $i; sleep .1; done";
    let mut run = context
        .client
        .vm(vm::reference(&made))
        .exec(Command::shell(count))
        .await?;
    let mut out = Vec::new();
    let mut killed = false;
    while let Some(output) = run.next().await? {
        let Output::Stdout(bytes) = output else {
            continue;
        };
        out.extend_from_slice(&bytes);
        if !killed && out.windows(4).any(|window| window == b"\n20\n") {
            probe.run("kill -9 $(role control)").await?;
            killed = true;
        }
    }
    ensure(killed, || "control was never killed")?;
    let expected: String = (1..=200).map(|number| format!("{number}\n")).collect();
    ensure(out == expected.as_bytes(), || {
        format!("lines were lost: {}", String::from_utf8_lossy(&out))
    })?;
    context.reconnect().await?;
    ensure(
        context.boot_id(&made).await? == boot_id,
        || "another boot_id",
    )?;
    let info = context.client.get(vm::reference(&made)).await?;
    ensure(
        info.state == VmState::Running && info.generation == made.generation,
        || format!("{info:?}"),
    )?;
    context.delete(&made).await
}

pub(crate) async fn a_monitor_that_died_while_control_was_down_is_reported(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let mut probe = context.probe().await?;
    // Stopped, control sees nothing of the monitor's end; killed afterwards, it never will.
    let line = "c=$(role control); kill -STOP $c; kill -9 $(role vmm); sleep 1; kill -9 $c";
    probe.run(line).await?;
    context.reconnect().await?;
    let info = context
        .until(&made, VmState::Stopped, Duration::from_secs(60))
        .await?;
    ensure(!info.end_message.is_empty(), || format!("{info:?}"))?;
    ensure(
        info.end_reason == protocol::vm::EndReason::MonitorFailed,
        || format!("{info:?}"),
    )?;
    // It starts on request.
    let echo = context.shell(&made, "echo up").await?;
    ensure(echo == "up", || echo.clone())?;
    context.delete(&made).await
}

pub(crate) async fn a_killed_proxy_comes_back_and_the_vm_never_notices(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let boot_id = context.boot_id(&made).await?;
    let mut probe = context.probe().await?;
    let before = probe.run("role proxy").await?;
    probe.run("kill -9 $(role proxy)").await?;
    // The supervisor's back-off begins far below this.
    sleep(Duration::from_millis(200)).await;
    context.reconnect().await?;
    let after = probe.run("role proxy").await?;
    ensure(before != after, || "proxy was not killed")?;
    ensure(
        context.boot_id(&made).await? == boot_id,
        || "another boot_id",
    )?;
    context.delete(&made).await
}
