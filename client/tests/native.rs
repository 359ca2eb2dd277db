//! The library against the whole appliance but for the machine: the real control, proxy and agent.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/native.rs"]
mod native;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use client::protocol::network::{Egress, Publication, RuleAction};
use client::protocol::process::{ProcessEnd, ProcessEnded};
use client::protocol::vm::{EndReason, VmInfo, VmRef, VmState};
use client::protocol::{ErrorCode, Fault};
use client::{
    Client, ClientError, Command, Execution, Output, ReadFrom, Side, Vm, new_vm, parse_rule,
};
use native::{Appliance, soon};

fn by_id(vm: &VmInfo) -> VmRef {
    VmRef::Id(vm.id.clone())
}

async fn made(client: &Client) -> (VmInfo, Vm) {
    let info = client.create(new_vm().unwrap()).await.unwrap();
    let vm = client.vm(by_id(&info));
    (info, vm)
}

/// Ends a VM's agent from outside: a first process is immune to what is inside.
fn cut_power(appliance: &Appliance, vm: &VmInfo) {
    let agent = appliance.root_of(vm.id.as_str()).join(".guest-init");
    let pid = nix::unistd::Pid::from_raw(running(&agent).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Asks until something holds; gives the answer of which it does.
async fn until(client: &Client, vm: &VmInfo, holds: impl Fn(&VmInfo) -> bool) -> VmInfo {
    loop {
        let now = client.get(by_id(vm)).await.unwrap();
        if holds(&now) {
            return now;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn shell(vm: &Vm, line: &str) -> (String, ProcessEnded) {
    heard(vm.exec(Command::shell(line)).await.unwrap()).await
}

/// What a command says until it has ended.
async fn heard(mut run: Execution) -> (String, ProcessEnded) {
    let mut text = Vec::new();
    while let Some(output) = run.next().await.unwrap() {
        if let Output::Stdout(bytes) | Output::Stderr(bytes) = output {
            text.extend_from_slice(&bytes);
        }
    }
    let ended = run.ended().unwrap().clone();
    (String::from_utf8(text).unwrap(), ended)
}

#[tokio::test]
async fn a_vm_keeps_its_files_and_its_logs_over_a_stop_and_loses_its_processes() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let (info, vm) = made(&client).await;
        assert_eq!(info.state, VmState::Running);
        let (text, ended) = shell(&vm, "hostname; pwd; echo kept > file").await;
        assert_eq!(
            (text, ended.exit_code),
            (format!("{}\n/workspace\n", info.id.hostname()), 0)
        );
        let left = vm
            .start(Command::shell("echo said; sleep 1000"))
            .await
            .unwrap();
        let mut reader = left.follow(ReadFrom::Oldest).await.unwrap();
        let record = reader.next().await.unwrap().unwrap();
        assert_eq!(record.output, Output::Stdout(b"said\n".to_vec()));

        let stopped = client.stop(by_id(&info), None).await.unwrap();
        assert_eq!(
            (stopped.state, stopped.end_reason),
            (VmState::Stopped, EndReason::Stopped)
        );
        let started = client.start(by_id(&info)).await.unwrap();
        assert_eq!(
            (started.state, started.generation),
            (VmState::Running, info.generation + 1)
        );

        assert_eq!(shell(&vm, "cat file").await.0, "kept\n");
        assert_eq!(left.tail(5).await.unwrap(), ["said"]);
        let lost = (ProcessEnd::Lost, "VM was restarted".to_owned());
        let ended = left.info().await.unwrap().ended.unwrap();
        assert_eq!((ended.end, ended.message), lost);

        // The same after a power cut.
        let cut = vm
            .start(Command::shell("echo said; sleep 1000"))
            .await
            .unwrap();
        cut.follow(ReadFrom::Oldest)
            .await
            .unwrap()
            .next()
            .await
            .unwrap();
        // A log is begun on disk a moment after its process.
        let logs = appliance
            .root_of(info.id.as_str())
            .join("var/lib/supvm/processes");
        let is_kept = || {
            std::fs::read_dir(&logs).unwrap().any(|log| {
                let name = log.unwrap().file_name();
                name.to_string_lossy().contains(&cut.id().to_string())
            })
        };
        while !is_kept() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        cut_power(&appliance, &info);
        until(&client, &info, |now| now.state != VmState::Running).await;
        let ended = cut.info().await.unwrap().ended.unwrap();
        assert_eq!((ended.end, ended.message), lost);

        client.delete(by_id(&info)).await.unwrap();
        let error = vm.exec(Command::shell("true")).await.unwrap_err();
        assert_eq!(
            (error.code(), error.side()),
            (Some(ErrorCode::VmNotFound), Side::Caller)
        );
        assert!(!appliance.root_of(info.id.as_str()).exists());
    })
    .await;
}

#[tokio::test]
async fn a_command_starts_a_vm_that_is_stopped() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let (info, vm) = made(&client).await;
        client.stop(by_id(&info), None).await.unwrap();
        assert_eq!(shell(&vm, "echo up").await.0, "up\n");
        client.delete(by_id(&info)).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_guest_that_loses_its_agent_has_panicked_and_one_that_reboots_comes_back() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let (info, vm) = made(&client).await;
        let error = vm
            .exec(Command::shell("reboot -f; sleep 1000"))
            .await
            .unwrap()
            .wait()
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::AgentGone), "{error}");
        let again =
            |now: &VmInfo| now.state == VmState::Running && now.generation == info.generation + 1;
        until(&client, &info, again).await;
        assert_eq!(shell(&vm, "echo up").await.0, "up\n");
        let mut run = vm.exec(Command::shell("sleep 1000")).await.unwrap();
        run.next().await.unwrap();
        cut_power(&appliance, &info);
        let error = run.wait().await.unwrap_err();
        assert!(matches!(error, ClientError::AgentGone), "{error}");
        let ended = until(&client, &info, |now| now.state != VmState::Running).await;
        assert_eq!(ended.end_reason, EndReason::GuestPanic);
        client.delete(by_id(&info)).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_network_of_a_vm_is_kept_over_the_end_of_control_and_of_proxy() {
    let appliance = Appliance::start();
    soon(async {
        let client = appliance.client().await;
        let mut wanted = new_vm().unwrap();
        let allow = parse_rule(RuleAction::Allow, "10.0.0.0/8:443/tcp").unwrap();
        wanted.egress.rules.push(allow);
        wanted.publication.token = Some(client::url_token_hash("secret"));
        let info = client.create(wanted.clone()).await.unwrap();
        let vm = client.vm(by_id(&info));
        let network = vm.network().await.unwrap();
        assert_eq!(network.egress, wanted.egress);
        assert_eq!(network.publication, wanted.publication);
        let egress = Egress {
            offline: true,
            ..wanted.egress
        };
        vm.set_network(Some(egress.clone()), None).await.unwrap();
        let attached = || appliance.log().matches("VM attached").count();
        assert_eq!(attached(), 1);
        appliance.crash("supvm-control");
        let network = vm.network().await.unwrap();
        assert_eq!(
            (network.egress, network.publication),
            (egress.clone(), wanted.publication.clone())
        );
        // When this is answered, what proxy has is as it is to be: it kept its frame channel.
        vm.set_network(Some(egress.clone()), None).await.unwrap();
        assert_eq!(attached(), 1);
        appliance.crash("supvm-proxy");
        let network = loop {
            // What was under way is lost with proxy; what is asked after that is answered.
            if let Ok(network) = vm.network().await {
                break network;
            }
        };
        assert_eq!(network.egress, egress);
        vm.set_network(Some(egress.clone()), None).await.unwrap();
        assert_eq!(attached(), 2);
        assert_eq!(shell(&vm, "echo still up").await.0, "still up\n");
        let mut bad = egress;
        bad.rules[0].ports = (2, 1);
        let error = vm.set_network(Some(bad), None).await.unwrap_err();
        assert_eq!(
            (error.code(), error.side()),
            (Some(ErrorCode::InvalidArgument), Side::Caller)
        );
    })
    .await;
}

