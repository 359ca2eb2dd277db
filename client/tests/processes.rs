//! Processes by their ids, against a real agent behind the real proxy.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use client::protocol::ErrorCode;
use client::protocol::process::ProcessEnd;
use client::{ClientError, Command, Output, Process, ReadFrom, Record, new_process_id};
use common::real::{Machine, soon};
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Everything a reader gives, to its end.
async fn records(process: &Process, from: ReadFrom) -> Vec<Record> {
    let reader = process.follow(from).await.unwrap();
    soon(reader.map(Result::unwrap).collect()).await
}

fn bytes(records: &[Record]) -> Vec<u8> {
    let pieces = records.iter().map(|record| match &record.output {
        Output::Stdout(bytes) | Output::Stderr(bytes) => bytes.clone(),
        other => panic!("{other:?}"),
    });
    pieces.collect::<Vec<_>>().concat()
}

#[tokio::test]
async fn a_started_process_needs_no_reader_and_is_read_from_any_offset() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let process = vm
        .start(Command::shell("seq 1 200000; echo err >&2"))
        .await
        .unwrap();
    let info = soon(process.wait()).await.unwrap();
    assert_eq!(info.ended.unwrap().exit_code, 0);
    let all = records(&process, ReadFrom::Oldest).await;
    let whole = bytes(&all);
    assert_eq!(whole.len() as u64, info.bytes);
    let mut at = 0;
    for record in &all {
        assert_eq!(record.offset, at);
        at += record.output.length();
    }
    assert!(matches!(&all.last().unwrap().output, Output::Stderr(said) if said == b"err\n"));
    let rest = records(&process, ReadFrom::Offset(500_000)).await;
    assert_eq!(rest[0].offset, 500_000);
    assert!(bytes(&rest) == whole[500_000..]);
    let beyond = process
        .follow(ReadFrom::Offset(u64::MAX))
        .await
        .unwrap_err();
    assert_eq!(beyond.code(), Some(ErrorCode::InvalidArgument));
    assert!(records(&process, ReadFrom::Now).await.is_empty());
}

#[tokio::test]
async fn what_is_printed_arrives_while_the_process_still_runs() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let process = vm
        .start(Command::shell("echo one; read line; echo $line").stdin_pipe())
        .await
        .unwrap();
    let mut reader = process.follow(ReadFrom::Oldest).await.unwrap();
    let first = soon(reader.next()).await.unwrap().unwrap();
    assert_eq!(first.output, Output::Stdout(b"one\n".to_vec()));
    assert!(process.info().await.unwrap().ended.is_none());
    assert_eq!(process.tail(5).await.unwrap(), ["one"]);
    let mut replay = process.replay(ReadFrom::Oldest).await.unwrap();
    assert!(soon(replay.next()).await.unwrap().is_some());
    assert!(soon(replay.next()).await.unwrap().is_none());
    assert!(replay.ended().is_none() && replay.offset() == 4);
    process.stdin(b"two\n").await.unwrap();
    let second = soon(reader.next()).await.unwrap().unwrap();
    assert_eq!(
        (second.offset, second.output),
        (4, Output::Stdout(b"two\n".to_vec()))
    );
    assert!(soon(reader.next()).await.unwrap().is_none());
    assert_eq!(reader.ended().unwrap().exit_code, 0);
}

#[tokio::test]
async fn input_of_any_size_goes_in_and_is_closed_once() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let process = vm
        .start(Command::argv(["wc", "-c"]).stdin_pipe())
        .await
        .unwrap();
    soon(process.stdin(&vec![7; 1_000_000])).await.unwrap();
    soon(process.stdin(&vec![7; 500_000])).await.unwrap();
    process.close_stdin().await.unwrap();
    process.close_stdin().await.unwrap();
    soon(process.wait()).await.unwrap();
    assert_eq!(process.tail(1).await.unwrap(), ["1500000"]);
    let late = process.stdin(b"more").await.unwrap_err();
    assert_eq!(late.code(), Some(ErrorCode::ProcessNotRunning));
    let without = vm.start(Command::argv(["sleep", "60"])).await.unwrap();
    let closed = soon(without.stdin(&vec![1; 2_000_000])).await.unwrap_err();
    assert_eq!(closed.code(), Some(ErrorCode::InputClosed));
    without.kill(Some(Duration::ZERO)).await.unwrap();
}

