//! What an interactive program can rely on: a terminal of its own with a size, keys that signal, job
//! control, and a session that outlives its client.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Client, argv, eventually, shell};
use protocol::Kind;
use protocol::process::{OutputMode, ProcessEnd, ResizeTerminal, StartProcess, TerminalSize};
use protocol::processes::{AttachFrom, AttachProcess, KillProcess, ProcessInfo};

const SIZE: TerminalSize = TerminalSize {
    columns: 100,
    rows: 40,
};

fn on_terminal(request: StartProcess) -> StartProcess {
    StartProcess {
        terminal: Some(SIZE),
        ..request
    }
}

/// Reads until the text has been shown.
fn until(client: &mut Client, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let frame = client.frame().expect("output");
        assert_eq!(frame.kind, Kind::STDOUT, "{frame:?} after {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&frame.body));
    }
    seen
}

fn interactive(agent: &Agent) -> (StartProcess, Client) {
    let mut request = on_terminal(argv(&["sh", "-i"]));
    request.env = vec![(b"PS1".to_vec(), Some(b"ready> ".to_vec()))];
    let mut client = agent.connect();
    client.send(&request);
    client.started();
    until(&mut client, "ready> ");
    (request, client)
}

#[test]
fn a_terminal_has_its_size_its_type_and_one_output() {
    let agent = Agent::start();
    let request = on_terminal(shell(
        "test -t 0 && test -t 1 && test -t 2 && stty size; echo $TERM; echo err >&2; tty",
    ));
    let output = agent.run(&request);
    let lines: Vec<&str> = output.text().lines().collect();
    assert_eq!(lines[..3], ["40 100", "xterm-256color", "err"]);
    assert!(lines[3].starts_with("/dev/pts/"), "{lines:?}");
    assert_eq!(output.stderr, b"");
    assert_eq!(output.ended.end, ProcessEnd::Exited);
}

#[test]
fn the_last_words_on_a_terminal_are_never_lost() {
    let agent = Agent::start();
    for number in 0..100 {
        let output = agent.run(&on_terminal(shell(&format!(
            "seq 1 300; echo last{number}"
        ))));
        assert!(output.text().ends_with(&format!("last{number}\r\n")));
        assert_eq!(output.text().lines().count(), 301);
        assert!(!output.ended.output_open);
    }
}

#[test]
fn control_c_interrupts_what_runs_and_not_the_shell() {
    let agent = Agent::start();
    let (_, mut client) = interactive(&agent);
    client.send_raw(Kind::STDIN, b"sleep 600\n");
    until(&mut client, "sleep 600");
    // Not before the shell has put it into the foreground.
    std::thread::sleep(std::time::Duration::from_millis(300));
    client.send_raw(Kind::STDIN, &[3]);
    until(&mut client, "ready> ");
    client.send_raw(Kind::STDIN, b"echo $?; exit 7\n");
    let output = client.output();
    assert!(output.text().contains("130"), "{}", output.text());
    assert_eq!(output.ended.exit_code, 7);
}

#[test]
fn job_control_stops_and_continues() {
    let agent = Agent::start();
    let (_, mut client) = interactive(&agent);
    client.send_raw(Kind::STDIN, b"cat\n");
    until(&mut client, "cat\r\n");
    std::thread::sleep(std::time::Duration::from_millis(300));
    client.send_raw(Kind::STDIN, &[0x1a]);
    until(&mut client, "ready> ");
    client.send_raw(Kind::STDIN, b"jobs; fg\n");
    until(&mut client, "Stopped");
    std::thread::sleep(std::time::Duration::from_millis(300));
    client.send_raw(Kind::STDIN, b"again\n");
    let seen = until(&mut client, "again\r\nagain\r\n");
    assert!(!seen.contains("ready> again"), "{seen:?}");
    // The end of input is typed: cat ends, then the shell.
    client.send_raw(Kind::STDIN_END, b"");
    until(&mut client, "ready> ");
}

