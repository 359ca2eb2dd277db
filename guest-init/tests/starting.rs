//! What a process is between the request for it and its first instruction: a name that others may
//! already use, and something that can hang where a file system does. Needs root and `/dev/fuse`.

#![allow(clippy::unwrap_used)]

mod common;

use common::files::ask;
use common::{Agent, argv, eventually, shell};
use protocol::agent::{Health, HealthReport};
use protocol::process::{OutputMode, ProcessEnd, StartProcess, StdinMode};
use protocol::processes::{
    AttachFrom, AttachProcess, ProcessInfo, SendSignal, WaitProcess, WriteStdin,
};
use protocol::{ErrorCode, Kind};

const NAMESPACE: [&str; 6] = [
    "unshare",
    "--pid",
    "--mount",
    "--fork",
    "--kill-child",
    "--mount-proc",
];

/// An agent in a mount namespace of its own, where `hung` in the workspace is a file system that never
/// answers.
fn beside_a_hung_file_system() -> Agent {
    let agent = Agent::start_unconfigured(&NAMESPACE, None);
    agent.configure();
    let line = "mkdir hung; exec 9<>/dev/fuse; mount -i -t fuse -o \
        fd=9,rootmode=40000,user_id=0,group_id=0 none hung && echo hung; exec sleep 600";
    let id = agent.start_log(&shell(line));
    eventually("it hangs", || agent.look(id).unwrap().bytes > 0);
    let said = agent.replay(id, AttachFrom::Oldest, 0, false).merged;
    assert_eq!(String::from_utf8(said).unwrap(), "hung\n");
    agent
}

fn hanging() -> StartProcess {
    StartProcess {
        cwd: b"hung".to_vec(),
        stdin: StdinMode::Pipe,
        ..argv(&["cat"])
    }
}

#[test]
fn a_start_that_hangs_ends_with_its_deadline_or_when_it_is_killed() {
    let agent = beside_a_hung_file_system();
    let mut limited = hanging();
    limited.deadline_ms = Some(300);
    let output = agent.run(&limited);
    assert_eq!(output.ended.end, ProcessEnd::TimedOut, "{:?}", output.ended);
    assert_eq!(output.ended.message, "timed out after 0.3 s");
    for grace_ms in [Some(0), Some(60_000)] {
        let request = hanging();
        let mut client = agent.connect();
        client.send(&request);
        eventually("it is known", || agent.look(request.id).is_ok());
        let ended = agent.kill(request.id, grace_ms).unwrap().ended.unwrap();
        assert_eq!(ended.end, ProcessEnd::Killed);
        assert_eq!(client.output().ended, ended);
    }
}

#[test]
fn who_waits_for_a_start_that_hangs_may_leave_and_goes_nowhere_wrong() {
    let agent = beside_a_hung_file_system();
    let request = hanging();
    let mut first = agent.connect();
    first.send(&request);
    eventually("it is known", || agent.look(request.id).is_ok());
    // Its state is known at once.
    assert_eq!(agent.look(request.id).unwrap().ended, None);
    let streams = || ask::<_, HealthReport>(&agent, &Health {}).streams;
    eventually("nobody else asks", || streams() == 2);
    let id = request.id;
    let mut again = agent.connect();
    again.send(&request);
    let mut signal = agent.connect();
    signal.send(&SendSignal { id, signal: 10 });
    let mut writer = agent.connect();
    writer.send(&WriteStdin { id });
    writer.send_raw(Kind::STDIN, b"x");
    let mut attach = agent.connect();
    attach.send(&AttachProcess {
        id,
        from: AttachFrom::Oldest,
        value: 0,
        follow: true,
    });
    eventually("all wait", || streams() == 6);
    drop((again, signal, writer));
    eventually("those who left are gone", || streams() == 3);
    agent.kill(id, Some(0)).unwrap();
    assert_eq!(attach.replay().end.unwrap().end, ProcessEnd::Killed);
    assert_eq!(first.output().ended.end, ProcessEnd::Killed);
}

#[test]
fn who_found_a_start_that_is_refused_is_told_that_there_is_no_process() {
    let agent = Agent::start();
    let request = &StartProcess {
        memory_bytes: Some(64 << 20),
        output: OutputMode::Log,
        ..shell("true")
    };
    let agent = &agent;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                for _ in 0..200 {
                    let mut client = agent.connect();
                    client.send(request);
                    let code = client.error().code;
                    let expected = [ErrorCode::LimitUnavailable, ErrorCode::NoSuchProcess];
                    assert!(expected.contains(&code), "{code:?}");
                    let id = request.id;
                    let timeout_ms = None;
                    let waited: Result<ProcessInfo, _> = agent.ask(&WaitProcess { id, timeout_ms });
                    assert_eq!(waited.unwrap_err().code, ErrorCode::NoSuchProcess);
                }
            });
        }
    });
}