#[tokio::test]
async fn a_commands_input_is_a_writer() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let line = "read first; sleep 0.1; wc -c";
    let mut run = vm.exec(Command::shell(line).stdin_pipe()).await.unwrap();
    let mut input = run.input().writer();
    let writing = tokio::spawn(async move {
        let mut source = tokio::io::repeat(b'x').take(1_000_000);
        input.write_all(b"first\n").await.unwrap();
        tokio::io::copy(&mut source, &mut input).await.unwrap();
        input.shutdown().await.unwrap();
    });
    let mut said = Vec::new();
    while let Some(output) = soon(run.next()).await.unwrap() {
        if let Output::Stdout(bytes) = output {
            said.extend(bytes);
        }
    }
    soon(writing).await.unwrap();
    assert_eq!(said, b"1000000\n");
}

#[tokio::test]
async fn a_process_is_signalled_killed_listed_and_forgotten() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let trap = Command::shell("trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done");
    let process = vm.start(trap).await.unwrap();
    let mut reader = process.follow(ReadFrom::Oldest).await.unwrap();
    soon(reader.next()).await.unwrap();
    process.signal(10).await.unwrap();
    // The shell may say on its other output that the signal ended its `sleep`.
    let said = loop {
        let record = soon(reader.next()).await.unwrap().unwrap();
        if let Output::Stdout(bytes) = record.output {
            break bytes;
        }
    };
    assert_eq!(said, b"usr1\n");
    let running = process.forget().await.unwrap_err();
    assert_eq!(running.code(), Some(ErrorCode::ProcessRunning));
    let short = process.wait_for(Duration::from_millis(1)).await.unwrap();
    assert!(short.ended.is_none());
    let killed = soon(process.kill(None)).await.unwrap().ended.unwrap();
    assert_eq!(killed.end, ProcessEnd::Killed);
    assert_eq!(soon(process.kill(None)).await.unwrap().ended, Some(killed));
    let signal = process.signal(10).await.unwrap_err();
    assert_eq!(signal.code(), Some(ErrorCode::ProcessNotRunning));
    for _ in 0..70 {
        vm.start(Command::argv(["true"])).await.unwrap();
    }
    let listed = vm.processes().await.unwrap();
    assert_eq!(listed.len(), 71, "more than one page");
    assert_eq!(listed[0].id, process.id());
    process.forget().await.unwrap();
    let gone = process.info().await.unwrap_err();
    assert_eq!(gone.code(), Some(ErrorCode::NoSuchProcess));
}

#[tokio::test]
async fn a_repeated_start_attaches_and_one_that_fails_is_told_by_its_record() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let id = new_process_id().unwrap();
    let command = Command::shell("echo once >> count; sleep 60").id(id);
    let first = vm.start(command.clone()).await.unwrap();
    let second = vm.start(command).await.unwrap();
    assert_eq!(first.id(), second.id());
    assert_eq!(vm.processes().await.unwrap().len(), 1);
    let other = vm.start(Command::shell("true").id(id)).await.unwrap_err();
    assert_eq!(other.code(), Some(ErrorCode::ProcessExists));
    first.kill(Some(Duration::ZERO)).await.unwrap();
    let missing = vm.start(Command::argv(["no-such-program"])).await.unwrap();
    let info = missing.info().await.unwrap();
    let ended = info.ended.unwrap();
    assert_eq!(
        (info.pid, ended.exit_code, ended.end),
        (0, 127, ProcessEnd::NotFound)
    );
    assert!(
        ended.message.contains("no-such-program"),
        "{}",
        ended.message
    );
}

#[tokio::test]
async fn a_terminal_has_the_size_it_was_given_last() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let ask = Command::shell("stty size; read line; stty size").terminal(80, 24);
    let process = vm.start(ask).await.unwrap();
    let mut reader = process.follow(ReadFrom::Oldest).await.unwrap();
    let first = soon(reader.next()).await.unwrap().unwrap();
    assert_eq!(first.output, Output::Stdout(b"24 80\r\n".to_vec()));
    soon(process.resize(100, 50)).await.unwrap();
    process.stdin(b"\n").await.unwrap();
    soon(process.wait()).await.unwrap();
    assert_eq!(process.tail(1).await.unwrap(), ["50 100"]);
    soon(process.resize(1, 1)).await.unwrap();
}

