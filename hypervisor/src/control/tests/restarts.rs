//! Control dies, proxy dies, the host dies: what was acknowledged is there afterwards.

use std::time::Duration;

use protocol::ErrorCode;
use protocol::host::vmm::Ending;
use protocol::vm::{EndReason, OpenVm, Opened, StartVm, StopVm, VmInfo, VmState};

use tokio::time::timeout;

use super::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_lives_on_while_control_is_restarted_and_the_vm_is_found_again() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let open = OpenVm { vm: by_id(&made) };
    let (_, descriptor) = world.api().ask::<_, Opened>("mine", &open).await.unwrap();
    let mut old = stream(descriptor);
    echo(&mut old, "before").await;
    world.kill().await;
    echo(&mut old, "while it is away").await;
    world.start().await;
    echo(&mut old, "after").await;
    let (opened, descriptor) = world.api().ask::<_, Opened>("mine", &open).await.unwrap();
    assert_eq!(opened.generation, 1);
    echo(&mut stream(descriptor), "a new one").await;
    assert_eq!(world.supervisor.state().configured.len(), 1);
    assert_eq!(world.list().await[0].state, VmState::Running);
    // It can still be stopped and deleted, and its create is still known.
    assert_eq!(world.create(&create(1)).await.unwrap().id, made.id);
    world.delete(&made).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_that_lost_its_connection_to_control_is_connected_to_again() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let open = OpenVm { vm: by_id(&made) };
    let (_, descriptor) = world.api().ask::<_, Opened>("mine", &open).await.unwrap();
    let mut old = stream(descriptor);
    world.supervisor.drop_control();
    // Whoever asks before it is found again is told so or waits.
    let opened = async {
        loop {
            if let Ok(opened) = world.api().ask::<_, Opened>("mine", &open).await {
                return opened;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (opened, descriptor) = timeout(Duration::from_secs(30), opened).await.unwrap();
    assert_eq!(opened.generation, 1);
    echo(&mut stream(descriptor), "a new one").await;
    echo(&mut old, "the old one").await;
    assert_eq!(world.list().await[0].state, VmState::Running);
    assert_eq!(world.supervisor.state().spawned.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_monitor_that_died_while_control_was_away_is_reported_with_its_reason() {
    let mut world = World::new().await;
    let panicked = world.create(&create(1)).await.unwrap();
    let killed = world.create(&create(2)).await.unwrap();
    let reset = world.create(&create(3)).await.unwrap();
    world.kill().await;
    for run in world.supervisor.runs() {
        match &run.vm {
            vm if *vm == panicked.id => {
                let code = Ending::GuestPanic.to_wire();
                world.supervisor.end(&run, Some(code), None).await;
            }
            vm if *vm == killed.id => world.supervisor.end(&run, None, Some(9)).await,
            _ => {
                let code = Ending::Reset.to_wire();
                world.supervisor.end(&run, Some(code), None).await;
            }
        }
    }
    world.start().await;
    let got = world.until(&panicked, VmState::Stopped).await;
    assert_eq!(got.end_reason, EndReason::GuestPanic);
    let got = world.until(&killed, VmState::Stopped).await;
    assert_eq!(got.end_reason, EndReason::MonitorFailed);
    assert!(got.end_message.contains("signal 9"), "{}", got.end_message);
    world.until_generation(&reset, 2).await;
    // The supervisor need not keep what is written down.
    eventually(|| world.supervisor.state().ended.is_empty()).await;
    world.restart().await;
    let got = world.until(&panicked, VmState::Stopped).await;
    assert_eq!(got.end_reason, EndReason::GuestPanic);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_that_was_cut_off_leaves_nothing_and_can_be_repeated() {
    let mut world = World::new().await;
    world.supervisor.guests_are(Guest::NeverRings);
    let _cut = world.begin_create(1).await;
    eventually(|| !world.supervisor.runs().is_empty()).await;
    world.kill().await;
    assert_eq!(world.names("vms").len(), 1);
    world.supervisor.guests_are(Guest::Good);
    world.start().await;
    eventually(|| world.names("vms").is_empty() && world.supervisor.runs().is_empty()).await;
    // It is a VM no more before its files are gone.
    eventually(|| world.names("staging").is_empty()).await;
    eventually(|| world.supervisor.state().ended.is_empty()).await;
    world.assert_nothing_left().await;
    let made = world.create(&create(1)).await.unwrap();
    assert_eq!(made.state, VmState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_was_cut_off_is_finished_by_the_next_control() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: None,
    };
    let _: VmInfo = world.ask(&stop).await.unwrap();
    world.supervisor.guests_are(Guest::NeverRings);
    let body = protocol::message::encode_body(&StartVm { vm: by_id(&made) }).unwrap();
    let _cut = world
        .api()
        .begin("mine", protocol::Kind::START_VM.0, body)
        .await;
    eventually(|| !world.supervisor.runs().is_empty()).await;
    world.restart().await;
    let got = world.until(&made, VmState::Starting).await;
    assert_eq!(got.generation, 2);
    // Its run goes on: nobody started a second one.
    assert_eq!(world.supervisor.state().spawned.len(), 2);
    world.delete(&made).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_power_cut_vms_are_stopped_and_start_on_request() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let deleted = world.create(&create(2)).await.unwrap();
    world.delete(&deleted).await;
    world.kill().await;
    world.supervisor.power_cut();
    world.start().await;
    let vms = world.list().await;
    assert_eq!(vms.len(), 1);
    assert_eq!(
        (vms[0].state, vms[0].end_reason),
        (VmState::Stopped, EndReason::HostRestarted)
    );
    let started: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!((started.state, started.generation), (VmState::Running, 2));
    // The deleted one's create is remembered across the restart.
    let error = world.create(&create(2)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_no_vm_has_is_ended() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    world.kill().await;
    std::fs::remove_dir_all(world.path(&format!("vms/{}", made.id))).unwrap();
    world.start().await;
    eventually(|| world.supervisor.runs().is_empty() && world.supervisor.state().ended.is_empty())
        .await;
    assert!(world.list().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_proxy_is_served_and_the_authority_stays_the_same() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let before = world.api().serve.borrow().clone();
    assert_eq!(before.api_address, "[::]:7443");
    world.proxy = None;
    world.accept().await;
    assert_eq!(world.list().await[0].id, made.id);
    world.restart().await;
    let after = world.api().serve.borrow().clone();
    assert_eq!(after.certificates[1], before.certificates[1]);
    assert_ne!(after.certificates[0], before.certificates[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_that_goes_ends_control() {
    let mut world = World::new().await;
    world.supervisor.hang_up();
    let error = world.ended().await.unwrap_err();
    assert!(error.to_string().contains("supervisor has gone"), "{error}");
}

/// One thread, so that control's threads are started in the test's network namespace.
#[tokio::test]
async fn an_address_that_comes_later_is_named_by_the_next_certificate() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "run this test as root: it makes a network namespace"
    );
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let world = World::new().await;
    let mut serve = world.api().serve.clone();
    // The address in a certificate: its tag, its length, itself.
    let names = |serve: &protocol::host::proxy::Serve| {
        let leaf = serve.certificates.first().unwrap();
        leaf.windows(6).any(|bytes| bytes == [0x87, 4, 10, 9, 8, 7])
    };
    assert!(!names(&serve.borrow()));
    for arguments in [
        "link add later type veth peer name other",
        "addr add 10.9.8.7/24 dev later",
    ] {
        let mut ip = std::process::Command::new("ip");
        let done = ip.args(arguments.split_ascii_whitespace()).status();
        assert!(done.unwrap().success(), "ip {arguments}");
    }
    timeout(HANG, serve.wait_for(names))
        .await
        .expect("no new certificate")
        .unwrap();
}
