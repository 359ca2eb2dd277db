//! What a client can rely on when it runs commands: output, input, ends and refusals.

mod common;

use common::{Agent, argv, eventually, shell};
use protocol::process::{ProcessEnd, StdinMode};
use protocol::{ErrorCode, Kind};

#[test]
fn the_end_follows_the_last_byte_of_hundreds_of_fast_commands() {
    let agent = Agent::start();
    for number in 0..300 {
        let output = agent.run(&argv(&["echo", &number.to_string()]));
        assert_eq!(output.text(), format!("{number}\n"));
        assert_eq!(output.ended.end, ProcessEnd::Exited);
        assert!(!output.ended.output_open);
    }
}

#[test]
fn exit_code_and_both_outputs_arrive() {
    let agent = Agent::start();
    let output = agent.shell("echo out; echo err >&2; exit 7");
    assert!(output.started);
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.ended.exit_code, 7);
    assert_eq!(output.ended.message, "");
}

#[test]
fn writes_that_wait_for_each_other_arrive_in_their_order_and_kind() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = shell("while read i; do echo o$i; read i; echo e$i >&2; done");
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    client.started();
    for (number, kind, name) in [
        (1, Kind::STDOUT, "o1\n"),
        (2, Kind::STDERR, "e2\n"),
        (3, Kind::STDOUT, "o3\n"),
        (4, Kind::STDERR, "e4\n"),
    ] {
        client.send_raw(Kind::STDIN, format!("{number}\n").as_bytes());
        let frame = client.frame().unwrap();
        assert_eq!((frame.kind, &*frame.body), (kind, name.as_bytes()));
    }
    client.send_raw(Kind::STDIN_END, b"");
    assert_eq!(client.output().ended.exit_code, 0);
}

#[test]
fn a_background_child_that_holds_the_output_does_not_hold_the_command() {
    let agent = Agent::start();
    let output = agent.shell("echo before; sleep 600 & echo $!");
    assert!(output.ended.output_open);
    assert_eq!(output.ended.exit_code, 0);
    let child: i32 = output.text().lines().nth(1).unwrap().parse().unwrap();
    assert!(output.text().starts_with("before\n"));
    assert!(std::path::Path::new(&format!("/proc/{child}")).exists());
    agent.shell(&format!("kill {child}"));
}

#[test]
fn a_background_child_that_writes_without_end_does_not_hold_the_command() {
    let agent = Agent::start();
    let output = agent.shell("yes & echo $! >&2");
    assert!(output.ended.output_open);
    let child = String::from_utf8(output.stderr).unwrap();
    agent.shell(&format!("kill -9 {child}"));
}

#[test]
fn a_background_child_can_go_on_writing_when_its_command_is_done() {
    let agent = Agent::start();
    let mark = agent.workspace().join("mark");
    // Far more than a pipe holds, so that a pipe nobody empties would stop it.
    let output = agent.shell("(sleep 0.4; head -c 1000000 /dev/zero && touch mark) & echo done");
    assert!(output.ended.output_open);
    eventually("the child finishes", || mark.exists());
}

#[test]
fn what_was_written_before_the_end_reaches_a_client_that_reads_late() {
    let agent = Agent::start();
    // Some of these sizes fill the socket and leave the last bytes in the pipe when the command
    // ends, while somebody else keeps the pipe open for longer than others are waited for.
    std::thread::scope(|scope| {
        for size in (120_000..400_000).step_by(20_000) {
            let agent = &agent;
            scope.spawn(move || {
                let mut client = agent.connect();
                let line = format!("sleep 8 & head -c {size} /dev/zero; echo last");
                client.send(&shell(&line));
                client.started();
                std::thread::sleep(std::time::Duration::from_millis(2800));
                let output = client.output();
                assert_eq!(output.stdout.len(), size + 5);
                assert!(output.stdout.ends_with(b"last\n"));
            });
        }
    });
}

#[test]
fn standard_input_of_any_size_comes_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = argv(&["cat"]);
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut writer = common::Client::new(client.socket.try_clone().unwrap());
    let copy = sent.clone();
    let thread = std::thread::spawn(move || {
        for piece in copy.chunks(50_000) {
            writer.send_raw(Kind::STDIN, piece);
        }
        writer.send_raw(Kind::STDIN_END, b"");
    });
    let output = client.output();
    thread.join().unwrap();
    assert!(
        output.stdout == sent,
        "{} bytes came back",
        output.stdout.len()
    );
}

