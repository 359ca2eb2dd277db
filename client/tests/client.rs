//! The library against the real proxy.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use client::protocol::vm::{DeleteVm, ListVms, VmPage};
use client::protocol::{ErrorBody, ErrorCode, Kind, message};
use client::{Client, ClientError, Command, Output, Side, Trust, fetch_ca, new_vm};
use common::*;

async fn connect(appliance: &Appliance) -> Client {
    let endpoint = appliance.unix().parse().unwrap();
    Client::connect(endpoint, TOKEN.into(), Trust::none())
        .await
        .unwrap()
}

#[tokio::test]
async fn the_ca_that_is_fetched_is_the_one_to_trust() {
    let appliance = Appliance::start(8, |_| Reply::message(&info(VM))).await;
    let endpoint: client::Endpoint = appliance.tls().parse().unwrap();
    let fetched = fetch_ca(&endpoint).await.unwrap();
    let normal = |pem: &str| pem.split_whitespace().collect::<String>();
    assert_eq!(normal(&fetched.pem), normal(&appliance.ca_pem));
    let trust = Trust::from_pem(fetched.pem.as_bytes()).unwrap();
    let client = Client::connect(endpoint, TOKEN.into(), trust)
        .await
        .unwrap();
    let vm = client.create(new_vm().unwrap()).await.unwrap();
    assert_eq!(vm, info(VM));
}

#[tokio::test]
async fn a_tls_endpoint_without_its_ca_is_not_believed() {
    let appliance = Appliance::start(8, |_| Reply::message(&info(VM))).await;
    let other = Appliance::start(8, |_| Reply::message(&info(VM))).await;
    let endpoint: client::Endpoint = appliance.tls().parse().unwrap();
    let error = Client::connect(endpoint.clone(), TOKEN.into(), Trust::none())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("SUP_CA"), "{error}");
    let trust = Trust::from_pem(other.ca_pem.as_bytes()).unwrap();
    let error = Client::connect(endpoint, TOKEN.into(), trust)
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn a_wrong_token_is_the_callers_fault() {
    let appliance = Appliance::start(8, |_| Reply::message(&info(VM))).await;
    let endpoint = appliance.unix().parse().unwrap();
    let error = Client::connect(endpoint, "wrong".into(), Trust::none())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Unauthenticated));
    assert_eq!(error.side(), Side::Caller);
}

#[tokio::test]
async fn nobody_there_is_the_networks_fault() {
    let endpoint = "unix:/nonexistent/api.sock".parse().unwrap();
    let error = Client::connect(endpoint, TOKEN.into(), Trust::none())
        .await
        .unwrap_err();
    assert_eq!(error.side(), Side::Network);
}

#[tokio::test]
async fn a_list_comes_whole_from_its_pages() {
    let appliance = Appliance::start(8, |request| {
        let asked: ListVms = message::decode_body(&request.body).unwrap();
        let (id, more) = match asked.after.as_ref().map(|id| id.as_str()) {
            None => ("vm-00000001", true),
            Some("vm-00000001") => ("vm-00000002", true),
            _ => ("vm-00000003", false),
        };
        let vms = vec![info(id)];
        Reply::message(&VmPage { vms, more })
    })
    .await;
    let all = connect(&appliance).await.list().await.unwrap();
    let ids: Vec<_> = all.iter().map(|vm| vm.id.as_str()).collect();
    assert_eq!(ids, ["vm-00000001", "vm-00000002", "vm-00000003"]);
}

#[tokio::test]
async fn a_list_that_turns_in_circles_is_an_error() {
    let appliance = Appliance::start(8, |_| {
        let vms = vec![info(VM)];
        Reply::message(&VmPage { vms, more: true })
    })
    .await;
    let error = connect(&appliance).await.list().await.unwrap_err();
    assert!(matches!(error, ClientError::Broken(_)), "{error:?}");
}