#[test]
fn the_end_of_input_is_one_in_the_middle_of_a_line_too() {
    let agent = Agent::start();
    for (typed, shown) in [
        (&b"half a line"[..], "half a line"),
        (b"whole\n", "whole\r\n"),
        (b"given up\x15", "given up"),
    ] {
        let request = on_terminal(shell("cat > first; echo between; cat; echo after"));
        let mut first = agent.connect();
        first.send(&request);
        first.started();
        first.send_raw(Kind::STDIN, typed);
        until(&mut first, shown);
        first.send_raw(Kind::STDIN_END, b"");
        until(&mut first, "between\r\n");
        // What would be one end too many would be the second cat's.
        let mut second = agent.connect();
        second.send(&AttachProcess {
            id: request.id,
            from: AttachFrom::Now,
            value: 0,
            follow: true,
        });
        assert_eq!(second.frame().unwrap().kind, Kind::PROCESS_ATTACHED);
        second.send_raw(Kind::STDIN, b"more\n");
        until(&mut second, "more\r\nmore\r\n");
        second.send_raw(Kind::STDIN_END, b"");
        until(&mut second, "after\r\n");
        assert_eq!(first.output().ended.exit_code, 0);
        let kept = std::fs::read(agent.workspace().join("first")).unwrap();
        let expected = if shown == "given up" { b"" } else { typed };
        assert_eq!(kept, expected);
    }
}

#[test]
fn a_resize_reaches_the_foreground() {
    let agent = Agent::start();
    let line = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done";
    let mut client = agent.connect();
    client.send(&on_terminal(shell(line)));
    client.started();
    until(&mut client, "up");
    let size = TerminalSize {
        columns: 33,
        rows: 11,
    };
    client.send(&ResizeTerminal { size });
    assert!(client.output().text().contains("11 33"));
}

#[test]
fn a_session_on_a_terminal_outlives_its_client_and_takes_another() {
    let agent = Agent::start();
    let (request, mut client) = interactive(&agent);
    client.send_raw(Kind::STDIN, b"mark=kept\n");
    until(&mut client, "ready> ");
    drop(client);
    let mut second = agent.connect();
    second.send(&AttachProcess {
        id: request.id,
        from: AttachFrom::Now,
        value: 0,
        follow: true,
    });
    let attached = second.frame().unwrap();
    assert_eq!(attached.kind, Kind::PROCESS_ATTACHED);
    second.send_raw(Kind::STDIN, b"echo $mark; exit 3\n");
    let output = second.output();
    assert!(output.text().contains("kept\r\n"), "{}", output.text());
    assert_eq!(output.ended.exit_code, 3);
}

#[test]
fn a_shell_on_a_terminal_hears_that_it_is_to_end() {
    let agent = Agent::start();
    let (request, client) = interactive(&agent);
    drop(client);
    let id = request.id;
    let info: ProcessInfo = agent.ask(&KillProcess { id, grace_ms: None }).unwrap();
    let ended = info.ended.unwrap();
    assert_eq!(ended.end, ProcessEnd::Killed);
    assert_ne!(ended.signal, 9, "it went by itself");
}

#[test]
fn what_is_left_on_a_terminal_hangs_up_with_its_session() {
    let agent = Agent::start();
    let output = agent.run(&on_terminal(shell("sleep 603 & echo $!")));
    let pid = output.text().trim().to_owned();
    assert!(!output.ended.output_open);
    agent.shell(&format!("kill -9 {pid} 2>/dev/null; true"));
}

#[test]
fn a_flood_on_a_terminal_waits_for_its_reader() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&on_terminal(shell("yes 0123456789 | head -n 300000")));
    client.started();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let output = client.output();
    assert_eq!(output.stdout.len(), 300_000 * 12);
    assert!(agent.own_kib() < common::FLAT);
}

#[test]
fn a_resize_without_a_terminal_is_of_no_effect_and_a_garbled_one_ends_its_stream() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&shell("sleep 0.2; echo fine"));
    client.started();
    client.send(&ResizeTerminal { size: SIZE });
    assert_eq!(client.output().text(), "fine\n");
    let request = StartProcess {
        output: OutputMode::Follow,
        ..on_terminal(shell("sleep 0.3; echo done > done"))
    };
    let mut client = agent.connect();
    client.send(&request);
    client.started();
    client.send_raw(Kind::RESIZE_TERMINAL, b"\xff");
    assert_eq!(client.frame(), None);
    // The process does not care.
    assert_eq!(agent.wait(request.id).ended.unwrap().exit_code, 0);
    eventually("it went on", || agent.workspace().join("done").exists());
}
