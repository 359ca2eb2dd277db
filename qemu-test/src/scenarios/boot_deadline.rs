//! A VM that does not come up. This appliance's boot deadline is one second, which no machine meets
//! under emulation.

use client::ClientError;
use protocol::ErrorCode;

use super::{Context, Failure, ensure};
use crate::vm;

pub(crate) async fn a_vm_that_does_not_come_up_leaves_nothing_behind(
    context: &mut Context,
) -> Result<(), Failure> {
    let result = vm::create(&context.client, |_| {}).await;
    match result {
        Err(ClientError::Refused(body)) if body.code == ErrorCode::BootTimeout => {
            ensure(!body.detail.trim().is_empty(), || {
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