#[tokio::test]
async fn tail_gives_lines_without_ends_and_characters_whole() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let line = r"printf 'a\nb\303'; sleep 0.1; printf 'x' >&2; sleep 0.1; printf '\251\nc\377'";
    let process = vm.start(Command::shell(line)).await.unwrap();
    soon(process.wait()).await.unwrap();
    assert_eq!(process.tail(0).await.unwrap(), [""; 0]);
    assert_eq!(process.tail(1).await.unwrap(), ["c\u{fffd}"]);
    assert_eq!(process.tail(9).await.unwrap(), ["a", "bxé", "c\u{fffd}"]);
    for (line, wanted) in [
        (r"printf '\n'", vec![""]),
        (r"printf '10%%\r20%%\r\n\nx'", vec!["10%\r20%", "", "x"]),
        ("true", vec![]),
    ] {
        let process = vm.start(Command::shell(line)).await.unwrap();
        soon(process.wait()).await.unwrap();
        assert_eq!(process.tail(9).await.unwrap(), wanted, "{line}");
    }
}

#[tokio::test]
async fn a_command_with_everything_set_runs_so() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    std::fs::create_dir(machine.workspace().join("deep")).unwrap();
    let command = Command::shell("pwd; echo $A $FROM_VM ${HOME-none}; sleep 60")
        .cwd("deep")
        .env("A", "1")
        .env_remove("HOME")
        .user("root")
        .deadline(Duration::from_millis(300));
    let mut run = vm.exec(command).await.unwrap();
    let mut said = Vec::new();
    while let Some(output) = soon(run.next()).await.unwrap() {
        if let Output::Stdout(bytes) = output {
            said.extend(bytes);
        }
    }
    let said = String::from_utf8(said).unwrap();
    assert!(said.ends_with("/deep\n1 yes none\n"), "{said}");
    assert_eq!(run.ended().unwrap().end, ProcessEnd::TimedOut);
    assert_eq!(run.offset(), said.len() as u64);
    let again = vm.process(run.id());
    assert_eq!(
        bytes(&records(&again, ReadFrom::Oldest).await),
        said.as_bytes()
    );
}

#[tokio::test]
async fn a_vm_that_dies_is_told_apart_from_a_lost_connection() {
    let mut machine = Machine::start().await;
    let vm = machine.vm().await;
    let mut run = vm.exec(Command::shell("echo; sleep 60")).await.unwrap();
    let mut other = vm.exec(Command::shell("echo; sleep 60")).await.unwrap();
    for run in [&mut run, &mut other] {
        soon(run.next()).await.unwrap();
        soon(run.next()).await.unwrap();
    }
    machine.cut();
    let error = soon(run.next()).await.unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error:?}");
    let mut run = vm.exec(Command::shell("echo; sleep 60")).await.unwrap();
    soon(run.next()).await.unwrap();
    soon(run.next()).await.unwrap();
    for process in vm.processes().await.unwrap() {
        vm.process(process.id).signal(9).await.unwrap();
    }
    assert_eq!(soon(run.wait()).await.unwrap().signal, 9);
    let idle = vm.start(Command::shell("sleep 1")).await.unwrap();
    let mut reader = idle.follow(ReadFrom::Oldest).await.unwrap();
    machine.kill_agent();
    let error = soon(reader.next()).await.unwrap_err();
    assert!(matches!(error, ClientError::AgentGone), "{error:?}");
}

#[tokio::test]
async fn a_write_that_is_given_up_half_way_leaves_the_stream_in_order() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let line = "until [ -e go ]; do sleep 0.05; done; tr -d x | wc -c";
    let mut run = vm.exec(Command::shell(line).stdin_pipe()).await.unwrap();
    let input = run.input();
    // More than everybody on the way takes while the command does not read: it stops in a frame.
    let much = vec![b'x'; 8 << 20];
    let given_up = tokio::time::timeout(Duration::from_millis(300), input.write(&much)).await;
    assert!(given_up.is_err(), "it should still wait");
    let mut writer = input.writer();
    let given_up = tokio::time::timeout(Duration::from_millis(100), async {
        writer.write_all(&much).await.unwrap();
        writer.flush().await.unwrap();
    });
    assert!(given_up.await.is_err(), "it should still wait");
    drop(writer);
    std::fs::write(machine.workspace().join("go"), b"").unwrap();
    soon(input.write(b"12345")).await.unwrap();
    soon(input.end()).await.unwrap();
    let mut said = Vec::new();
    while let Some(output) = soon(run.next()).await.unwrap() {
        if let Output::Stdout(bytes) = output {
            said.extend(bytes);
        }
    }
    assert_eq!(String::from_utf8(said).unwrap().trim(), "5");
}
