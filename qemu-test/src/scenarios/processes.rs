//! Processes as clients that come and go see them, end to end; what each request does in every case
//! is tested natively, beside the agent.

use protocol::process::{
    CommandMode, ProcessEnd, ProcessStarted, ResizeTerminal, StartProcess, StdinMode, TerminalSize,
};
use protocol::processes::{
    AttachFrom, AttachProcess, KillProcess, ListProcesses, ProcessInfo, ProcessPage,
    ProcessRemoved, RemoveProcess, SendSignal, StdinWritten, WriteStdin,
};
use protocol::{ErrorCode, Kind};

use super::talk::{self, Talk, eventually, follow, part, shell, until};
use super::{Context, Failure, ensure};
use crate::vm;

const SIGINT: u8 = 2;
const SIGUSR1: u8 = 10;

pub(crate) async fn a_process_outlives_its_client_and_obeys_the_next_one(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let first = Talk::with(context, &made).await?;
    let mut request = shell("echo one; echo two >&2; cat; echo bye; exit 4")?;
    request.stdin = StdinMode::Pipe;
    let id = first.start_log(&request).await?;
    first.vanish();

    let talk = Talk::with(context, &made).await?;
    part("a second client", second_client(&talk, &request)).await?;
    part("a repeated start", repeated_start(&talk)).await?;
    part("signals and kills", signals_and_kills(&talk)).await?;
    part("a background child", background_child(&talk)).await?;
    // The first one's log is still kept, and goes when it is told to.
    let kept = talk.replay(id, AttachFrom::Oldest, 0).await?;
    ensure(
        kept.merged.ends_with("bye\n") && kept.end.is_ok_and(|end| end.exit_code == 4),
        || kept.merged.clone(),
    )?;
    talk.ask::<_, ProcessRemoved>(&RemoveProcess { id }).await?;
    let timeout_ms = Some(0);
    let gone = protocol::processes::WaitProcess { id, timeout_ms };
    talk.refused(&gone, ErrorCode::NoSuchProcess).await?;
    context.delete(&made).await
}

pub(crate) async fn two_hundred_commands_at_once_lose_no_line(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let whole = vm::at_once(&context.client, &made, 200, 50).await?;
    ensure(whole, || "a line is missing".to_owned())?;
    context.delete(&made).await
}

/// Lists it, reads what it said, follows, writes to it, closes its input and waits.
async fn second_client(talk: &Talk<'_>, request: &StartProcess) -> Result<(), Failure> {
    let id = request.id;
    talk.until_said(id, 8).await?;
    let page: ProcessPage = talk.ask(&ListProcesses { after: 0 }).await?;
    let listed = page.processes.iter().find(|one| one.id == id);
    ensure(
        listed.is_some_and(|one| one.ended.is_none() && one.pid > 0),
        || format!("{page:?}"),
    )?;
    let all = talk.replay(id, AttachFrom::Oldest, 0).await?;
    ensure(
        all.merged.contains("one\n") && all.merged.contains("two\n") && all.end == Err(8),
        || format!("{all:?}"),
    )?;
    let half = talk.replay(id, AttachFrom::Offset, 4).await?;
    ensure(
        half.merged == all.merged[4..] && half.missing == 0 && half.attached.offset == 4,
        || format!("{half:?}"),
    )?;
    let mut follower = talk
        .begin(&AttachProcess {
            id,
            from: AttachFrom::Offset,
            value: 8,
            follow: true,
        })
        .await?;
    for (words, close) in [("three\n", false), ("four\n", true)] {
        let mut writer = talk.begin(&WriteStdin { id }).await?;
        writer.send_raw(Kind::STDIN, words.as_bytes()).await?;
        if close {
            writer.send_raw(Kind::STDIN_END, b"").await?;
        } else {
            writer.end().await?;
        }
        let written: StdinWritten = writer.message().await?;
        ensure(written.bytes == words.len() as u64, || {
            format!("{written:?}")
        })?;
    }
    let ended = talk.wait(id).await?;
    ensure(
        ended.end == ProcessEnd::Exited && ended.exit_code == 4,
        || format!("{ended:?}"),
    )?;
    let followed = talk::replay(&mut follower).await?;
    ensure(
        followed.merged == "three\nfour\nbye\n" && followed.end == Ok(ended),
        || format!("{followed:?}"),
    )?;
    let tail = talk.replay(id, AttachFrom::Lines, 2).await?;
    ensure(tail.merged == "four\nbye\n", || format!("{tail:?}"))
}

async fn repeated_start(talk: &Talk<'_>) -> Result<(), Failure> {
    let request = shell("echo $$ >> starts; echo up; sleep 1; exit 3")?;
    let mut both = [talk.begin(&request).await?, talk.begin(&request).await?];
    for stream in &mut both {
        let (said, ended) = follow(stream).await?;
        ensure(said == "up\n" && ended.exit_code == 3, || {
            format!("{said:?}, {ended:?}")
        })?;
    }
    let count = talk.shell("wc -l < starts").await?;
    ensure(count == "1", || format!("{count} starts"))?;
    let other = StartProcess {
        command: vec![b"true".to_vec()],
        ..request
    };
    talk.refused(&other, ErrorCode::ProcessExists).await?;
    Ok(())
}

