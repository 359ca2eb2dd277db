//! The agent as process 1 of a PID namespace and with control groups. These tests need root and
//! fail without it.

mod common;

use common::{Agent, eventually, shell};

const NAMESPACE: [&str; 6] = [
    "unshare",
    "--pid",
    "--mount",
    "--fork",
    "--kill-child",
    "--mount-proc",
];

#[test]
fn killing_everything_in_the_machine_leaves_the_agent_answering() {
    let agent = Agent::start_unconfigured(&NAMESPACE, None);
    agent.configure();
    assert!(
        agent
            .shell("cat /proc/1/cmdline")
            .text()
            .contains("guest-init")
    );
    let mut bystander = agent.connect();
    bystander.send(&shell("sleep 600"));
    bystander.started();
    // The shell is one of those that it kills.
    agent.shell("kill -9 -1; true");
    assert_eq!(bystander.output().ended.signal, 9);
    assert_eq!(agent.shell("echo still here").text(), "still here\n");
}

#[test]
fn process_one_reaps_orphans_that_nobody_waits_for() {
    let agent = Agent::start_unconfigured(&NAMESPACE, None);
    agent.configure();
    for _ in 0..20 {
        agent.shell("(sh -c 'sleep 0.02 & sleep 0.02 &' &) ; true");
    }
    eventually("no zombie is left", || {
        agent
            .shell("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '")
            .text()
            == "0\n"
    });
}

#[test]
fn sigkill_takes_grandchildren_in_sessions_of_their_own() {
    let agent = Agent::start_with_cgroup();
    let mut client = agent.connect();
    client.send(&shell("setsid sleep 601 & echo $!; wait"));
    client.started();
    let pid = String::from_utf8(client.frame().unwrap().body).unwrap();
    let pid = format!("/proc/{}", pid.trim());
    assert!(std::path::Path::new(&pid).exists());
    client.signal(libc::SIGKILL);
    client.output();
    eventually("the grandchild is gone", || {
        !std::path::Path::new(&pid).exists()
    });
}

#[test]
fn sigkill_takes_what_the_main_process_left_behind_after_its_end() {
    let agent = Agent::start_with_cgroup();
    let mut client = agent.connect();
    // The child writes all the time, so that the command stays open a while after its end.
    client.send(&shell("(while :; do echo x; sleep 0.01; done) & echo $!"));
    let main = client.started().pid;
    let mut text = String::new();
    while !text.contains(|c: char| c.is_ascii_digit()) || !text.ends_with('\n') {
        text.push_str(std::str::from_utf8(&client.frame().unwrap().body).unwrap());
    }
    let pid = text.lines().find(|line| *line != "x").unwrap().to_owned();
    eventually("the main process is reaped", || {
        !std::path::Path::new(&format!("/proc/{main}")).exists()
    });
    client.signal(libc::SIGKILL);
    let output = client.output();
    assert_eq!(output.ended.exit_code, 0, "it had ended by itself");
    eventually("its child is gone", || {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    });
}

#[test]
fn every_command_has_a_group_and_none_outlives_its_last_process() {
    let agent = Agent::start_with_cgroup();
    let groups = || {
        std::fs::read_dir(agent.cgroup())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir())
            .count()
    };
    let mut client = agent.connect();
    client.send(&shell("cat /proc/self/cgroup; sleep 600"));
    client.started();
    let own = String::from_utf8(client.frame().unwrap().body).unwrap();
    assert!(own.contains("/p-"), "{own}");
    assert_eq!(groups(), 1);
    client.signal(libc::SIGKILL);
    client.output();
    // Lives on behind its command, then goes.
    agent.shell("sleep 0.5 & true");
    assert!(groups() >= 1);
    eventually("all groups are removed", || groups() == 0);
}

#[test]
fn a_missing_controller_is_reported() {
    let agent = Agent::start_with_cgroup();
    let here = std::fs::read_to_string(agent.cgroup().join("cgroup.controllers")).unwrap();
    let reported = agent.log().contains("event=controllers_missing");
    let all = ["memory", "pids", "cpu", "io"]
        .iter()
        .all(|name| here.split_whitespace().any(|one| one == *name));
    assert_eq!(reported, !all, "controllers {here:?}, log {}", agent.log());
}
