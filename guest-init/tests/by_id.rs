//! What a client can do with a process that it finds by its id: read its output again, write to it,
//! wait for it, end it. Processes belong to no connection.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, argv, eventually, shell};
use protocol::id::ProcessId;
use protocol::process::{OutputMode, ProcessEnd, StartProcess, StdinMode};
use protocol::processes::{
    AttachFrom, AttachProcess, KillProcess, ListProcesses, ProcessInfo, ProcessPage,
    ProcessRemoved, RemoveProcess, SendSignal, StdinWritten, WaitProcess, WriteStdin,
};
use protocol::{ErrorBody, ErrorCode, Kind, message};

const UNKNOWN: ProcessId = ProcessId([0xee; 16]);

fn kill(agent: &Agent, id: ProcessId, grace_ms: Option<u32>) -> Result<ProcessInfo, ErrorBody> {
    agent.ask(&KillProcess { id, grace_ms })
}

#[test]
fn a_client_leaves_and_another_comes_back_for_everything_that_was_said() {
    let agent = Agent::start();
    let mut request = shell("echo one; echo two >&2; read x; echo $x; exit 4");
    request.stdin = StdinMode::Pipe;
    let mut first = agent.connect();
    first.send(&request);
    first.started();
    drop(first);
    let mut second = agent.connect();
    second.send(&AttachProcess {
        id: request.id,
        from: AttachFrom::Oldest,
        value: 0,
        follow: true,
    });
    second.send_raw(Kind::STDIN, b"three\n");
    let replay = second.replay();
    assert_eq!(replay.attached.offset, 0);
    let text = String::from_utf8(replay.merged).unwrap();
    assert!(text.contains("one\n") && text.contains("two\n"), "{text}");
    assert!(text.contains("three\n"), "{text}");
    assert_eq!(replay.end.unwrap().exit_code, 4);
    assert_eq!(agent.look(request.id).unwrap().bytes, 14);
}

#[test]
fn each_reader_reads_from_its_own_offset() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("printf 0123456789; sleep 600"));
    eventually("the output is there", || {
        agent.look(id).unwrap().bytes == 10
    });
    for from in 0..=10 {
        let replay = agent.replay(id, AttachFrom::Offset, from, false);
        assert_eq!(replay.merged, &b"0123456789"[from as usize..]);
        assert_eq!((replay.missing, replay.end), (0, Err(10)));
    }
    let now = agent.replay(id, AttachFrom::Now, 0, false);
    assert_eq!((now.attached.offset, now.merged.len()), (10, 0));
    let mut beyond = agent.connect();
    beyond.send(&AttachProcess {
        id,
        from: AttachFrom::Offset,
        value: 11,
        follow: true,
    });
    assert_eq!(beyond.error().code, ErrorCode::InvalidArgument);
    kill(&agent, id, Some(0)).unwrap();
}

#[test]
fn output_that_nobody_listens_to_is_kept_on_the_disk_and_comes_back_whole() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("seq 1 1000000; echo end >&2"));
    let info = agent.wait(id);
    let expected: String = (1..=1_000_000).map(|i| format!("{i}\n")).collect();
    assert_eq!(info.bytes, expected.len() as u64 + 4);
    assert_eq!(info.dropped, 0);
    let replay = agent.replay(id, AttachFrom::Oldest, 0, true);
    assert!(replay.merged == [expected.as_bytes(), b"end\n"].concat());
    let middle = 3_000_001;
    let replay = agent.replay(id, AttachFrom::Offset, middle, false);
    assert!(replay.merged == [&expected.as_bytes()[middle as usize..], b"end\n"].concat());
    // More than its window: it must have gone to the disk.
    let logs = agent.directory.path().join("logs");
    let files = std::fs::read_dir(logs).unwrap().flatten();
    let size: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    assert!(size > 4 << 20, "{size}");
}

