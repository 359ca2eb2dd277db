//! A client that is broken or means harm: each of its doings gets a named error or a closed stream,
//! the agent's memory stays bounded, and other streams go on.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;

use common::{Agent, argv, eventually, shell};
use protocol::process::{StartProcess, StdinMode};
use protocol::processes::{AttachFrom, AttachProcess, WriteStdin};
use protocol::{ErrorCode, Kind, frame};

/// What the agent may use, in KiB, whatever a client does. Tens of streams with a thread and buffers
/// each are in it, and no output that waits beyond them: that would be gigabytes.
const MEMORY: u64 = 32 << 10;

#[test]
fn a_garbled_body_of_every_request_is_refused_by_name() {
    let agent = Agent::start();
    for kind in [
        Kind::START_PROCESS,
        Kind::ATTACH_PROCESS,
        Kind::LIST_PROCESSES,
        Kind::WAIT_PROCESS,
        Kind::WRITE_STDIN,
        Kind::SEND_SIGNAL,
        Kind::KILL_PROCESS,
        Kind::REMOVE_PROCESS,
    ] {
        for body in [&[][..], &[0xff; 40]] {
            let mut client = agent.connect();
            client.send_raw(kind, body);
            assert_eq!(client.error().code, ErrorCode::Malformed, "{kind}");
            assert_eq!(client.frame(), None);
        }
    }
    assert_eq!(agent.shell("echo fine").text(), "fine\n");
}

#[test]
fn answers_and_data_out_of_place_are_unsupported_and_harm_nothing() {
    let agent = Agent::start();
    for kind in [
        Kind::STDIN,
        Kind::STDIN_END,
        Kind::STDOUT,
        Kind::PROCESS_STARTED,
        Kind::PROCESS_ENDED,
        Kind::PROCESS_ATTACHED,
        Kind::PROCESS_PAGE,
        Kind::PROCESS,
        Kind::STDIN_WRITTEN,
        Kind::PROCESS_REMOVED,
        Kind::SIGNAL_PROCESS,
        Kind::RESIZE_TERMINAL,
    ] {
        let mut client = agent.connect();
        client.send_raw(kind, b"\x01");
        assert_eq!(client.error().code, ErrorCode::Unsupported, "{kind}");
        client.send(&shell("echo alive"));
        assert_eq!(client.output().text(), "alive\n");
    }
}

#[test]
fn readers_that_never_read_cost_little_and_hold_up_nobody_else() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("while :; do echo 0123456789; done"));
    let stuck: Vec<_> = (0..100)
        .map(|_| {
            let mut client = agent.connect();
            client.send(&AttachProcess {
                id,
                from: AttachFrom::Oldest,
                value: 0,
                follow: true,
            });
            client
        })
        .collect();
    let before = agent.look(id).unwrap().bytes;
    eventually("the process goes on", || {
        agent.look(id).unwrap().bytes > before + (4 << 20)
    });
    assert!(agent.status_kib("VmRSS") < MEMORY);
    assert_eq!(agent.shell("echo fine").text(), "fine\n");
    agent.kill(id, Some(0)).unwrap();
    drop(stuck);
}

#[test]
fn followers_that_never_read_hold_back_their_own_process_only() {
    let agent = Agent::start();
    let stuck: Vec<_> = (0..60)
        .map(|_| {
            let mut client = agent.connect();
            client.send(&shell("exec head -c 50000000 /dev/zero"));
            client.started();
            client
        })
        .collect();
    // All windows are as full as they get.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let used = agent.status_kib("VmRSS");
    assert!(used < MEMORY, "{used} KiB");
    let output = agent.shell("head -c 5000000 /dev/zero");
    assert_eq!(output.stdout.len(), 5_000_000);
    drop(stuck);
}

#[test]
fn input_without_end_for_a_process_that_does_not_read_is_held_back() {
    let agent = Agent::start();
    let mut request = argv(&["sleep", "600"]);
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    let mut bytes = Vec::new();
    frame::append(&mut bytes, Kind::STDIN, &[1; 60_000]).unwrap();
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let mut writer = agent.connect();
            writer.send(&WriteStdin { id });
            let timeout = std::time::Duration::from_millis(200);
            writer.socket.set_write_timeout(Some(timeout)).unwrap();
            let mut taken = 0;
            while let Ok(count) = writer.socket.write(&bytes) {
                taken += count;
                assert!(taken < 4 << 20, "it takes without end");
            }
            writer
        })
        .collect();
    let used = agent.status_kib("VmRSS");
    assert!(used < MEMORY, "{used} KiB");
    agent.kill(id, Some(0)).unwrap();
    for mut writer in writers {
        // Whichever was seen first: the closed pipe or the end.
        let ends = [ErrorCode::InputClosed, ErrorCode::ProcessNotRunning];
        let code = writer.error().code;
        assert!(ends.contains(&code), "{code:?}");
    }
}

#[test]
fn unknown_values_of_enumerations_are_refused_by_name() {
    let agent = Agent::start();
    let id = agent.start_log(&shell("echo x"));
    agent.wait(id);
    let mut client = agent.connect();
    client.send(&AttachProcess {
        id,
        from: AttachFrom::from_wire(77),
        value: 0,
        follow: false,
    });
    assert_eq!(client.error().code, ErrorCode::InvalidArgument);
    let mut client = agent.connect();
    client.send(&StartProcess {
        output: protocol::process::OutputMode::from_wire(77),
        ..shell("touch never")
    });
    assert_eq!(client.error().code, ErrorCode::InvalidArgument);
    let mut client = agent.connect();
    client.send(&AttachProcess {
        id,
        from: AttachFrom::Offset,
        value: u64::MAX,
        follow: true,
    });
    assert_eq!(client.error().code, ErrorCode::InvalidArgument);
    assert!(!agent.workspace().join("never").exists());
}

#[test]
fn a_client_that_vanishes_at_any_point_of_an_attach_leaves_its_process_alone() {
    let agent = Agent::start();
    let mut request = shell("seq 1 200000; read x; exit 3");
    request.stdin = StdinMode::Pipe;
    let id = agent.start_log(&request);
    for round in 0..16 {
        let mut client = agent.connect();
        client.send(&AttachProcess {
            id,
            from: AttachFrom::Oldest,
            value: 0,
            follow: round % 2 == 0,
        });
        for _ in 0..round {
            client.frame();
        }
    }
    eventually("their streams are closed", || agent.descriptors() < 30);
    let mut last = agent.connect();
    last.send(&WriteStdin { id });
    last.send_raw(Kind::STDIN, b"\n");
    last.send_raw(Kind::STDIN_END, b"");
    last.frame().unwrap();
    assert_eq!(agent.wait(id).ended.unwrap().exit_code, 3);
}

#[test]
fn a_command_of_a_mebibyte_is_remembered_by_its_beginning_only() {
    let agent = Agent::start();
    let long = vec![b'x'; 1 << 20];
    let mut request = shell("");
    request.command = vec![[b": ", &long[..]].concat()];
    for _ in 0..20 {
        let request = StartProcess {
            id: shell("").id,
            ..request.clone()
        };
        // Longer than one argument can be: the system says so, not the agent's memory.
        let ended = agent.run(&request).ended;
        assert_eq!(ended.exit_code, 126, "{ended:?}");
        let shown: usize = agent
            .look(request.id)
            .unwrap()
            .command
            .iter()
            .map(Vec::len)
            .sum();
        assert!(shown <= 1024, "{shown}");
    }
    assert!(agent.status_kib("VmRSS") < MEMORY);
}