#[test]
fn input_that_is_read_slowly_takes_no_more_of_the_agents_memory_than_waits() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = shell("while [ $(head -c 200000 | wc -c) -gt 0 ]; do :; done");
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    let before = agent.status_kib("RssAnon");
    let piece = vec![7; 500_000];
    for _ in 0..100 {
        client.send_raw(Kind::STDIN, &piece);
    }
    let after = agent.status_kib("RssAnon");
    client.send_raw(Kind::STDIN_END, b"");
    assert_eq!(client.output().ended.exit_code, 0);
    assert!(after < before + (8 << 10), "{before} KiB, then {after} KiB");
}

#[test]
fn a_name_of_a_megabyte_is_cut_in_what_is_said_of_it() {
    let agent = Agent::start();
    let name = "x".repeat(1_000_000);
    for _ in 0..20 {
        let said = agent.run(&argv(&[&name])).ended.message;
        assert!(said.contains("xxx"), "{said}");
        assert!(said.len() < 1000, "{} bytes", said.len());
    }
}

#[test]
fn input_that_nobody_reads_does_not_hold_up_output() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = shell("head -c 5000000 /dev/zero; exit 3");
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    client.send_raw(Kind::STDIN, &[1; 200_000]);
    let output = client.output();
    assert_eq!(output.stdout.len(), 5_000_000);
    assert_eq!(output.ended.exit_code, 3);
}

#[test]
fn a_client_that_sends_no_more_still_hears_its_process() {
    let agent = Agent::start();
    for size in [5, 600_000] {
        let mut client = agent.connect();
        // Takes its input late: with much of it, the end of the client's half is not read first.
        let mut request = shell("sleep 0.3; wc -c");
        request.stdin = StdinMode::Pipe;
        client.send(&request);
        client.started();
        let mut writer = client.socket.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            use std::io::Write;
            let mut bytes = Vec::new();
            for piece in vec![7; size].chunks(50_000) {
                protocol::frame::append(&mut bytes, Kind::STDIN, piece).unwrap();
            }
            writer.write_all(&bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        assert_eq!(client.output().text().trim(), size.to_string());
        thread.join().unwrap();
    }
}

#[test]
fn the_input_of_a_process_stays_open_when_its_client_leaves() {
    let agent = Agent::start();
    let mark = agent.workspace().join("mark");
    let mut client = agent.connect();
    let mut request = shell("cat > /dev/null; touch ended");
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    let pid = client.started().pid;
    client.send_raw(Kind::STDIN, b"one line\n");
    drop(client);
    // Another command is served after the leaving was noticed, and the first still waits.
    eventually("the agent notices", || agent.descriptors() < 20);
    agent.shell("sleep 0.2; touch mark");
    assert!(mark.exists());
    assert!(!agent.workspace().join("ended").exists());
    agent.shell(&format!("kill -9 -{pid}"));
}

#[test]
fn a_signal_that_does_not_exist_is_refused_by_name_and_harms_nothing() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&shell("sleep 600"));
    client.started();
    for signal in [0, 65, 255] {
        client.signal(signal);
        assert_eq!(client.error().code, ErrorCode::InvalidArgument);
    }
    client.signal(libc::SIGTERM);
    assert_eq!(client.output().ended.signal, 15);
}

#[test]
fn a_signal_reaches_a_process_that_leaves_its_input_unread() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = argv(&["sleep", "600"]);
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    client.started();
    // More than its pipe holds.
    for _ in 0..4 {
        client.send_raw(Kind::STDIN, &[1; 50_000]);
    }
    client.signal(libc::SIGTERM);
    assert_eq!(client.output().ended.signal, 15);
}

#[test]
fn input_for_a_process_that_closed_it_is_quiet() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = shell("exec 0<&-; sleep 0.2; echo alive");
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    client.started();
    client.send_raw(Kind::STDIN, &[1; 100_000]);
    let output = client.output();
    assert_eq!(output.text(), "alive\n");
}

#[test]
fn the_end_of_input_is_seen_and_may_be_sent_twice() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut request = argv(&["wc", "-c"]);
    request.stdin = StdinMode::Pipe;
    client.send(&request);
    client.send_raw(Kind::STDIN, b"12345");
    client.send_raw(Kind::STDIN_END, b"");
    client.send_raw(Kind::STDIN_END, b"");
    assert_eq!(client.output().text().trim(), "5");
}

#[test]
fn without_a_pipe_standard_input_is_empty() {
    let agent = Agent::start();
    assert_eq!(agent.run(&argv(&["cat"])).stdout, b"");
}

