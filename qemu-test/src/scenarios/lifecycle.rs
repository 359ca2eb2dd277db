//! A VM's life as its owner sees it.

use client::Command;
use protocol::vm::{EndReason, VmState};

use super::talk::eventually;
use super::{Context, Failure, ensure};
use crate::vm;

pub(crate) async fn a_vm_is_made_used_stopped_started_and_deleted(
    context: &mut Context,
) -> Result<(), Failure> {
    let client = &context.client;
    let made = vm::create(client, |request| {
        request.labels = vec![("purpose".into(), "test".into())];
        request.name = "first".parse().ok();
        request.cpus = Some(1);
    })
    .await?;
    ensure(made.state == VmState::Running, || format!("{made:?}"))?;
    let listed = client.list().await?;
    let found = listed
        .iter()
        .any(|vm| vm.id == made.id && vm.labels == made.labels && vm.state == VmState::Running);
    ensure(found, || format!("{} is not listed: {listed:?}", made.id))?;

    let uname = context.shell(&made, "uname -sr; hostname").await?;
    let hostname = made.id.hostname();
    ensure(
        uname.starts_with("Linux 6.12") && uname.ends_with(&hostname),
        || uname.clone(),
    )?;
    let python = ["python3", "-c", "print(6 * 7)"];
    let python = vm::run(client, &made, Command::argv(python)).await?;
    ensure(python.stdout == "42\n", || format!("{python:?}"))?;
    let node = context.shell(&made, "node --version").await?;
    ensure(node.starts_with('v'), || node.clone())?;

    // The console is written beside the guest's work.
    context
        .shell(&made, "echo '<1>said to all' > /dev/kmsg")
        .await?;
    eventually("the console says what the kernel was told", async || {
        let console = client.console(vm::reference(&made)).await?;
        Ok(String::from_utf8_lossy(&console).contains("said to all"))
    })
    .await?;

    let boot_id = context.boot_id(&made).await?;
    context
        .shell(&made, "echo kept > /workspace/file; echo kept > /root/file")
        .await?;
    let stopped = client.stop(vm::reference(&made), None).await?;
    ensure(
        stopped.state == VmState::Stopped && stopped.end_reason == EndReason::Stopped,
        || format!("{stopped:?}"),
    )?;
    let started = client.start(vm::reference(&made)).await?;
    ensure(
        started.state == VmState::Running && started.generation == made.generation + 1,
        || format!("{started:?}"),
    )?;
    let files = context
        .shell(&made, "cat /workspace/file /root/file")
        .await?;
    ensure(files == "kept\nkept", || files.clone())?;
    ensure(context.boot_id(&made).await? != boot_id, || "same boot_id")?;

    // A command on a stopped VM starts it.
    client.stop(vm::reference(&made), None).await?;
    ensure(context.shell(&made, "echo up").await? == "up", || "no echo")?;
    context.delete(&made).await?;
    let listed = client.list().await?;
    ensure(listed.is_empty(), || format!("left over: {listed:?}"))?;
    let mut probe = context.probe().await?;
    let left = probe
        .run("ls /data/vms /data/staging /run/supvm/vmm; echo monitors:$(role vmm)")
        .await?;
    ensure(!left.contains("vm-") && left.ends_with("monitors:"), || {
        format!("left over: {left}")
    })
}

pub(crate) async fn a_vm_that_asks_for_nothing_gets_the_default_size(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = vm::create_default(&context.client).await?;
    ensure(
        (made.cpus, made.memory_mib, made.disk_mib) == (2, 1024, 10 << 10),
        || format!("{made:?}"),
    )?;
    let size = context
        .shell(&made, "nproc; awk '/^MemTotal:/ {print $2}' /proc/meminfo")
        .await?;
    let (cpus, memory_kib) = size.split_once('\n').unwrap_or((&size, ""));
    let memory_kib: u32 = memory_kib.trim().parse()?;
    // The kernel keeps a part for itself.
    ensure(
        cpus == "2" && (900 << 10..1 << 20).contains(&memory_kib),
        || size.clone(),
    )?;
    context.delete(&made).await
}

pub(crate) async fn commands_get_arguments_environment_and_directory(
    context: &mut Context,
) -> Result<(), Failure> {
    let client = &context.client;
    let made = vm::create(client, |request| {
        request.env = vec![("OF_VM".into(), "v".into()), ("BOTH".into(), "v".into())];
    })
    .await?;
    let command = Command::argv([
        "sh",
        "-c",
        "echo \"$OF_VM $BOTH $OWN ${HOME:-none}\"; pwd; echo \"$1\"; echo err >&2",
        "x",
        "a b  c",
    ])
    .env("BOTH", "c")
    .env("OWN", "o")
    .env_remove("HOME")
    .cwd("sub");
    context.shell(&made, "mkdir /workspace/sub").await?;
    let done = vm::run(client, &made, command).await?;
    ensure(
        done.stdout == "v c o none\n/workspace/sub\na b  c\n" && done.stderr == "err\n",
        || format!("{done:?}"),
    )?;
    let done = vm::shell(client, &made, "exit 7").await?;
    ensure(done.ended.exit_code == 7, || format!("{done:?}"))?;
    let done = vm::shell(client, &made, "kill -SEGV $$").await?;
    ensure(
        done.ended.exit_code == 139
            && done.ended.signal == 11
            && done.ended.message == "killed by signal SIGSEGV",
        || format!("{done:?}"),
    )?;

    let mut run = client
        .vm(vm::reference(&made))
        .exec(Command::argv(["wc", "-c"]).stdin_pipe())
        .await?;
    let input = run.input();
    input.write(&vec![b'x'; 200_000]).await?;
    input.end().await?;
    let mut out = Vec::new();
    while let Some(output) = run.next().await? {
        if let client::Output::Stdout(bytes) = output {
            out.extend_from_slice(&bytes);
        }
    }
    ensure(out == b"200000\n", || format!("{out:?}"))?;
    // A command that wants no more input than it took still says its last word.
    for _ in 0..5 {
        let run = client
            .vm(vm::reference(&made))
            .exec(Command::shell("head -c 1; exit 3").stdin_pipe())
            .await?;
        let input = run.input();
        let sending =
            tokio::spawn(async move { while input.write(&[b'x'; 4096]).await.is_ok() {} });
        let ended = run.wait().await?;
        sending.abort();
        ensure(ended.exit_code == 3, || format!("{ended:?}"))?;
    }
    // The last byte of a fast command always comes.
    for number in 0..50 {
        let line = format!("echo {number}; echo {number} >&2");
        let done = vm::shell(client, &made, &line).await?;
        let expected = format!("{number}\n");
        ensure(done.stdout == expected && done.stderr == expected, || {
            format!("{number}: {done:?}")
        })?;
    }
    context.delete(&made).await
}

pub(crate) async fn a_create_repeated_with_its_key_makes_one_vm(
    context: &mut Context,
) -> Result<(), Failure> {
    let request = client::new_vm()?;
    let (one, two) = tokio::join!(
        context.client.create(request.clone()),
        context.client.create(request.clone()),
    );
    let (one, two) = (one?, two?);
    let three = context.client.create(request.clone()).await?;
    ensure(one.id == two.id && two.id == three.id, || {
        format!("{} {} {}", one.id, two.id, three.id)
    })?;
    let mut other = request;
    other.cpus = Some(1);
    let conflict = context.client.create(other).await;
    super::refused(conflict, protocol::ErrorCode::IdempotencyConflict)?;
    ensure(context.client.list().await?.len() == 1, || "not one VM")?;
    context.delete(&one).await
}
