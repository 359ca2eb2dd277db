//! What a VM's owner does with it, and how runs end.

use protocol::host::vmm::Ending;
use protocol::vm::{
    Console, EndReason, GetVm, MAX_CONSOLE, OpenVm, Opened, ReadConsole, StartVm, StopVm, VmInfo,
    VmRef, VmState,
};
use protocol::{ErrorCode, Fault, Retry};

use super::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_vms_console_is_its_owners_to_read() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let vm = VmRef::Id(made.id.clone());
    let read = ReadConsole { vm };
    let console: Console = world.ask(&read).await.unwrap();
    assert_eq!(console.bytes, b"Linux version 6.12\n");
    let error = world
        .api()
        .ask::<_, Console>("yours", &read)
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    // One longer than an answer is cut at its beginning.
    let path = world.path("vms").join(made.id.as_str()).join("console.log");
    std::fs::write(&path, [vec![b'x'; MAX_CONSOLE], b"end".to_vec()].concat()).unwrap();
    let console: Console = world.ask(&read).await.unwrap();
    assert_eq!(console.bytes.len(), MAX_CONSOLE);
    assert!(console.bytes.ends_with(b"xend"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_created_stopped_started_and_deleted() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    assert_eq!(made.state, VmState::Running);
    assert_eq!(
        (made.generation, made.cpus, made.memory_mib, made.disk_mib),
        (1, 1, 256, 4)
    );
    assert_eq!(made.template_version.as_str(), "13");
    assert_eq!(
        made.url,
        format!("https://{}.supvm.localhost", made.subdomain)
    );
    {
        let state = world.supervisor.state();
        assert_eq!(state.configured[0].vm, made.id.as_str());
        assert_eq!(state.configured[0].hostname, made.id.hostname());
        assert_eq!(
            state.configured[0].env,
            [("COLOUR".to_owned(), "blue".to_owned())]
        );
        assert_eq!(state.spawned[0].memory_max, (256 + 320) << 20);
        let expected = if nix::unistd::geteuid().is_root() {
            200_000
        } else {
            0
        };
        assert_eq!(state.spawned[0].uid, expected);
    }
    let disk = world.path(&format!("vms/{}/disk.img", made.id));
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 4 << 20);

    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: None,
    };
    for _ in 0..2 {
        let stopped: VmInfo = world.ask(&stop).await.unwrap();
        assert_eq!(
            (stopped.state, stopped.end_reason),
            (VmState::Stopped, EndReason::Stopped)
        );
    }
    assert!(world.supervisor.runs().is_empty());
    // What the guest wrote is kept.
    assert_eq!(
        &std::fs::read(&disk).unwrap()[..16],
        b"root\0\0\0\0guest\0\0\0"
    );

    for _ in 0..2 {
        let started: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
        assert_eq!((started.state, started.generation), (VmState::Running, 2));
        assert_eq!(started.end_reason, EndReason::None);
    }
    let got: VmInfo = world.ask(&GetVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!(got.generation, 2);
    assert_eq!(world.list().await, [got]);
    world.delete(&made).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_a_stopped_vm_starts_it_and_gives_a_stream_to_its_agent() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: None,
    };
    let _: VmInfo = world.ask(&stop).await.unwrap();
    let (opened, descriptor) = world
        .api()
        .ask::<_, Opened>("mine", &OpenVm { vm: by_id(&made) })
        .await
        .unwrap();
    assert_eq!((opened.id, opened.generation), (made.id, 2));
    let mut stream = stream(descriptor);
    echo(&mut stream, "hello").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_vm_that_hangs_at_boot_holds_up_no_other() {
    let world = World::with("boot = { deadline_s = 3600 }").await;
    world.supervisor.guests_are(Guest::NeverRings);
    let (_, hanging) = world.begin_create(1).await;
    eventually(|| !world.supervisor.runs().is_empty()).await;
    world.supervisor.guests_are(Guest::Good);
    let other = world.create(&create(2)).await.unwrap();
    let _: VmInfo = world
        .ask(&StopVm {
            vm: by_id(&other),
            deadline_ms: None,
        })
        .await
        .unwrap();
    // Deleting the hanging one ends its boot at once.
    let listed = world.list().await;
    let vm = listed.iter().find(|vm| vm.id != other.id).unwrap();
    assert_eq!(vm.state, VmState::Starting);
    world.delete(vm).await;
    assert_eq!(
        read::<VmInfo>(hanging).await.unwrap_err().code,
        ErrorCode::VmStopped
    );
    world.delete(&other).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_boot_that_misses_its_deadline_leaves_nothing_and_shows_the_console() {
    let world = World::with("boot = { deadline_s = 1 }").await;
    world.supervisor.guests_are(Guest::NeverRings);
    let error = world.create(&create(1)).await.unwrap_err();
    assert_eq!(
        (error.code, error.fault),
        (ErrorCode::BootTimeout, Fault::Guest)
    );
    assert_eq!(error.detail, "Linux version 6.12\n");
    world.assert_nothing_left().await;
    // The same create may be tried again, and makes the VM.
    world.supervisor.guests_are(Guest::Good);
    world.create(&create(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_dies_or_lies_at_boot_is_reported_and_leaves_nothing() {
    let world = World::new().await;
    for (guest, word) in [
        (Guest::Dies(Ending::GuestPanic), "panicked"),
        (Guest::Dies(Ending::TripleFault), "triple fault"),
        (Guest::Dies(Ending::Failed), "monitor"),
        (Guest::Garbage, "no frame"),
    ] {
        world.supervisor.guests_are(guest);
        let error = world.create(&create(1)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::BootFailed, "{guest:?}");
        assert!(error.message.contains(word), "{}", error.message);
        assert!(error.detail.contains("Linux version"), "{guest:?}");
        world.assert_nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_keeps_the_vm_and_says_why() {
    let world = World::with("boot = { deadline_s = 1 }").await;
    let made = world.create(&create(1)).await.unwrap();
    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: None,
    };
    let _: VmInfo = world.ask(&stop).await.unwrap();
    world.supervisor.guests_are(Guest::NeverRings);
    let error = world
        .ask::<_, VmInfo>(&StartVm { vm: by_id(&made) })
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::BootTimeout);
    let got: VmInfo = world.ask(&GetVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!(
        (got.state, got.end_reason),
        (VmState::Stopped, EndReason::BootTimeout)
    );
    assert!(world.supervisor.runs().is_empty());
    world.supervisor.guests_are(Guest::Good);
    let started: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!(started.state, VmState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_power_off_is_switched_off_at_the_deadline() {
    let world = World::new().await;
    world.supervisor.guests_are(Guest::StaysOn);
    let made = world.create(&create(1)).await.unwrap();
    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: Some(200),
    };
    let stopped: VmInfo = world.ask(&stop).await.unwrap();
    assert_eq!(
        (stopped.state, stopped.end_reason),
        (VmState::Stopped, EndReason::Killed)
    );
    // A delete does not wait for the deadline of a stop.
    let _: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    let slow = StopVm {
        vm: by_id(&made),
        deadline_ms: Some(3_600_000),
    };
    let body = protocol::message::encode_body(&slow).unwrap();
    let (_, _stopping) = world
        .api()
        .begin("mine", protocol::Kind::STOP_VM.0, body)
        .await;
    world.delete(&made).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_ending_has_its_reason_and_a_reset_starts_the_vm_again() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let mut generation = 1;
    for (ending, reason) in [
        (Ending::PoweredOff, EndReason::PoweredOff),
        (Ending::GuestPanic, EndReason::GuestPanic),
        (Ending::TripleFault, EndReason::TripleFault),
        (Ending::DeviceFault, EndReason::DeviceFault),
        (Ending::Failed, EndReason::MonitorFailed),
    ] {
        let run = world.supervisor.runs().remove(0);
        world
            .supervisor
            .end(&run, Some(ending.to_wire()), None)
            .await;
        let got = world.until(&made, VmState::Stopped).await;
        assert_eq!(got.end_reason, reason);
        assert!(!got.end_message.is_empty());
        let started: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
        generation += 1;
        assert_eq!(started.generation, generation);
    }
    // Resets: again and again, until it is a storm.
    for _ in 0..4 {
        let run = world.supervisor.runs().remove(0);
        world
            .supervisor
            .end(&run, Some(Ending::Reset.to_wire()), None)
            .await;
        generation += 1;
        world.until_generation(&made, generation).await;
    }
    let run = world.supervisor.runs().remove(0);
    world
        .supervisor
        .end(&run, Some(Ending::Reset.to_wire()), None)
        .await;
    let got = world.until(&made, VmState::Stopped).await;
    assert_eq!(got.end_reason, EndReason::Rebooted);
    assert!(got.end_message.contains("5 times"), "{}", got.end_message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_whose_client_left_is_finished() {
    let world = World::new().await;
    let (ticket, _) = world.begin_create(1).await;
    world.api().abandon(ticket).await;
    let made = world.create(&create(1)).await.unwrap();
    assert_eq!(made.state, VmState::Running);
    assert_eq!(world.list().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_creates_with_one_key_make_one_vm() {
    let world = World::new().await;
    let request = create(1);
    let (first, second) = tokio::join!(world.create(&request), world.create(&request));
    let first = first.unwrap();
    assert_eq!(first.id, second.unwrap().id);
    assert_eq!(world.list().await.len(), 1);
    let mut other = create(1);
    other.cpus = Some(2);
    let error = world.create(&other).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::IdempotencyConflict);
    // Another owner's key is another key.
    let (theirs, _) = world
        .api()
        .ask::<_, VmInfo>("yours", &request)
        .await
        .unwrap();
    assert_ne!(theirs.id, first.id);
    world.delete(&first).await;
    let error = world.create(&request).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    assert!(error.message.contains("was deleted"), "{}", error.message);
    assert!(world.list().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_refused_with_numbers_and_given_back() {
    let world = World::with("limits = { total_memory_mib = 600 }").await;
    let first = world.create(&create(1)).await.unwrap();
    let second = world.create(&create(2)).await.unwrap();
    let error = world.create(&create(3)).await.unwrap_err();
    assert_eq!(
        (error.code, error.retry),
        (ErrorCode::NoCapacity, Retry::AfterMs)
    );
    for number in ["256", "88", "600"] {
        assert!(error.message.contains(number), "{}", error.message);
    }
    assert_eq!(world.names("vms").len(), 2);
    world.delete(&first).await;
    world.create(&create(3)).await.unwrap();
    let _ = second;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_goes_down_stops_all_vms_and_control_ends() {
    let mut world = World::new().await;
    for key in 1..4 {
        world.create(&create(key)).await.unwrap();
    }
    world.supervisor.shut_down().await;
    world.ended().await.unwrap();
    assert!(world.supervisor.runs().is_empty());
    world.start().await;
    let vms = world.list().await;
    assert_eq!(vms.len(), 3);
    for vm in vms {
        assert_eq!(
            (vm.state, vm.end_reason),
            (VmState::Stopped, EndReason::HostRestarted)
        );
    }
}