#[test]
fn a_signal_reaches_the_group_and_is_named_in_the_end() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&shell("sleep 600; true"));
    client.started();
    client.signal(libc::SIGTERM);
    let output = client.output();
    assert_eq!(output.ended.end, ProcessEnd::Signalled);
    assert_eq!(output.ended.exit_code, 128 + 15);
    assert_eq!(output.ended.signal, 15);
    assert_eq!(output.ended.message, "killed by signal SIGTERM");
    // The child of the shell was in the group and closed the pipe.
    assert!(!output.ended.output_open);
}

#[test]
fn a_crash_is_told_by_the_name_of_its_signal() {
    let agent = Agent::start();
    let output = agent.shell("kill -SEGV $$");
    assert_eq!(output.ended.message, "killed by signal SIGSEGV");
    assert_eq!(output.ended.exit_code, 139);
}

#[test]
fn what_cannot_be_started_is_told_apart() {
    let agent = Agent::start();
    std::fs::write(agent.workspace().join("plain"), "text").unwrap();
    let missing = agent.run(&argv(&["no-such-program", "x"])).ended;
    assert_eq!(missing.end, ProcessEnd::NotFound);
    assert_eq!(
        (missing.exit_code, &*missing.message),
        (127, "not found: no-such-program")
    );
    let missing = agent.run(&argv(&["./nothing"])).ended;
    assert_eq!(
        (missing.exit_code, &*missing.message),
        (127, "not found: ./nothing")
    );
    let plain = agent.run(&argv(&["./plain"])).ended;
    assert_eq!(plain.end, ProcessEnd::NotExecutable);
    assert_eq!(
        (plain.exit_code, &*plain.message),
        (126, "not executable: ./plain")
    );
    let mut nowhere = argv(&["true"]);
    nowhere.cwd = b"gone".to_vec();
    let nowhere = agent.run(&nowhere);
    assert!(!nowhere.started);
    assert_eq!(nowhere.ended.end, ProcessEnd::NoSuchDirectory);
    assert_eq!(
        (nowhere.ended.exit_code, &*nowhere.ended.message),
        (126, "no such directory: gone")
    );
}

#[test]
fn a_request_that_makes_no_sense_is_refused_by_name() {
    let agent = Agent::start();
    let mut equals = argv(&["true"]);
    equals.env = vec![(b"A=B".to_vec(), Some(b"c".to_vec()))];
    let mut nul_cwd = argv(&["true"]);
    nul_cwd.cwd = b"a\0b".to_vec();
    for request in [argv(&[]), argv(&["echo", "a\0b"]), equals, nul_cwd] {
        let mut client = agent.connect();
        client.send(&request);
        assert_eq!(client.error().code, ErrorCode::InvalidArgument);
        assert_eq!(client.frame(), None);
    }
    assert_eq!(agent.run(&argv(&["true"])).ended.exit_code, 0);
}

#[test]
fn an_empty_shell_command_succeeds() {
    let agent = Agent::start();
    assert_eq!(agent.shell("").ended.exit_code, 0);
}

#[test]
fn the_environment_is_defaults_then_machine_then_request() {
    let agent = Agent::start();
    let mut request = argv(&["env"]);
    request.env = vec![
        (b"MINE".to_vec(), Some(b"1".to_vec())),
        (b"LANG".to_vec(), None),
    ];
    let output = agent.run(&request);
    let lines: Vec<&str> = output.text().lines().collect();
    for expected in [
        "HOME=/root",
        "USER=root",
        "LOGNAME=root",
        "FROM_VM=yes",
        "MINE=1",
    ] {
        assert!(lines.contains(&expected), "{expected} is not in {lines:?}");
    }
    // PATH and SHELL too; LANG was taken away.
    assert_eq!(lines.len(), 7, "{lines:?}");
}

#[test]
fn a_process_begins_with_a_clean_slate() {
    let agent = Agent::start();
    let output = agent.shell(
        "umask; ls /proc/self/fd | wc -l; grep -E '^Sig(Blk|Ign)' /proc/self/status; \
         cut -d' ' -f5,6 /proc/$$/stat; echo $$; pwd",
    );
    let lines: Vec<&str> = output.text().lines().collect();
    // ls itself has one descriptor for the directory.
    assert_eq!(lines[..2], ["0022", "4"]);
    assert_eq!(lines[2].split_whitespace().nth(1), Some("0000000000000000"));
    assert_eq!(lines[3].split_whitespace().nth(1), Some("0000000000000000"));
    assert_eq!(
        lines[4],
        format!("{0} {0}", lines[5]),
        "own group and session"
    );
    assert_eq!(lines[6], agent.workspace().to_str().unwrap());
}

