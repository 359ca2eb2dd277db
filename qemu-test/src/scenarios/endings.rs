//! The four ways a machine ends by itself, each told from the others.

use std::time::Duration;

use client::Command;
use protocol::vm::{EndReason, VmInfo, VmState};

use super::{Context, Failure, ensure};
use crate::vm;

const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a line that ends the machine; the stream may break at any point of it.
async fn end_by(context: &Context, made: &VmInfo, line: &str) -> Result<(), Failure> {
    let run = context
        .client
        .vm(vm::reference(made))
        .exec(Command::shell(line))
        .await?;
    match run.wait().await {
        Ok(ended) if ended.exit_code != 0 => {
            Err(Failure::new(format!("`{line}` ended with {ended:?}")))
        }
        _ => Ok(()),
    }
}

async fn ends_with(context: &Context, line: &str, reason: EndReason) -> Result<(), Failure> {
    let made = context.create().await?;
    context
        .shell(&made, "echo kept > /workspace/file; sync")
        .await?;
    end_by(context, &made, line).await?;
    let info = context.until(&made, VmState::Stopped, PATIENCE).await?;
    ensure(
        info.end_reason == reason && !info.end_message.is_empty(),
        || format!("expected {reason:?}: {info:?}"),
    )?;
    let file = context.shell(&made, "cat /workspace/file").await?;
    ensure(file == "kept", || file.clone())?;
    context.delete(&made).await
}

pub(crate) async fn a_power_off_inside_stops_the_vm(context: &mut Context) -> Result<(), Failure> {
    let line = "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)'; sleep 60";
    ends_with(context, line, EndReason::PoweredOff).await
}

pub(crate) async fn a_kernel_panic_is_reported_as_one(
    context: &mut Context,
) -> Result<(), Failure> {
    let line = "echo c > /proc/sysrq-trigger; sleep 60";
    ends_with(context, line, EndReason::GuestPanic).await
}

/// The kernel itself offers the triple fault as a way to reset.
pub(crate) async fn a_triple_fault_is_reported_as_one(
    context: &mut Context,
) -> Result<(), Failure> {
    let line = "echo triple > /sys/kernel/reboot/type && echo b > /proc/sysrq-trigger; sleep 60";
    ends_with(context, line, EndReason::TripleFault).await
}

pub(crate) async fn a_reboot_inside_boots_the_vm_again(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let boot_id = context.boot_id(&made).await?;
    context
        .shell(&made, "echo kept > /workspace/file; sync")
        .await?;
    let line = "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)'; sleep 60";
    end_by(context, &made, line).await?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let info = context.until(&made, VmState::Running, PATIENCE).await?;
        if info.generation > made.generation {
            ensure(info.end_reason != EndReason::GuestPanic, || {
                format!("{info:?}")
            })?;
            break;
        }
        ensure(tokio::time::Instant::now() < deadline, || {
            format!("{info:?}")
        })?;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    ensure(context.boot_id(&made).await? != boot_id, || "same boot_id")?;
    let file = context.shell(&made, "cat /workspace/file").await?;
    ensure(file == "kept", || file.clone())?;
    context.delete(&made).await
}