#[test]
fn the_log_is_bounded_the_oldest_goes_first_and_the_loss_is_counted() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("head -c 100000000 /dev/zero; echo last"));
    let info = agent.wait(id);
    assert_eq!(info.bytes, 100_000_005);
    // The last piece is written a moment after the end.
    eventually("the log is within its bound", || {
        let info = agent.look(id).unwrap();
        info.bytes - info.dropped <= 64 << 20
    });
    let info = agent.look(id).unwrap();
    let kept = info.bytes - info.dropped;
    assert!(kept >= 56 << 20, "{kept}");
    let oldest = agent.replay(id, AttachFrom::Oldest, 0, true);
    assert_eq!(oldest.attached.offset, info.dropped);
    assert_eq!((oldest.merged.len() as u64, oldest.missing), (kept, 0));
    assert!(oldest.merged.ends_with(b"last\n"));
    // From the beginning, the gap is said in its place.
    let all = agent.replay(id, AttachFrom::Offset, 0, true);
    assert_eq!((all.merged.len() as u64, all.missing), (kept, info.dropped));
    assert!(agent.status_kib("VmRSS") < 8 << 10);
}

#[test]
fn all_logs_together_are_bounded_and_the_one_that_ended_first_goes_first() {
    let agent = Agent::start();
    let ids: Vec<_> = (0..9)
        .map(|_| {
            let id = agent.start_log(&shell("head -c 66000000 /dev/zero"));
            agent.wait(id);
            id
        })
        .collect();
    eventually("the first is forgotten", || {
        agent
            .look(ids[0])
            .is_err_and(|error| error.code == ErrorCode::NoSuchProcess)
    });
    let size = || {
        let logs = agent.directory.path().join("logs");
        let files = std::fs::read_dir(logs).unwrap().flatten();
        files
            .filter_map(|file| Some(file.metadata().ok()?.len()))
            .sum::<u64>()
    };
    eventually("they are within the bound", || size() <= 512 << 20);
    assert!(size() > 400 << 20, "{}", size());
    let last = agent.replay(ids[8], AttachFrom::Oldest, 0, true);
    assert_eq!(last.merged.len(), 66_000_000);
}

#[test]
fn a_log_start_is_held_back_by_no_reader() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("sleep 0.2; head -c 20000000 /dev/zero"));
    let mut stuck = agent.connect();
    stuck.send(&AttachProcess {
        id,
        from: AttachFrom::Oldest,
        value: 0,
        follow: true,
    });
    assert_eq!(agent.wait(id).bytes, 20_000_000);
    // What it has not read was kept for it.
    assert_eq!(stuck.replay().merged.len(), 20_000_000);
}

#[test]
fn a_follow_start_is_held_back_only_while_somebody_follows() {
    let agent = Agent::start();
    let request = shell("head -c 20000000 /dev/zero");
    let mut stuck = agent.connect();
    stuck.send(&request);
    stuck.started();
    let timeout_ms = Some(500);
    let held: ProcessInfo = agent
        .ask(&WaitProcess {
            id: request.id,
            timeout_ms,
        })
        .unwrap();
    assert_eq!(held.ended, None);
    assert!(held.bytes < 4_000_000, "{}", held.bytes);
    drop(stuck);
    let free = agent.wait(request.id);
    assert_eq!((free.bytes, free.dropped), (20_000_000, 0));
}

#[test]
fn several_readers_of_one_process_all_get_everything() {
    let agent = Agent::start();
    let mut request = shell("read go; seq 1 300000");
    request.stdin = StdinMode::Pipe;
    let mut first = agent.connect();
    first.send(&request);
    first.started();
    let expected: String = (1..=300_000).map(|i| format!("{i}\n")).collect();
    let mut readers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = agent.connect();
            client.send(&AttachProcess {
                id: request.id,
                from: AttachFrom::Oldest,
                value: 0,
                follow: true,
            });
            client
        })
        .collect();
    first.send_raw(Kind::STDIN, b"go\n");
    std::thread::scope(|scope| {
        for reader in &mut readers {
            scope.spawn(|| assert!(reader.replay().merged == expected.as_bytes()));
        }
        assert!(first.output().stdout == expected.as_bytes());
    });
}

