//! What a client can do with a process that it finds by its id: come back to it, list it, write to it,
//! wait for it, end it. Processes belong to no connection.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, argv, eventually, shell};
use protocol::id::ProcessId;
use protocol::process::{OutputMode, ProcessEnd, StartProcess, StdinMode};
use protocol::processes::{
    AttachFrom, AttachProcess, ListProcesses, ProcessInfo, ProcessPage, ProcessRemoved,
    RemoveProcess, SendSignal, StdinWritten, WaitProcess, WriteStdin,
};
use protocol::{ErrorBody, ErrorCode, Kind, message};

const UNKNOWN: ProcessId = ProcessId([0xee; 16]);

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
    agent.kill(running, Some(0)).unwrap();
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
    agent.kill(none, Some(0)).unwrap();
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
    let info = agent.kill(id, None).unwrap();
    let ended = info.ended.unwrap();
    assert_eq!((ended.end, ended.exit_code), (ProcessEnd::Killed, 9));
    assert_eq!(ended.message, "killed");
    let said = agent.replay(id, AttachFrom::Oldest, 0, true);
    // Some shells remark on standard error that a command of theirs was ended too.
    let said = String::from_utf8(said.merged).unwrap();
    assert!(said.contains("bye\n"), "{said}");
    // Again is no error.
    assert_eq!(agent.kill(id, None).unwrap().ended.unwrap().exit_code, 9);
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
        let ended = agent.kill(id, grace_ms).unwrap().ended.unwrap();
        assert_eq!((ended.end, ended.exit_code), (ProcessEnd::Killed, 137));
        eventually("its child is gone", || {
            !std::path::Path::new(&child).exists()
        });
    }
}

#[test]
fn kill_ends_what_a_process_left_behind_also_when_that_has_ended_itself() {
    let agent = Agent::start_with_cgroup();
    // One that hears and says so, one that does not.
    let line = "(trap 'echo heard > heard; exit' TERM; echo > up; while :; do sleep 0.02; done) \
        > /dev/null 2>&1 & (trap '' TERM; exec setsid sleep 603) > /dev/null 2>&1 & echo $!; exit 4";
    for grace_ms in [Some(500), Some(0)] {
        let id = agent.start_log(&shell(line));
        assert_eq!(agent.wait(id).ended.unwrap().exit_code, 4);
        let said = agent.replay(id, AttachFrom::Oldest, 0, true).merged;
        let child = format!("/proc/{}", String::from_utf8(said).unwrap().trim());
        eventually("both are up", || {
            agent.workspace().join("up").exists()
                && std::fs::read_to_string(format!("{child}/comm")).unwrap() == "sleep\n"
        });
        let info = agent.kill(id, grace_ms).unwrap();
        // Ended; who reaps it is not the agent here, but this machine's init.
        let stat = std::fs::read_to_string(format!("{child}/stat")).unwrap_or_default();
        assert!(
            stat.is_empty() || stat.contains(") Z ") || stat.contains(") X "),
            "{grace_ms:?}: {stat}"
        );
        let ended = info.ended.unwrap();
        assert_eq!((ended.end, ended.exit_code), (ProcessEnd::Exited, 4));
        let heard = agent.workspace().join("heard");
        assert_eq!(heard.exists(), grace_ms == Some(500));
        let _ = std::fs::remove_file(heard);
        std::fs::remove_file(agent.workspace().join("up")).unwrap();
    }
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
    assert_eq!(files(), 1);
    let running = agent.start_log(&argv(&["sleep", "600"]));
    let early = agent.ask::<_, ProcessRemoved>(&RemoveProcess { id: running });
    assert_eq!(early.unwrap_err().code, ErrorCode::ProcessRunning);
    agent
        .ask::<_, ProcessRemoved>(&RemoveProcess { id })
        .unwrap();
    assert_eq!(agent.look(id).unwrap_err().code, ErrorCode::NoSuchProcess);
    assert_eq!(files(), 1, "that of the other one");
    agent.kill(running, Some(0)).unwrap();
}

#[test]
fn whoever_has_heard_of_the_end_can_forget_the_process_at_once() {
    let agent = Agent::start();
    for _ in 0..1000 {
        let id = agent.start_log(&argv(&["true"]));
        agent.wait(id);
        agent
            .ask::<_, ProcessRemoved>(&RemoveProcess { id })
            .unwrap();
    }
}

#[test]
fn a_secret_in_the_environment_is_neither_listed_nor_logged() {
    let mut agent = Agent::start();
    let secret = b"cf2a90-not-for-others";
    let with_secret = |request: StartProcess| StartProcess {
        env: vec![(b"TOKEN".to_vec(), Some(secret.to_vec()))],
        ..request
    };
    let has = |text: &[u8]| text.windows(secret.len()).any(|part| part == secret);
    let id = agent.start_log(&with_secret(shell("echo ${#TOKEN}; exec sleep 600")));
    agent.run(&with_secret(argv(&["no-such-program"])));
    eventually("it has said so", || agent.look(id).unwrap().bytes > 0);
    let said = agent.replay(id, AttachFrom::Oldest, 0, false).merged;
    assert_eq!(said, format!("{}\n", secret.len()).into_bytes());
    let pid = agent.look(id).unwrap().pid;
    assert!(!has(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()));
    let listed = |agent: &Agent| {
        let mut client = agent.connect();
        client.send(&ListProcesses { after: 0 });
        client.frame().unwrap().body
    };
    assert!(!has(&listed(&agent)));
    agent.kill(id, Some(0)).unwrap();
    // A stop writes everything.
    let own = i32::try_from(agent.child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(own), nix::sys::signal::SIGTERM).unwrap();
    agent.child.wait().unwrap();
    assert!(!has(agent.log().as_bytes()), "{}", agent.log());
    let logs = agent.directory.path().join("logs");
    let mut files = 0;
    for file in std::fs::read_dir(logs).unwrap() {
        files += 1;
        assert!(!has(&std::fs::read(file.unwrap().path()).unwrap()));
    }
    assert_eq!(files, 2);
    agent.restart();
    assert!(!has(&listed(&agent)));
}

#[test]
fn an_unknown_id_is_a_named_error_for_every_request() {
    let agent = Agent::start();
    let id = UNKNOWN;
    let mut codes = vec![
        agent.look(id).unwrap_err().code,
        agent.kill(id, None).unwrap_err().code,
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
