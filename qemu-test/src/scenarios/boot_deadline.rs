//! A VM that does not come up: in this appliance every guest hangs before its agent.

use client::ClientError;
use protocol::ErrorCode;

use super::{Context, Failure, ensure};
use crate::settings::STUCK;
use crate::vm;

pub(crate) async fn a_vm_that_does_not_come_up_leaves_nothing_behind(
    context: &mut Context,
) -> Result<(), Failure> {
    let result = vm::create(&context.client, |_| {}).await;
    match result {
        Err(ClientError::Refused(body)) if body.code == ErrorCode::BootTimeout => {
            ensure(body.detail.contains(STUCK), || {
                format!("no console in: {body:?}")
            })?;
        }
        other => return Err(Failure::new(format!("expected BootTimeout, got {other:?}"))),
    }
    let listed = context.client.list().await?;
    ensure(listed.is_empty(), || format!("left over: {listed:?}"))?;
    let mut probe = context.probe().await?;
    let left = probe
        .run("ls /data/vms /data/staging /run/supvm/vmm /sys/fs/cgroup/supvm; echo monitors:$(role vmm)")
        .await?;
    ensure(!left.contains("vm-") && left.ends_with("monitors:"), || {
        format!("left over: {left}")
    })
}