#[test]
fn the_last_lines_come_without_reading_the_stream() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("seq 1 400000; printf unfinished"));
    agent.wait(id);
    for (lines, expected) in [
        (0, ""),
        (1, "unfinished"),
        (3, "399999\n400000\nunfinished"),
    ] {
        let tail = agent.replay(id, AttachFrom::Lines, lines, false);
        assert_eq!(String::from_utf8(tail.merged).unwrap(), expected);
        assert!(tail.end.is_ok(), "it has ended");
    }
    // At most a mebibyte comes, however many are asked for.
    let tail = agent.replay(id, AttachFrom::Lines, u64::MAX, false);
    assert_eq!(tail.merged.len(), 1 << 20);
    let short = agent.start_log(&shell("echo a; echo b"));
    agent.wait(short);
    for (lines, expected) in [(1, "b\n"), (2, "a\nb\n"), (9, "a\nb\n")] {
        let tail = agent.replay(short, AttachFrom::Lines, lines, false);
        assert_eq!(String::from_utf8(tail.merged).unwrap(), expected);
    }
    let silent = agent.start_log(&shell("true"));
    agent.wait(silent);
    let tail = agent.replay(silent, AttachFrom::Lines, 5, false);
    assert_eq!(tail.merged, b"");
}

#[test]
fn what_runs_and_what_ended_is_listed_in_pages() {
    let agent = Agent::start();
    let running = agent.start_log(&argv(&["sleep", "600"]));
    let ids: Vec<_> = (0..70).map(|_| agent.start_log(&shell("exit 3"))).collect();
    for id in &ids {
        agent.wait(*id);
    }
    let (mut all, mut after, mut pages) = (Vec::new(), 0, 0);
    loop {
        let page: ProcessPage = agent.ask(&ListProcesses { after }).unwrap();
        pages += 1;
        after = page.processes.last().unwrap().number;
        all.extend(page.processes);
        if !page.more {
            break;
        }
    }
    assert_eq!((pages, all.len()), (2, 71));
    assert!(all.is_sorted_by_key(|one| one.number));
    let first = &all[0];
    assert_eq!((first.id, &first.ended), (running, &None));
    assert_eq!(first.command, [b"sleep".to_vec(), b"600".to_vec()]);
    assert!(first.pid > 0 && first.started_unix_ms > 0 && first.ended_unix_ms == 0);
    let last = &all[70];
    assert_eq!(last.id, ids[69]);
    assert_eq!(last.ended.as_ref().unwrap().exit_code, 3);
    assert!(last.ended_unix_ms >= last.started_unix_ms);
    kill(&agent, running, Some(0)).unwrap();
}

#[test]
fn waiting_ends_with_the_process_or_with_the_time() {
    let agent = Agent::start();
    let mut request = shell("read x; exit 5");
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    let timeout_ms = Some(50);
    let early: ProcessInfo = agent.ask(&WaitProcess { id, timeout_ms }).unwrap();
    assert_eq!(early.ended, None);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| agent.wait(id))).collect();
        write_stdin(&agent, id, b"\n", false).unwrap();
        for one in waiting {
            assert_eq!(one.join().unwrap().ended.unwrap().exit_code, 5);
        }
    });
}