async fn signals_and_kills(talk: &Talk<'_>) -> Result<(), Failure> {
    // What it is told by name it can answer.
    let request = shell("trap 'echo heard; exit 5' USR1; echo up; while :; do sleep 0.1; done")?;
    let id = talk.start_log(&request).await?;
    talk.until_said(id, 3).await?;
    let signal = SIGUSR1;
    talk.ask::<_, ProcessInfo>(&SendSignal { id, signal })
        .await?;
    let ended = talk.wait(id).await?;
    ensure(ended.exit_code == 5, || format!("{ended:?}"))?;
    let late = SendSignal { id, signal };
    talk.refused(&late, ErrorCode::ProcessNotRunning).await?;

    // What does not want to hear goes after the grace, and what it started goes with it.
    let deaf = "trap '' TERM; setsid sleep 7001 & echo up; while :; do sleep 0.1; done";
    let id = talk.start_log(&shell(deaf)?).await?;
    talk.until_said(id, 3).await?;
    let grace_ms = Some(500);
    let info: ProcessInfo = talk.ask(&KillProcess { id, grace_ms }).await?;
    let killed = |info: &ProcessInfo, code| {
        let ended = info.ended.as_ref();
        ended.is_some_and(|one| one.end == ProcessEnd::Killed && one.exit_code == code)
    };
    ensure(killed(&info, 137), || format!("{info:?}"))?;
    eventually("its child is gone too", async || {
        let left = talk.shell("pgrep -f '[s]leep 7001'; true").await?;
        Ok(left.is_empty())
    })
    .await?;
    // What hears needs no more than SIGTERM.
    let id = talk.start_log(&shell("exec sleep 7002")?).await?;
    let grace_ms = None;
    let info: ProcessInfo = talk.ask(&KillProcess { id, grace_ms }).await?;
    ensure(killed(&info, 143), || format!("{info:?}"))
}

async fn background_child(talk: &Talk<'_>) -> Result<(), Failure> {
    let request = shell("sleep 7003 & echo done")?;
    let (said, ended) = follow(&mut talk.begin(&request).await?).await?;
    ensure(
        said == "done\n" && ended.end == ProcessEnd::Exited && ended.output_open,
        || format!("{said:?}, {ended:?}"),
    )?;
    let left = talk.shell("pgrep -f '[s]leep 7003' | wc -l").await?;
    ensure(left == "1", || format!("{left} are left"))
}

pub(crate) async fn a_terminal_feels_local(context: &mut Context) -> Result<(), Failure> {
    let made = context.create().await?;
    let talk = Talk::with(context, &made).await?;
    part("its size", terminal_size(&talk)).await?;
    part("control-C", control_c(&talk)).await?;
    context.delete(&made).await
}

fn on_terminal(request: StartProcess) -> StartProcess {
    StartProcess {
        terminal: Some(TerminalSize {
            columns: 100,
            rows: 40,
        }),
        ..request
    }
}

async fn terminal_size(talk: &Talk<'_>) -> Result<(), Failure> {
    let line =
        "tty; stty size; trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.1; done";
    let mut stream = talk.begin(&on_terminal(shell(line)?)).await?;
    let seen = until(&mut stream, "up\r\n").await?;
    ensure(
        seen.starts_with("/dev/pts/") && seen.contains("\r\n40 100\r\n"),
        || format!("{seen:?}"),
    )?;
    let size = TerminalSize {
        columns: 33,
        rows: 11,
    };
    stream.send(&ResizeTerminal { size }).await?;
    let (seen, ended) = follow(&mut stream).await?;
    ensure(seen == "11 33\r\n" && ended.exit_code == 0, || {
        format!("{seen:?}, {ended:?}")
    })
}

/// A shell that somebody types at: control-C ends what runs in it and not the shell, which goes on
/// for the next client.
async fn control_c(talk: &Talk<'_>) -> Result<(), Failure> {
    let mut request = on_terminal(shell("")?);
    request.mode = CommandMode::Argv;
    request.command = vec![b"sh".to_vec(), b"-i".to_vec()];
    request.env = vec![(b"PS1".to_vec(), Some(b"ready> ".to_vec()))];
    let mut stream = talk.begin(&request).await?;
    stream.message::<ProcessStarted>().await?;
    until(&mut stream, "ready> ").await?;
    stream.send_raw(Kind::STDIN, b"sleep 7004\n").await?;
    let foreground = "for i in $(seq 300); do ps -o stat= -C sleep | grep -q '+' && exit; sleep 0.1; done; exit 1";
    talk.shell(foreground).await?;
    stream.send_raw(Kind::STDIN, &[3]).await?;
    until(&mut stream, "ready> ").await?;
    stream.send_raw(Kind::STDIN, b"echo was $?\n").await?;
    until(&mut stream, "was 130\r\n").await?;
    drop(stream);
    let mut next = talk
        .begin(&AttachProcess {
            id: request.id,
            from: AttachFrom::Now,
            value: 0,
            follow: true,
        })
        .await?;
    next.send_raw(Kind::STDIN, b"exit 7\n").await?;
    let replay = talk::replay(&mut next).await?;
    ensure(
        replay.end.as_ref().is_ok_and(|end| end.exit_code == 7),
        || format!("{replay:?}"),
    )?;

    // Without a shell of its own job control the signal reaches the command itself.
    let mut stream = talk
        .begin(&on_terminal(shell("echo up; exec sleep 7005")?))
        .await?;
    until(&mut stream, "up\r\n").await?;
    stream.send_raw(Kind::STDIN, &[3]).await?;
    let (seen, ended) = follow(&mut stream).await?;
    ensure(
        ended.end == ProcessEnd::Signalled && ended.signal == SIGINT,
        || format!("{seen:?}, {ended:?}"),
    )
}