#[tokio::test]
async fn a_fault_of_the_appliance_is_retried_and_then_told() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let appliance = Appliance::start(8, move |request| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let busy = ErrorBody::host(ErrorCode::Unavailable, "restarting").retryable_after_ms(1);
        if Kind(request.kind) == Kind::GET_VM && number == 2 {
            Reply::message(&info(VM))
        } else {
            Reply::message(&busy)
        }
    })
    .await;
    let client = connect(&appliance).await;
    client.get(VM.parse().unwrap()).await.unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    let error = client.start(VM.parse().unwrap()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Unavailable));
    assert_eq!(asked.load(Ordering::Relaxed), 3 + 1 + 5);
}

#[tokio::test]
async fn a_repeated_delete_that_finds_nothing_has_succeeded_and_a_first_one_has_not() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let appliance = Appliance::start(8, move |request| {
        let delete: DeleteVm = message::decode_body(&request.body).unwrap();
        assert_eq!(delete.vm.as_str(), VM);
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            Reply::message(&ErrorBody::host(ErrorCode::Unavailable, "x").retryable())
        } else {
            Reply::error(ErrorCode::VmNotFound, "gone")
        }
    })
    .await;
    let client = connect(&appliance).await;
    client.delete(VM.parse().unwrap()).await.unwrap();
    let error = client.delete(VM.parse().unwrap()).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::VmNotFound));
}

#[tokio::test]
async fn streams_queue_below_the_appliances_maximum() {
    let appliance = Appliance::start(2, |request| match Kind(request.kind) {
        Kind::OPEN_VM => Reply::Agent,
        _ => Reply::message(&info(VM)),
    })
    .await;
    let client = connect(&appliance).await;
    let vm = client.vm(VM.parse().unwrap());
    let first = vm.open().await.unwrap();
    let second = vm.open().await.unwrap();
    let third = tokio::spawn(async move { client.get(VM.parse().unwrap()).await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!third.is_finished());
    drop(first);
    assert_eq!(third.await.unwrap().unwrap(), info(VM));
    drop(second);
    // Many at once: each gets its turn, none is refused.
    let many: Vec<_> = (0..40)
        .map(|_| {
            let vm = vm.clone();
            tokio::spawn(async move { vm.exec(Command::argv(["exit", "0"])).await?.wait().await })
        })
        .collect();
    for one in many {
        assert_eq!(one.await.unwrap().unwrap().exit_code, 0);
    }
}

async fn outcome(script: &str) -> Result<u8, ClientError> {
    let appliance = Appliance::start(8, |_| Reply::Agent).await;
    let client = connect(&appliance).await;
    let vm = client.vm(VM.parse().unwrap());
    let ended = vm.exec(Command::argv([script])).await?.wait().await?;
    Ok(ended.exit_code)
}

#[tokio::test]
async fn an_agents_lies_are_errors_and_nothing_worse() {
    for script in [
        "output-before-start",
        "giant-frame",
        "garbage-end",
        "vanish-inside-a-frame",
    ] {
        let error = outcome(script).await.unwrap_err();
        assert!(matches!(error, ClientError::Broken(_)), "{script}: {error}");
    }
    let error = outcome("vanish").await.unwrap_err();
    assert!(matches!(error, ClientError::AgentGone), "{error:?}");
    let error = outcome("refuse").await.unwrap_err();
    assert_eq!(error.side(), Side::Guest);
    assert_eq!(outcome("newer-kinds").await.unwrap(), 3);
}

#[tokio::test]
async fn input_of_any_size_comes_back_as_output() {
    let appliance = Appliance::start(8, |_| Reply::Agent).await;
    let client = connect(&appliance).await;
    let vm = client.vm(VM.parse().unwrap());
    let mut execution = vm.exec(Command::argv(["cat"]).stdin_pipe()).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32)
        .map(|index| (index % 253) as u8)
        .collect();
    let input = execution.input();
    let copy = sent.clone();
    let writing = tokio::spawn(async move {
        input.write(&copy).await.unwrap();
        input.end().await.unwrap();
    });
    let mut back = Vec::new();
    while let Some(output) = execution.next().await.unwrap() {
        if let Output::Stdout(bytes) = output {
            back.extend_from_slice(&bytes);
        }
    }
    writing.await.unwrap();
    assert!(back == sent);
    assert_eq!(execution.ended().unwrap().exit_code, 0);
}
