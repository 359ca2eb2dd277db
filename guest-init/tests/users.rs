//! Processes of other users than root. The tests need root and fail without it.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::MetadataExt;

use common::{Agent, shell};
use protocol::ErrorCode;
use protocol::process::{StartProcess, TerminalSize};

fn as_user(user: &str, line: &str) -> StartProcess {
    StartProcess {
        user: user.as_bytes().to_vec(),
        cwd: b"/".to_vec(),
        ..shell(line)
    }
}

#[test]
fn a_process_is_wholly_the_users() {
    let agent = Agent::start();
    let line = "id -u; id -g; echo $USER $LOGNAME $HOME $SHELL; grep -E '^Cap(Eff|Prm)' /proc/self/status; \
                cat /proc/self/oom_score_adj";
    let by_name = agent.run(&as_user("nobody", line));
    let lines: Vec<&str> = by_name.text().lines().collect();
    assert_eq!(lines[0], "65534");
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let entry = passwd
        .lines()
        .find(|line| line.starts_with("nobody:"))
        .unwrap();
    let fields: Vec<&str> = entry.split(':').collect();
    assert_eq!(lines[1], fields[3]);
    assert_eq!(
        lines[2],
        format!("nobody nobody {} {}", fields[5], fields[6])
    );
    for line in &lines[3..5] {
        assert!(line.ends_with("0000000000000000"), "{line}");
    }
    let by_number = agent.run(&as_user("65534", line));
    assert_eq!(by_number.text(), by_name.text());
}

#[test]
fn a_user_can_open_its_own_outputs_by_name() {
    let agent = Agent::start();
    let output = agent.run(&as_user(
        "nobody",
        "echo out > /dev/stdout; echo err > /dev/stderr",
    ));
    assert_eq!((output.text(), &*output.stderr), ("out\n", &b"err\n"[..]));
    let mut request = as_user("nobody", "echo terminal > $(tty)");
    request.terminal = Some(TerminalSize {
        columns: 80,
        rows: 24,
    });
    assert_eq!(agent.run(&request).text(), "terminal\r\n");
}

#[test]
fn a_user_cannot_reach_the_logs_and_may_not_enter_what_is_not_its_own() {
    let agent = Agent::start();
    agent.shell("echo secret");
    let logs = agent.directory.path().join("logs");
    common::eventually("the log is written", || logs.exists());
    let mode = std::fs::metadata(&logs).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);
    let log = std::fs::read_dir(&logs).unwrap().next().unwrap().unwrap();
    assert_eq!(log.metadata().unwrap().mode() & 0o777, 0o600);
    let mut request = as_user("nobody", "true");
    request.cwd = b"/root".to_vec();
    let private = std::fs::metadata("/root").unwrap();
    if private.mode() & 0o001 == 0 {
        assert_eq!(agent.run(&request).ended.exit_code, 126);
    }
}

#[test]
fn a_user_that_does_not_exist_is_refused_by_name() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&as_user("no-such-user", "true"));
    let error = client.error();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.contains("no-such-user"), "{error}");
}