#[test]
fn two_hundred_processes_at_once_lose_no_byte() {
    let agent = Agent::start();
    std::thread::scope(|scope| {
        for number in 0..200 {
            let agent = &agent;
            scope.spawn(move || {
                let line = format!("seq {number} {}; seq 1 500 >&2", number + 2000);
                let output = agent.shell(&line);
                let expected: String = (number..=number + 2000).map(|i| format!("{i}\n")).collect();
                assert_eq!(output.text(), expected);
                assert_eq!(
                    output.stderr.iter().filter(|byte| **byte == b'\n').count(),
                    500
                );
            });
        }
    });
}

#[test]
fn a_flood_of_output_leaves_the_agents_memory_flat() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&shell(
        "head -c 300000000 /dev/zero & head -c 300000000 /dev/zero >&2; wait",
    ));
    let (mut bytes, mut most) = (0_u64, 0);
    loop {
        let frame = client.frame().unwrap();
        if frame.kind == Kind::PROCESS_ENDED {
            break;
        }
        if bytes % (1 << 24) < 70_000 {
            most = most.max(agent.own_kib());
        }
        bytes += frame.body.len() as u64;
    }
    assert!(bytes >= 600_000_000, "{bytes}");
    assert!(most < common::FLAT, "{most} KiB");
}

#[test]
fn a_reader_that_stops_holds_its_process_back_and_costs_no_memory() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&shell("yes; true"));
    client.started();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(agent.own_kib() < common::FLAT);
    // Another stream is not held back.
    assert_eq!(agent.shell("echo hi").text(), "hi\n");
    client.signal(libc::SIGKILL);
    assert_eq!(client.output().ended.signal, 9);
}

#[test]
fn a_process_outlives_its_client_and_never_stands_still() {
    let agent = Agent::start();
    let mark = agent.workspace().join("mark");
    let mut client = agent.connect();
    client.send(&shell(
        "sleep 0.3; head -c 2000000 /dev/zero; echo x >&2; touch mark",
    ));
    client.started();
    drop(client);
    eventually("the process finishes", || mark.exists());
}

#[test]
fn a_repeated_start_attaches_instead_of_starting_twice() {
    let agent = Agent::start();
    let mut first = agent.connect();
    let request = shell("echo once >> starts; echo started; read line; echo $line");
    let request = protocol::process::StartProcess {
        stdin: StdinMode::Pipe,
        ..request
    };
    first.send(&request);
    let pid = first.started().pid;
    assert_eq!(first.frame().unwrap().body, b"started\n");
    // The connection is lost; the same request comes again.
    drop(first);
    let mut second = agent.connect();
    second.send(&request);
    assert_eq!(second.started().pid, pid);
    second.send_raw(Kind::STDIN, b"on\n");
    assert_eq!(second.output().text(), "started\non\n");
    // And once more after the end.
    let again = agent.run(&request);
    assert_eq!(again.text(), "started\non\n");
    let starts = std::fs::read_to_string(agent.workspace().join("starts")).unwrap();
    assert_eq!(starts, "once\n");
}

#[test]
fn an_id_in_use_for_another_command_is_refused_by_name() {
    let agent = Agent::start();
    let first = shell("true");
    agent.run(&first);
    let mut client = agent.connect();
    client.send(&protocol::process::StartProcess {
        id: first.id,
        ..shell("false")
    });
    assert_eq!(client.error().code, ErrorCode::ProcessExists);
}

#[test]
fn many_commands_leave_no_descriptor_and_no_zombie_behind() {
    let agent = Agent::start();
    agent.shell("true");
    eventually("streams close", || agent.descriptors() < 20);
    let before = agent.descriptors();
    for number in 0..100 {
        match number % 4 {
            0 => drop(agent.shell("echo x")),
            1 => drop(agent.run(&argv(&["missing"]))),
            // An orphan that the agent inherits.
            2 => drop(agent.shell("(sleep 0.05 &) ; true")),
            _ => {
                let mut client = agent.connect();
                client.send(&shell("sleep 0.05; echo gone"));
            }
        }
    }
    eventually("descriptors return", || agent.descriptors() <= before);
    let children = format!("/proc/{0}/task/{0}/children", agent.child.id());
    eventually("children are reaped", || {
        std::fs::read_to_string(&children)
            .unwrap()
            .trim()
            .is_empty()
    });
}
