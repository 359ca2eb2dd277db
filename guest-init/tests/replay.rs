//! Output is read again, by whoever knows the process: from any offset, by several at once, from
//! memory and from the logs on the disk, which are bounded and survive the agent.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, argv, eventually, shell};
use protocol::process::{OutputMode, ProcessEnd, StdinMode};
use protocol::processes::{
    AttachFrom, AttachProcess, ListProcesses, ProcessInfo, ProcessPage, WaitProcess,
};
use protocol::{ErrorCode, Kind};

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
    agent.kill(id, Some(0)).unwrap();
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
    assert!(agent.own_kib() < common::FLAT);
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
    let info = agent.kill(request.id, None).unwrap();
    assert_eq!(info.ended.unwrap().end, ProcessEnd::Killed);
    // And nothing that was read before is lost to it.
    assert_eq!(stuck.output().stdout.len() as u64, info.bytes);
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
fn a_start_that_was_answered_is_known_after_a_restart_and_never_runs_twice() {
    let mut agent = Agent::start();
    let mark = agent.workspace().join("mark");
    let mut silent = shell("echo x >> mark; exec sleep 600");
    silent.output = OutputMode::Log;
    agent.start_log(&silent);
    eventually("it has run", || {
        std::fs::read(&mark).is_ok_and(|text| text == b"x\n")
    });
    let pid = agent.look(silent.id).unwrap().pid;
    let missing = argv(&["no-such-program"]);
    let quick = shell("echo x >> mark");
    assert_eq!(agent.run(&quick).ended.exit_code, 0);
    assert_eq!(agent.run(&missing).ended.end, ProcessEnd::NotFound);
    agent.restart();
    let lost = agent.look(silent.id).unwrap().ended.unwrap();
    assert_eq!(lost.end, ProcessEnd::Lost);
    for request in [&silent, &quick, &missing] {
        let mut client = agent.connect();
        client.send(request);
        client.frame().expect("an answer");
    }
    assert_eq!(std::fs::read(&mark).unwrap(), b"x\nx\n", "one ran twice");
    agent.shell(&format!("kill -9 -{pid}"));
}

#[test]
fn the_end_of_what_never_said_anything_is_kept_too() {
    let mut agent = Agent::start();
    let silent = agent.start_log(&shell("exit 7"));
    let missing = argv(&["no-such-program"]);
    assert_eq!(agent.run(&missing).ended.end, ProcessEnd::NotFound);
    agent.wait(silent);
    // A signal stops the agent, which writes everything first.
    let id = i32::try_from(agent.child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::SIGTERM).unwrap();
    agent.child.wait().unwrap();
    agent.restart();
    assert_eq!(agent.look(silent).unwrap().ended.unwrap().exit_code, 7);
    let again = agent.run(&missing);
    assert_eq!(
        (again.started, again.ended.end),
        (false, ProcessEnd::NotFound)
    );
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
