//! What happens on streams that are used wrongly, early or twice, and at the agent's end.

mod common;

use std::io::Write;

use common::{Agent, argv, configuration, eventually, shell};
use protocol::agent::{PowerOff, PoweringOff};
use protocol::frame::{Header, MAX_BODY};
use protocol::{ErrorCode, Kind, message};

#[test]
fn nothing_runs_before_the_configuration_and_nothing_is_configured_twice() {
    let agent = Agent::start_unconfigured(&[], None);
    let mut early = agent.connect();
    early.send(&shell("true"));
    assert_eq!(early.error().code, ErrorCode::NotConfigured);
    let configured = agent.configure();
    assert_eq!(configured.boot_id.len(), 36);
    assert!(configured.disk_bytes > 0);
    let mut again = agent.connect();
    again.send(&configuration());
    assert_eq!(again.error().code, ErrorCode::AlreadyConfigured);
    assert_eq!(agent.shell("true").ended.exit_code, 0);
}

#[test]
fn an_unknown_kind_is_answered_and_the_stream_lives() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send_raw(Kind(0x7777), b"what");
    assert_eq!(client.error().code, ErrorCode::Unsupported);
    client.send(&shell("sleep 0.3; echo alive"));
    client.started();
    client.send_raw(Kind(0x7778), b"what");
    assert_eq!(client.error().code, ErrorCode::Unsupported);
    assert_eq!(client.output().text(), "alive\n");
}

#[test]
fn an_oversize_frame_ends_its_stream_only() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let header = Header {
        length: u32::try_from(MAX_BODY).unwrap() + 1,
        kind: Kind::START_PROCESS,
        flags: 0,
    };
    client.socket.write_all(&header.to_bytes()).unwrap();
    assert_eq!(client.error().code, ErrorCode::FrameTooLarge);
    assert_eq!(client.frame(), None);
    assert_eq!(agent.shell("true").ended.exit_code, 0);
}

#[test]
fn frames_begun_on_every_stream_and_ended_on_none_leave_memory_bounded_and_others_go_on() {
    let agent = Agent::start();
    let header = Header {
        length: 1 << 20,
        kind: Kind::START_PROCESS,
        flags: 0,
    };
    let mut half = header.to_bytes().to_vec();
    half.resize(1 << 20, 0);
    let mut refused = 0;
    let begun: Vec<_> = (0..500)
        .filter_map(|_| {
            let mut client = agent.connect();
            // One that is refused is cut off.
            if client.socket.write_all(&half).is_ok() {
                return Some(client);
            }
            assert_eq!(client.error().code, ErrorCode::TooManyLongFrames);
            refused += 1;
            None
        })
        .collect();
    assert!(refused > 400 && begun.len() >= 8, "{refused} are refused");
    assert_eq!(agent.shell("echo on").text(), "on\n");
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 32 << 10, "{peak} KiB");
    drop(begun);
    eventually("there is room again", || {
        let mut client = agent.connect();
        let mut whole = half.clone();
        whole.resize(header.to_bytes().len() + (1 << 20), 0);
        let _ = client.socket.write_all(&whole);
        client.error().code == ErrorCode::Malformed
    });
}

#[test]
fn a_malformed_body_is_refused_by_name() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send_raw(Kind::START_PROCESS, &[0xff; 40]);
    assert_eq!(client.error().code, ErrorCode::Malformed);
    assert_eq!(client.frame(), None);
}

#[test]
fn a_client_that_vanishes_inside_a_frame_harms_nobody() {
    let agent = Agent::start();
    let whole = message::encode(&shell("touch never")).unwrap();
    for cut in [1, 6, 7, 12, whole.len() - 1] {
        let mut client = agent.connect();
        client.socket.write_all(&whole[..cut]).unwrap();
    }
    assert_eq!(agent.shell("ls").text(), "");
}

#[test]
fn too_many_streams_are_refused_by_name_and_places_come_back() {
    let agent = Agent::start();
    let idle: Vec<_> = (0..512).map(|_| agent.connect()).collect();
    let mut refused = agent.connect();
    assert_eq!(refused.error().code, ErrorCode::TooManyStreams);
    drop(idle);
    eventually("a place is free", || {
        let mut client = agent.connect();
        client.send(&argv(&["true"]));
        client.frame().unwrap().kind == Kind::PROCESS_STARTED
    });
}

#[test]
fn power_off_is_answered_first_and_then_ends_every_process() {
    let mut agent = Agent::start();
    let mut asked = agent.connect();
    asked.send(&shell(
        "trap 'echo asked; exit 0' TERM; echo ready; while :; do sleep 0.05; done",
    ));
    asked.started();
    assert_eq!(asked.frame().unwrap().body, b"ready\n");
    let mut deaf = agent.connect();
    deaf.send(&shell(
        "trap '' TERM; echo $$; while :; do sleep 0.05; done",
    ));
    deaf.started();
    let pid = String::from_utf8(deaf.frame().unwrap().body).unwrap();
    let mut client = agent.connect();
    client.send(&PowerOff { grace_ms: 300 });
    message::decode::<PoweringOff>(&client.frame().unwrap()).unwrap();
    // Some shells remark on standard error that a command of theirs was ended too.
    let said = asked.output();
    assert_eq!(said.stdout, b"asked\n");
    assert!(agent.child.wait().unwrap().success());
    eventually("the deaf one is gone", || {
        !std::path::Path::new(&format!("/proc/{}", pid.trim())).exists()
    });
}

#[test]
fn a_signal_to_the_agent_powers_off() {
    let mut agent = Agent::start();
    let id = i32::try_from(agent.child.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::SIGTERM).unwrap();
    assert!(agent.child.wait().unwrap().success());
}
