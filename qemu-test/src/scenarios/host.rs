//! The host goes down and comes back: by its button, and by a power cut.

use protocol::vm::{EndReason, VmState};

use super::{Context, Failure, ensure};
use crate::vm;

pub(crate) async fn vms_and_their_files_outlive_a_reboot_of_the_host(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let boot_id = context.boot_id(&made).await?;
    // Not synced by the guest's own command: the stop does that.
    context.shell(&made, "echo kept > /workspace/file").await?;
    let clean = context.appliance.home().power_off().await?;
    ensure(clean, || "the appliance did not power off in time")?;
    context.appliance.boot_again().await?;
    context.reconnect().await?;
    let info = context.client.get(vm::reference(&made)).await?;
    ensure(info.state == VmState::Stopped, || format!("{info:?}"))?;
    ensure(
        matches!(
            info.end_reason,
            EndReason::HostRestarted | EndReason::Stopped
        ),
        || format!("{info:?}"),
    )?;
    let file = context.shell(&made, "cat /workspace/file").await?;
    ensure(file == "kept", || file.clone())?;
    ensure(context.boot_id(&made).await? != boot_id, || "same boot_id")?;
    context.delete(&made).await
}

pub(crate) async fn an_acknowledged_create_survives_a_power_cut(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let gone = context.create().await?;
    context
        .shell(&made, "echo kept > /workspace/file; sync")
        .await?;
    context.delete(&gone).await?;
    context.appliance.home().cut_power().await?;
    context.appliance.boot_again().await?;
    context.reconnect().await?;
    let info = context.client.get(vm::reference(&made)).await?;
    ensure(
        info.state == VmState::Stopped && info.end_reason == EndReason::HostRestarted,
        || format!("{info:?}"),
    )?;
    let file = context.shell(&made, "cat /workspace/file").await?;
    ensure(file == "kept", || file.clone())?;
    let listed = context.client.list().await?;
    ensure(listed.len() == 1, || {
        format!("a deleted VM is back: {listed:?}")
    })?;
    context.delete(&made).await
}
