//! The system inside a VM: its disk's size, its packages, what its kernel can do.

use std::time::Duration;

use client::Command;

use super::{Context, Failure, ensure};
use crate::vm;

/// Asks the kernel for what the programs of others will ask of it.
const KERNEL: &str = include_str!("kernel.py");

pub(crate) async fn the_disk_grows_to_what_was_asked_for(
    context: &mut Context,
) -> Result<(), Failure> {
    let mib = 16 << 10;
    let made = vm::create(&context.client, |request| request.disk_mib = Some(mib)).await?;
    ensure(made.disk_mib == mib, || format!("{made:?}"))?;
    let size = context
        .shell(&made, "df --output=size -BM / | tail -1")
        .await?;
    let size: u32 = size.trim().trim_end_matches('M').parse()?;
    // ext4 keeps a few per cent for itself.
    ensure(size > mib / 100 * 93 && size <= mib, || {
        format!("the file system has {size} MiB of {mib}")
    })?;
    context.delete(&made).await
}

pub(crate) async fn the_system_inside_is_clean_and_can_do_what_containers_need(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let audit = context.shell(&made, "dpkg --audit").await?;
    ensure(audit.is_empty(), || audit.clone())?;
    context.shell(&made, "apt-get check -qq").await?;
    let locale = context
        .shell(&made, "locale charmap 2>/dev/null || echo ${LANG##*.}")
        .await?;
    ensure(locale == "UTF-8", || locale.clone())?;
    for line in [
        "unshare --mount --pid --net --ipc --uts --user --map-root-user --fork true",
        "cd /tmp && mkdir -p l u w m && unshare --mount sh -c 'mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m && echo x > m/f' && test -s u/f",
        "test -e /sys/fs/cgroup/cgroup.controllers && grep -q memory /sys/fs/cgroup/cgroup.controllers",
        "test -c /dev/net/tun && test -c /dev/fuse",
        "ip link add supvm0 type bridge && ip link add supvm1 type veth peer name supvm2 && ip link set supvm1 master supvm0 && ip link del supvm1 && ip link del supvm0",
        "grep -q nf_tables /proc/kallsyms",
        "touch /dev/shm/x && mount | grep -q 'devpts'",
    ] {
        context.shell(&made, line).await?;
    }
    let namespaces = [
        "unshare", "--net", "--mount", "--ipc", "python3", "-c", KERNEL,
    ];
    let checks = Command::argv(namespaces).deadline(Duration::from_secs(150));
    let done = vm::run(&context.client, &made, checks).await?;
    ensure(
        done.succeeded() && done.stdout.lines().count() == 10,
        || format!("{}{}{:?}", done.stdout, done.stderr, done.ended),
    )?;
    let modules = context
        .shell(&made, "cat /proc/modules 2>/dev/null | wc -l")
        .await?;
    ensure(modules == "0", || format!("{modules} modules loaded"))?;
    context.delete(&made).await
}