fn write_stdin(
    agent: &Agent,
    id: ProcessId,
    bytes: &[u8],
    close: bool,
) -> Result<StdinWritten, ErrorBody> {
    let mut client = agent.connect();
    client.send(&WriteStdin { id });
    for piece in bytes.chunks(50_000) {
        client.send_raw(Kind::STDIN, piece);
    }
    if close {
        client.send_raw(Kind::STDIN_END, b"");
    } else {
        client.socket.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let frame = client.frame().unwrap();
    match message::decode(&frame) {
        Ok(written) => Ok(written),
        Err(message::MessageError::Refused(error)) => Err(error),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn input_is_written_and_closed_by_id_and_stays_open_in_between() {
    let agent = Agent::start();
    let mut request = shell("wc -c");
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    let long = vec![7; 150_000];
    let first = write_stdin(&agent, id, &long, false).unwrap();
    assert_eq!(first.bytes, 150_000);
    let second = write_stdin(&agent, id, b"four", false).unwrap();
    assert_eq!(second.bytes, 4);
    assert_eq!(agent.look(id).unwrap().ended, None);
    write_stdin(&agent, id, b"", true).unwrap();
    agent.wait(id);
    let replay = agent.replay(id, AttachFrom::Oldest, 0, true);
    let text = String::from_utf8(replay.merged).unwrap();
    assert_eq!(text.trim(), "150004");
}

#[test]
fn input_that_was_closed_ends_although_others_could_write_too() {
    let agent = Agent::start();
    let mut request = argv(&["cat"]);
    request.stdin = StdinMode::Pipe;
    let mut starter = agent.connect();
    starter.send(&request);
    starter.started();
    let mut other = agent.connect();
    other.send(&AttachProcess {
        id: request.id,
        from: AttachFrom::Oldest,
        value: 0,
        follow: true,
    });
    let mut writer = agent.connect();
    writer.send(&WriteStdin { id: request.id });
    write_stdin(&agent, request.id, b"all\n", true).unwrap();
    assert_eq!(starter.output().text(), "all\n");
    assert_eq!(other.replay().merged, b"all\n");
}

#[test]
fn input_after_the_end_is_refused_and_closing_twice_is_quiet() {
    let agent = Agent::start();
    let mut request = shell("cat > /dev/null; sleep 0.3");
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    write_stdin(&agent, id, b"", true).unwrap();
    write_stdin(&agent, id, b"", true).unwrap();
    let closed = write_stdin(&agent, id, b"x", false).unwrap_err();
    assert_eq!(closed.code, ErrorCode::InputClosed);
    agent.wait(id);
    let ended = write_stdin(&agent, id, b"x", false).unwrap_err();
    assert_eq!(ended.code, ErrorCode::ProcessNotRunning);
    write_stdin(&agent, id, b"", true).unwrap();
    let none = agent.start_log(&argv(&["sleep", "600"]));
    let without = write_stdin(&agent, none, b"x", false).unwrap_err();
    assert_eq!(without.code, ErrorCode::InputClosed);
    kill(&agent, none, Some(0)).unwrap();
}

#[test]
fn a_signal_by_id_does_not_wait_behind_unread_input() {
    let agent = Agent::start();
    let mut request = argv(&["sleep", "600"]);
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    let mut writer = agent.connect();
    writer.send(&WriteStdin { id });
    writer.socket.set_nonblocking(true).unwrap();
    let bytes = {
        let mut bytes = Vec::new();
        protocol::frame::append(&mut bytes, Kind::STDIN, &[1; 60_000]).unwrap();
        bytes
    };
    // Until nothing goes in any more.
    loop {
        use std::io::Write;
        match writer.socket.write(&bytes) {
            Ok(count) if count == bytes.len() => {}
            _ => break,
        }
    }
    let signal = 10;
    agent
        .ask::<_, ProcessInfo>(&SendSignal { id, signal })
        .unwrap();
    assert_eq!(agent.wait(id).ended.unwrap().signal, 10);
    let late = agent.ask::<_, ProcessInfo>(&SendSignal { id, signal });
    assert_eq!(late.unwrap_err().code, ErrorCode::ProcessNotRunning);
    let none = agent.ask::<_, ProcessInfo>(&SendSignal { id, signal: 0 });
    assert_eq!(none.unwrap_err().code, ErrorCode::InvalidArgument);
}

#[test]
fn kill_asks_first_and_answers_when_the_process_is_gone() {
    let agent = Agent::start();
    let polite = shell("trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.02; done");
    let id = agent.start_log(&polite);
    eventually("it is up", || agent.look(id).unwrap().bytes == 3);
    let info = kill(&agent, id, None).unwrap();
    let ended = info.ended.unwrap();
    assert_eq!((ended.end, ended.exit_code), (ProcessEnd::Killed, 9));
    assert_eq!(ended.message, "killed");
    let said = agent.replay(id, AttachFrom::Oldest, 0, true);
    // Some shells remark on standard error that a command of theirs was ended too.
    let said = String::from_utf8(said.merged).unwrap();
    assert!(said.contains("bye\n"), "{said}");
    // Again is no error.
    assert_eq!(kill(&agent, id, None).unwrap().ended.unwrap().exit_code, 9);
}

#[test]
fn what_does_not_hear_is_killed_after_the_grace_and_so_is_what_it_started() {
    let agent = Agent::start_with_cgroup();
    for grace_ms in [Some(0), Some(200)] {
        let line = "trap '' TERM; setsid sleep 602 & echo $!; while :; do sleep 0.05; done";
        let id = agent.start_log(&shell(line));
        eventually("it is up", || agent.look(id).unwrap().bytes > 0);
        let said = agent.replay(id, AttachFrom::Oldest, 0, false).merged;
        let child = format!("/proc/{}", String::from_utf8(said).unwrap().trim());
        let ended = kill(&agent, id, grace_ms).unwrap().ended.unwrap();
        assert_eq!((ended.end, ended.exit_code), (ProcessEnd::Killed, 137));
        eventually("its child is gone", || {
            !std::path::Path::new(&child).exists()
        });
    }
}

#[test]
fn a_follower_that_does_not_read_cannot_hold_up_the_end() {
    let agent = Agent::start();
    let request = shell("yes | cat");
    let mut stuck = agent.connect();
    stuck.send(&request);
    stuck.started();
    eventually("it is held back", || {
        let before = agent.look(request.id).unwrap().bytes;
        std::thread::sleep(std::time::Duration::from_millis(100));
        before > 0 && agent.look(request.id).unwrap().bytes == before
    });
    let info = kill(&agent, request.id, None).unwrap();
    assert_eq!(info.ended.unwrap().end, ProcessEnd::Killed);
    // And nothing that was read before is lost to it.
    assert_eq!(stuck.output().stdout.len() as u64, info.bytes);
}

#[test]
fn a_deadline_is_told_as_one_and_not_as_an_exit() {
    let agent = Agent::start();
    let mut request = shell("echo begun; sleep 600");
    request.deadline_ms = Some(300);
    let output = agent.run(&request);
    assert_eq!(output.text(), "begun\n");
    assert_eq!(output.ended.end, ProcessEnd::TimedOut);
    assert_eq!(output.ended.message, "timed out after 0.3 s");
    assert_eq!(output.ended.exit_code, 128 + 15);
    let mut in_time = shell("exit 3");
    in_time.deadline_ms = Some(u64::MAX);
    assert_eq!(agent.run(&in_time).ended.exit_code, 3);
}

#[test]
fn an_ended_process_can_be_forgotten_with_its_log() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("seq 1 200000; read x"));
    agent.wait(id);
    let files = || {
        let logs = agent.directory.path().join("logs");
        std::fs::read_dir(logs).unwrap().count()
    };
    eventually("the log is written", || files() == 1);
    let running = agent.start_log(&argv(&["sleep", "600"]));
    let early = agent.ask::<_, ProcessRemoved>(&RemoveProcess { id: running });
    assert_eq!(early.unwrap_err().code, ErrorCode::ProcessRunning);
    agent
        .ask::<_, ProcessRemoved>(&RemoveProcess { id })
        .unwrap();
    assert_eq!(agent.look(id).unwrap_err().code, ErrorCode::NoSuchProcess);
    assert_eq!(files(), 0);
    kill(&agent, running, Some(0)).unwrap();
}

#[test]
fn an_unknown_id_is_a_named_error_for_every_request() {
    let agent = Agent::start();
    let id = UNKNOWN;
    let mut codes = vec![
        agent.look(id).unwrap_err().code,
        kill(&agent, id, None).unwrap_err().code,
        write_stdin(&agent, id, b"x", true).unwrap_err().code,
    ];
    let signal = agent.ask::<_, ProcessInfo>(&SendSignal { id, signal: 9 });
    codes.push(signal.unwrap_err().code);
    let removed = agent.ask::<_, ProcessRemoved>(&RemoveProcess { id });
    codes.push(removed.unwrap_err().code);
    let mut client = agent.connect();
    client.send(&AttachProcess {
        id,
        from: AttachFrom::Oldest,
        value: 0,
        follow: true,
    });
    codes.push(client.error().code);
    assert_eq!(codes, [ErrorCode::NoSuchProcess; 6]);
}

#[test]
fn logs_and_ends_are_still_there_after_a_restart_and_what_ran_is_lost_by_name() {
    let mut agent = Agent::start();
    let ended = agent.start_log(&shell("echo kept; exit 6"));
    agent.wait(ended);
    let running = agent.start_log(&shell("echo halfway; sleep 600"));
    let files = agent.directory.path().join("logs");
    eventually("both logs are written", || {
        std::fs::read_dir(&files).is_ok_and(|files| files.count() == 2)
    });
    // Time for the record of the end, too.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let pid = agent.look(running).unwrap().pid;
    agent.restart();
    let info = agent.look(ended).unwrap();
    assert_eq!(info.ended.unwrap().exit_code, 6);
    let replay = agent.replay(ended, AttachFrom::Oldest, 0, true);
    assert_eq!(replay.merged, b"kept\n");
    let lost = agent.look(running).unwrap().ended.unwrap();
    assert_eq!((lost.end, lost.exit_code), (ProcessEnd::Lost, 255));
    assert_eq!(lost.message, "VM was restarted");
    let replay = agent.replay(running, AttachFrom::Oldest, 0, true);
    assert_eq!(replay.merged, b"halfway\n");
    // New ones come after the old ones.
    let next = agent.start_log(&shell("true"));
    let page: ProcessPage = agent.ask(&ListProcesses { after: 0 }).unwrap();
    let ids: Vec<_> = page.processes.iter().map(|one| one.id).collect();
    assert_eq!(ids, [ended, running, next]);
    agent.shell(&format!("kill -9 -{pid}"));
}

#[test]
fn a_log_that_somebody_has_filled_with_garbage_harms_nobody() {
    let mut agent = Agent::start();
    let id = agent.start_log(&shell("echo kept"));
    agent.wait(id);
    let logs = agent.directory.path().join("logs");
    eventually("the log is written", || {
        std::fs::read_dir(&logs).is_ok_and(|mut files| files.next().is_some())
    });
    let log = std::fs::read_dir(&logs).unwrap().next().unwrap().unwrap();
    let mut bytes = std::fs::read(log.path()).unwrap();
    for byte in bytes.iter_mut().skip(8) {
        *byte ^= 0xa5;
    }
    std::fs::write(log.path(), bytes).unwrap();
    for name in ["x", "0-0.0", &format!("{:016x}-{:032x}.{:016x}", 5, 6, 7)] {
        std::fs::write(logs.join(name), b"supvmlg1\x01\xff\xff\xff\xff").unwrap();
    }
    agent.restart();
    let page: ProcessPage = agent.ask(&ListProcesses { after: 0 }).unwrap();
    assert_eq!(page.processes, []);
    assert_eq!(agent.look(id).unwrap_err().code, ErrorCode::NoSuchProcess);
    assert_eq!(agent.shell("echo fine").text(), "fine\n");
}

#[test]
fn a_disk_that_takes_nothing_stops_no_process_and_no_reader() {
    let agent = Agent::start();
    // A file where the directory should be: every write fails, for root too.
    std::fs::write(agent.directory.path().join("logs"), b"").unwrap();
    let output = agent.shell("seq 1 500000");
    assert!(output.text().ends_with("500000\n"));
    assert_eq!(output.text().lines().count(), 500_000);
    let id = agent.start_log(&shell("seq 1 500000"));
    let info = agent.wait(id);
    assert_eq!(info.ended.unwrap().exit_code, 0);
    eventually("the loss is counted", || {
        agent.look(id).unwrap().dropped > 0
    });
    let info = agent.look(id).unwrap();
    let replay = agent.replay(id, AttachFrom::Offset, 0, true);
    assert_eq!(replay.missing, info.dropped);
    assert_eq!(replay.merged.len() as u64, info.bytes - info.dropped);
    assert!(replay.merged.len() >= 64 << 10, "{}", replay.merged.len());
    assert!(replay.merged.ends_with(b"499999\n500000\n"));
}

#[test]
fn a_memory_limit_without_a_memory_controller_is_refused_by_name() {
    let agent = Agent::start();
    let request = StartProcess {
        memory_bytes: Some(64 << 20),
        output: OutputMode::Log,
        ..shell("true")
    };
    let mut client = agent.connect();
    client.send(&request);
    assert_eq!(client.error().code, ErrorCode::LimitUnavailable);
    // The id is free again.
    let id = agent.start_log(&StartProcess {
        memory_bytes: None,
        ..request
    });
    assert_eq!(agent.wait(id).ended.unwrap().exit_code, 0);
}
