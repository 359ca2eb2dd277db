//! What a lost connection does to those who were on it, and to those who come after.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use client::protocol::Retry;
use client::{ClientError, Command, Output, ReadFrom, Side, new_process_id};
use common::real::{Machine, soon};
use common::{VM, info};

#[tokio::test]
async fn the_next_request_connects_again_and_the_one_under_way_says_whether_to_repeat() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let process = vm
        .start(Command::argv(["sleep", "60"]).stdin_pipe())
        .await
        .unwrap();
    let waiting = process.clone();
    let waiting = tokio::spawn(async move { waiting.wait().await });
    let typing = process.clone();
    let typing = tokio::spawn(async move { typing.stdin(&vec![0; 3_000_000]).await });
    // Both have reached the agent when a later question was answered.
    for _ in 0..20 {
        process.info().await.unwrap();
    }
    machine.cut();
    let error = soon(waiting).await.unwrap().unwrap_err();
    assert!(
        matches!(error, ClientError::Lost { safe: true, .. }),
        "{error:?}"
    );
    assert_eq!((error.side(), error.retry()), (Side::Network, Retry::Safe));
    let error = soon(typing).await.unwrap().unwrap_err();
    assert!(
        matches!(error, ClientError::Lost { safe: false, .. }),
        "{error:?}"
    );
    assert_eq!(error.retry(), Retry::No);
    assert!(soon(process.info()).await.unwrap().ended.is_none());
    soon(process.kill(Some(Duration::ZERO))).await.unwrap();
}

#[tokio::test]
async fn a_reader_goes_on_where_it_was_cut_with_no_byte_lost_or_doubled() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let process = vm.start(Command::shell("seq 1 300000")).await.unwrap();
    let mut reader = process.follow(ReadFrom::Oldest).await.unwrap();
    let (mut said, mut cuts, mut until_cut) = (Vec::new(), 0, 5);
    loop {
        match soon(reader.next()).await {
            Ok(Some(record)) => {
                assert_eq!(record.offset, said.len() as u64);
                let Output::Stdout(bytes) = record.output else {
                    panic!("{:?}", record.output);
                };
                said.extend(bytes);
                until_cut -= 1;
                if until_cut == 0 {
                    machine.cut();
                }
            }
            Ok(None) => break,
            Err(ClientError::Lost { safe: true, .. }) => {
                cuts += 1;
                until_cut = 5;
                soon(reader.resume()).await.unwrap();
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(cuts > 1, "{cuts} cuts");
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(said == expected.as_bytes());
    assert_eq!(reader.ended().unwrap().exit_code, 0);
}

#[tokio::test]
async fn starts_between_cuts_start_each_process_once() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let starting = vm.clone();
    let starting = tokio::spawn(async move {
        for number in 0..40 {
            let command = Command::shell(format!("echo {number} >> started"));
            let command = command.id(new_process_id().unwrap());
            // A start repeats itself a few times; with an id whoever asked may go on so.
            while let Err(error) = starting.start(command.clone()).await {
                assert_eq!(error.retry(), Retry::Safe, "{error:?}");
            }
        }
    });
    let mut cuts = 0;
    while !starting.is_finished() {
        // Fewer and fewer, so that it ends on any machine.
        cuts += 1;
        tokio::time::sleep(Duration::from_millis(cuts)).await;
        machine.cut();
    }
    soon(starting).await.unwrap();
    let processes = loop {
        match soon(vm.processes()).await {
            Ok(processes) => break processes,
            Err(error) => assert_eq!(error.retry(), Retry::Safe, "{error:?}"),
        }
    };
    for process in &processes {
        soon(vm.process(process.id).wait()).await.unwrap();
    }
    let started = std::fs::read_to_string(machine.workspace().join("started")).unwrap();
    let mut numbers: Vec<u32> = started.lines().map(|line| line.parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..40).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_cut_execution_is_not_to_be_run_again_but_followed_on() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let line = "echo one; read line; echo two";
    let mut run = vm.exec(Command::shell(line).stdin_pipe()).await.unwrap();
    while run.offset() < 4 {
        soon(run.next()).await.unwrap();
    }
    machine.cut();
    let error = soon(run.next()).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Lost { safe: false, .. }),
        "{error:?}"
    );
    let process = vm.process(run.id());
    let mut reader = process
        .follow(ReadFrom::Offset(run.offset()))
        .await
        .unwrap();
    process.stdin(b"\n").await.unwrap();
    let record = soon(reader.next()).await.unwrap().unwrap();
    assert_eq!(record.output, Output::Stdout(b"two\n".to_vec()));
}

#[tokio::test]
async fn requests_wait_for_an_appliance_that_comes_back() {
    let machine = Machine::start().await;
    let client = machine.client().await;
    machine.take_away();
    let asking: Vec<_> = (0..10)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.get(VM.parse().unwrap()).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    machine.give_back();
    for one in asking {
        // One of them may have been under way when the wire was cut; it says so.
        match soon(one).await.unwrap() {
            Ok(vm) => assert_eq!(vm, info(VM)),
            Err(error) => assert_eq!(error.retry(), Retry::Safe, "{error:?}"),
        }
    }
    assert_eq!(
        soon(client.get(VM.parse().unwrap())).await.unwrap(),
        info(VM)
    );
}

#[tokio::test]
async fn an_appliance_that_stays_away_is_an_error_in_the_end_for_all_who_wait() {
    let machine = Machine::start().await;
    let client = machine.client().await;
    machine.take_away();
    // The client has noticed by then, so these are not under way but wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let asking: Vec<_> = (0..5)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.get(VM.parse().unwrap()).await })
        })
        .collect();
    for one in asking {
        let error = soon(one).await.unwrap().unwrap_err();
        assert_eq!(error.side(), Side::Network, "{error:?}");
    }
    machine.give_back();
    assert_eq!(
        soon(client.get(VM.parse().unwrap())).await.unwrap(),
        info(VM)
    );
}

#[tokio::test]
async fn a_client_that_was_closed_stays_closed() {
    let machine = Machine::start().await;
    let client = machine.client().await;
    client.clone().close().await;
    let error = soon(client.get(VM.parse().unwrap())).await.unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error:?}");
}
