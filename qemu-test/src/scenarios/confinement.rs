//! What a monitor may touch.

use super::{Context, Failure, ensure};

pub(crate) async fn a_monitor_is_confined_and_holds_only_what_it_was_handed(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let mut probe = context.probe().await?;
    let pid = probe.run("role vmm").await?;
    let pid: u32 = pid.trim().parse()?;
    // Every thread, not only the first.
    let modes = probe
        .run(&format!(
            "cat /proc/{pid}/task/*/status | grep -E '^(Seccomp|NoNewPrivs):' | sort -u"
        ))
        .await?;
    let modes: Vec<String> = modes
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure(modes == ["NoNewPrivs:1", "Seccomp:2"], || {
        format!("{modes:?}")
    })?;
    let uid = probe.run(&format!("grep ^Uid: /proc/{pid}/status")).await?;
    ensure(uid.split_whitespace().skip(1).all(|uid| uid != "0"), || {
        uid.clone()
    })?;

    let targets = probe
        .run(&format!("for f in /proc/{pid}/fd/*; do readlink $f; done"))
        .await?;
    for target in targets.lines() {
        let handed = [
            "/dev/null",
            "/dev/kvm",
            "/dev/console",
            "/usr/lib/supvm/guest/vmlinux",
            "/usr/lib/supvm/guest/initramfs.cpio",
            "anon_inode:",
            "/memfd:",
            "socket:",
            "pipe:",
        ];
        let disk = format!("/data/vms/{}/", made.id);
        let known =
            handed.iter().any(|start| target.starts_with(start)) || target.starts_with(&disk);
        ensure(known, || format!("a descriptor on {target}: {targets}"))?;
    }
    let root = probe
        .run(&format!("ls -A /proc/{pid}/root/ | wc -l"))
        .await?;
    ensure(root.trim() == "0", || {
        format!("its root has {root} entries")
    })?;
    let interfaces = probe
        .run(&format!(
            "tail -n +3 /proc/{pid}/net/dev | cut -d: -f1 | tr -d ' '"
        ))
        .await?;
    ensure(interfaces.lines().all(|name| name == "lo"), || {
        format!("its network has {interfaces}")
    })?;
    context.delete(&made).await
}
