//! What the agent bears in a machine of its own, where control groups and the kernel's OOM killer are
//! real. What needs neither is tested natively, beside the agent.

use std::time::Duration;

use client::Command;
use protocol::process::ProcessEnd;
use protocol::vm::VmInfo;

use super::{Context, Failure, ensure};
use crate::vm::{self, Finished};

/// More than a VM of the default size has.
const TOO_MUCH: &str = "python3 -c \"x = []\nwhile True: x.append(bytearray(32 << 20))\"";

async fn ends(
    context: &Context,
    made: &VmInfo,
    command: Command,
    end: ProcessEnd,
    code: u8,
) -> Result<Finished, Failure> {
    let done = vm::run(&context.client, made, command).await?;
    ensure(
        done.ended.end == end && done.ended.exit_code == code,
        || format!("expected {end:?} with {code}: {done:?}"),
    )?;
    Ok(done)
}

pub(crate) async fn limits_end_a_command_with_their_reason(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    // Its own limit, then the machine's.
    let limited = Command::shell("python3 -c \"x = bytearray(300 << 20)\"").memory(64 << 20);
    let oom = ProcessEnd::OutOfMemory;
    let done = ends(context, &made, limited, oom, 137).await?;
    ensure(done.ended.message.contains("out of memory"), || {
        format!("{done:?}")
    })?;
    let enough = Command::shell("python3 -c \"x = bytearray(30 << 20)\"").memory(256 << 20);
    ends(context, &made, enough, ProcessEnd::Exited, 0).await?;
    ends(context, &made, Command::shell(TOO_MUCH), oom, 137).await?;

    let late = Command::shell("sleep 1000").deadline(Duration::from_secs(1));
    let done = vm::run(&context.client, &made, late).await?;
    ensure(
        done.ended.end == ProcessEnd::TimedOut
            && done.ended.message.starts_with("timed out after 1"),
        || format!("{done:?}"),
    )?;
    let who = Command::shell("id -un; echo $HOME").user("nobody");
    let done = ends(context, &made, who, ProcessEnd::Exited, 0).await?;
    ensure(done.stdout.starts_with("nobody\n"), || format!("{done:?}"))?;
    context.delete(&made).await
}

pub(crate) async fn the_agent_outlives_whatever_its_commands_do(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let score = context.shell(
        &made,
        "cat /proc/1/oom_score_adj; cat /proc/self/oom_score_adj",
    );
    let score = score.await?;
    ensure(score == "-1000\n0", || format!("oom_score_adj {score}"))?;

    // A fork bomb is bounded, and its deadline takes all of it.
    let bomb = Command::argv(["bash", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1000"]);
    let bomb = bomb.deadline(Duration::from_secs(5));
    let done = vm::run(&context.client, &made, bomb).await?;
    ensure(done.ended.end == ProcessEnd::TimedOut, || {
        format!("{done:?}")
    })?;
    // Those that were being made just then go when the grace is over.
    let gone =
        "for second in $(seq 30); do pgrep -x bash > /dev/null || exit 0; sleep 1; done; exit 1";
    context.shell(&made, gone).await?;

    let everything = Command::shell("kill -9 -1; sleep 5");
    vm::run(&context.client, &made, everything).await?;
    let alive = context.shell(&made, "echo alive").await?;
    ensure(alive == "alive", || alive.clone())?;

    // A full disk takes nothing from a client that listens.
    let full = "fallocate -l $(df --output=avail -B1 / | tail -1) /full; \
                dd if=/dev/zero of=/more bs=1M count=64 2> /dev/null; df --output=avail / | tail -1; \
                seq 100000 | tail -1; rm /full /more";
    let done = context.shell(&made, full).await?;
    ensure(done.ends_with("\n100000"), || done.clone())?;

    let nothing = Command::shell("rm -rf --no-preserve-root / 2> /dev/null; echo gone");
    let done = vm::run(&context.client, &made, nothing).await?;
    ensure(done.stdout == "gone\n", || format!("{done:?}"))?;
    let none = Command::argv(["true"]).cwd("/");
    ends(context, &made, none, ProcessEnd::NotFound, 127).await?;
    let stopped = context.client.stop(vm::reference(&made), None).await?;
    ensure(stopped.end_message.contains("by request"), || {
        format!("{stopped:?}")
    })?;
    context.delete(&made).await
}
