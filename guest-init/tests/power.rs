//! What a stop of the machine owes to what runs in it: time to end, an end in any case, and last words
//! that are still there when the machine is back.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, eventually, shell};
use protocol::agent::{PowerOff, PoweringOff};
use protocol::message;
use protocol::process::{ProcessEnd, TerminalSize};
use protocol::processes::AttachFrom;

/// Asks for the end and waits for it, but not as long as `grace_ms` when that is longer than a test's
/// patience.
fn power_off(agent: &mut Agent, grace_ms: u32) {
    let mut client = agent.connect();
    client.send(&PowerOff { grace_ms });
    message::decode::<PoweringOff>(&client.frame().unwrap()).unwrap();
    let mut status = None;
    eventually("the agent has gone", || {
        status = agent.child.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
}

#[test]
fn what_is_said_and_decided_at_a_stop_is_still_known_after_it() {
    let line = "trap 'echo bye; exit 3' TERM; echo u''p; while :; do sleep 0.02; done";
    for _ in 0..10 {
        let mut agent = Agent::start();
        let id = agent.start_log(&shell(line));
        // What came before has been written, and nothing waits for the log.
        let logs = agent.directory.path().join("logs");
        let is_written = |what: &[u8]| {
            std::fs::read_dir(&logs).unwrap().any(|file| {
                let bytes = std::fs::read(file.unwrap().path()).unwrap();
                bytes.windows(what.len()).any(|part| part == what)
            })
        };
        eventually("its first words are written", || is_written(b"up\n"));
        power_off(&mut agent, 60_000);
        agent.restart();
        let ended = agent.look(id).unwrap().ended.unwrap();
        assert_eq!(ended.exit_code, 3, "{ended:?}");
        // Some shells remark on standard error that a command of theirs was ended too.
        let said = agent.replay(id, AttachFrom::Oldest, 0, true).merged;
        let said = String::from_utf8(said).unwrap();
        assert!(said.contains("bye\n"), "{said}");
    }
}

#[test]
fn what_a_stop_has_ended_is_known_as_lost_with_the_machine() {
    let mut agent = Agent::start();
    let id = agent.start_log(&shell("echo said; exec sleep 1000"));
    power_off(&mut agent, 60_000);
    agent.restart();
    let ended = agent.look(id).unwrap().ended.unwrap();
    assert_eq!(
        (ended.end, ended.exit_code, ended.message.as_str()),
        (ProcessEnd::Lost, 255, "VM was restarted")
    );
}

#[test]
fn neither_an_idle_terminal_nor_a_stopped_process_uses_up_the_grace_of_a_stop() {
    let mut agent = Agent::start();
    // As interactive shells do: deaf to SIGTERM, waiting for a line.
    let mut idle = shell("trap '' TERM; echo up; read line");
    idle.terminal = Some(TerminalSize {
        columns: 80,
        rows: 24,
    });
    let idle = agent.start_log(&idle);
    eventually("it is up", || agent.look(idle).unwrap().bytes > 0);
    let stopped = agent.start_log(&shell("kill -STOP $$"));
    let pid = agent.look(stopped).unwrap().pid;
    eventually("it is stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains(") T ")
    });
    power_off(&mut agent, 600_000);
}
