//! The agent survives whatever its processes do. What destroys happens in a PID and a mount namespace
//! with a root in memory. These tests need root and fail without it.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, argv, eventually, shell};
use protocol::process::{ProcessEnd, StartProcess};
use protocol::processes::AttachFrom;

#[test]
fn removing_everything_leaves_an_agent_that_still_answers() {
    let agent = Agent::start_in_a_world_of_its_own(64 << 20, &["rm", "cat"]);
    let mut later: Vec<_> = (0..6).map(|_| agent.connect()).collect();
    let mut run = |request: &StartProcess| {
        let mut client = later.pop().unwrap();
        client.send(request);
        client.output()
    };
    let mut running = shell("read x; echo $x; exit 5");
    running.stdin = protocol::process::StdinMode::Pipe;
    let mut before = agent.connect();
    before.send(&running);
    before.started();
    let removal = run(&shell("rm -rf --no-preserve-root / 2>/dev/null; echo done"));
    assert_eq!(removal.text(), "done\n");
    // Neither shell nor directory is left.
    let gone = run(&shell("echo hi")).ended;
    assert_eq!(gone.end, ProcessEnd::NoSuchDirectory, "{gone:?}");
    let mut elsewhere = shell("echo hi");
    elsewhere.cwd = b"/".to_vec();
    assert_eq!(run(&elsewhere).ended.end, ProcessEnd::NotFound);
    // Who ran before is still served.
    before.send_raw(protocol::Kind::STDIN, b"still here\n");
    let output = before.output();
    assert_eq!(output.text(), "still here\n");
    assert_eq!(output.ended.exit_code, 5);
}

#[test]
fn a_full_disk_stops_neither_commands_nor_their_output() {
    let agent = Agent::start_in_a_world_of_its_own(16 << 20, &["cat", "seq", "rm"]);
    let full = agent.shell("cat /proc/kallsyms /proc/kallsyms > /workspace/a; \
        while echo 0123456789012345678901234567890123456789 >> /workspace/b; do :; done 2>/dev/null; echo full");
    assert_eq!(full.text(), "full\n");
    let output = agent.shell("seq 1 100000");
    assert_eq!(output.text().lines().count(), 100_000);
    let id = agent.start_log(&shell("seq 1 100000"));
    let info = agent.wait(id);
    assert_eq!(info.ended.unwrap().exit_code, 0);
    let tail = agent.replay(id, AttachFrom::Lines, 2, false);
    assert_eq!(tail.merged, b"99999\n100000\n");
    // Attempts to write leave nothing behind, not even empty files.
    let logs = agent.socket().with_file_name("var/lib/logs");
    let empty = || {
        let files = std::fs::read_dir(&logs).into_iter().flatten().flatten();
        let sizes = files.filter_map(|file| Some(file.metadata().ok()?.len()));
        sizes.filter(|size| *size == 0).count()
    };
    let endless = agent.start_log(&shell(
        "while :; do echo 0123456789012345678901234567890123456789; done",
    ));
    eventually("much was written in vain", || {
        agent.look(endless).unwrap().dropped > 4 << 20
    });
    agent.kill(endless, Some(0)).unwrap();
    assert_eq!(empty(), 0);
    // With room again, what comes next is kept again.
    agent.shell("rm /workspace/a /workspace/b");
    let id = agent.start_log(&shell("seq 1 100000"));
    let info = agent.wait(id);
    let replay = agent.replay(id, AttachFrom::Oldest, 0, true);
    assert_eq!((replay.merged.len() as u64, info.dropped), (info.bytes, 0));
}

#[test]
fn ten_thousand_short_processes_leave_nothing_behind() {
    let agent = Agent::start();
    let warm_up = || {
        for _ in 0..50 {
            agent.run(&argv(&["true"]));
        }
    };
    warm_up();
    eventually("streams close", || agent.descriptors() < 20);
    let before = agent.descriptors();
    std::thread::scope(|scope| {
        for client in 0..4 {
            let agent = &agent;
            scope.spawn(move || {
                for number in 0..2500 {
                    let text = format!("{client}-{number}");
                    let output = agent.run(&argv(&["echo", &text]));
                    assert_eq!(output.text().trim(), text);
                }
            });
        }
    });
    eventually("descriptors return", || agent.descriptors() <= before);
    let files = || {
        let logs = agent.directory.path().join("logs");
        std::fs::read_dir(logs).unwrap().count()
    };
    eventually("old logs are removed", || files() <= 1024);
    assert!(agent.own_kib() < common::FLAT, "{}", agent.own_kib());
    assert_eq!(agent.shell("echo fine").text(), "fine\n");
}

#[test]
fn more_processes_than_can_be_looked_after_are_refused_by_name() {
    let mut agent = Agent::start();
    // What is remembered from before does not run.
    for _ in 0..40 {
        agent.run(&argv(&["true"]));
    }
    agent.restart();
    let ids: Vec<_> = (0..512)
        .map(|_| agent.start_log(&argv(&["sleep", "600"])))
        .collect();
    let mut client = agent.connect();
    client.send(&argv(&["true"]));
    assert_eq!(client.error().code, protocol::ErrorCode::TooManyProcesses);
    for id in ids {
        agent.kill(id, Some(0)).unwrap();
    }
    assert_eq!(agent.run(&argv(&["true"])).ended.exit_code, 0);
}