#[tokio::test]
async fn without_autostart_a_command_does_not_start_a_vm_that_is_stopped() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let (info, vm) = made(&client).await;
        let publication = Publication {
            autostart: false,
            token: None,
        };
        vm.set_network(None, Some(publication)).await.unwrap();
        client.stop(by_id(&info), None).await.unwrap();
        let error = vm.exec(Command::shell("true")).await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::VmStopped));
        assert!(error.to_string().contains("sup start"), "{error}");
        client.start(by_id(&info)).await.unwrap();
        assert_eq!(shell(&vm, "echo up").await.0, "up\n");
        client.delete(by_id(&info)).await.unwrap();
    })
    .await;
}

/// The process that runs this very file, whatever its own root calls it.
fn running(program: &Path) -> Option<i32> {
    let of = |path: &Path| {
        std::fs::metadata(path)
            .ok()
            .map(|file| (file.dev(), file.ino()))
    };
    let wanted = of(program)?;
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .find(|pid| of(Path::new(&format!("/proc/{pid}/exe"))) == Some(wanted))
}

#[tokio::test]
async fn the_same_over_tls_and_only_with_the_token() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.tls_client().await;
        let (info, vm) = made(&client).await;
        assert_eq!(shell(&vm, "echo over TLS").await.0, "over TLS\n");
        client.delete(by_id(&info)).await.unwrap();
        let trust = client::Trust::from_pem_file(&appliance.ca().await).unwrap();
        let endpoint = appliance.tls().parse().unwrap();
        let refused = Client::connect(endpoint, "wrong".into(), trust)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Some(ErrorCode::Unauthenticated));
        assert_eq!(refused.body().unwrap().fault, Fault::Caller);
    })
    .await;
}

#[tokio::test]
async fn the_last_words_of_a_command_reach_a_client_that_is_still_writing() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let (_, vm) = made(&client).await;
        // When the agent is through and when the input arrives is another order every time.
        for round in 0..100 {
            let command = Command::argv(["echo", "said"]).stdin_pipe();
            let run = vm.exec(command).await.unwrap();
            let input = run.input();
            let writing =
                tokio::spawn(async move { while input.write(&[b'x'; 4096]).await.is_ok() {} });
            let (text, _) = heard(run).await;
            assert_eq!(text, "said\n", "round {round}");
            writing.abort();
        }
    })
    .await;
}

#[tokio::test]
async fn two_vms_see_nothing_of_each_other() {
    let appliance = Appliance::shared();
    soon(async {
        let client = appliance.client().await;
        let ((one, first), (two, second)) = (made(&client).await, made(&client).await);
        shell(&first, "touch mine /tmp/mine").await;
        let (text, _) = shell(&second, "ls /workspace /tmp; ps ax | grep -c guest-ini[t]").await;
        assert_eq!(text, "/tmp:\n\n/workspace:\n1\n");
        for info in [one, two] {
            client.delete(by_id(&info)).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn an_appliance_that_is_gone_leaves_nothing_running() {
    let appliance = Appliance::start();
    let state = appliance.state();
    let agent = soon(async {
        let client = appliance.client().await;
        let (info, _vm) = made(&client).await;
        appliance.root_of(info.id.as_str()).join(".guest-init")
    })
    .await;
    let first = running(&agent).unwrap();
    drop(appliance);
    assert!(!state.exists());
    soon(async {
        while Path::new(&format!("/proc/{first}")).exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}
