//! A defect that is yet to be found ends the one create, the one request or the one run that it
//! strikes. Nothing else is lost, and nothing has to be restarted for it.

use protocol::ErrorCode;
use protocol::vm::{CreateVm, EndReason, OpenVm, Opened, StartVm, StopVm, VmInfo, VmState};

use super::world::*;

fn struck(key: u8, place: &str) -> CreateVm {
    let mut create = create(key);
    create.name = Some("web".parse().unwrap());
    create.labels = vec![("panic".into(), place.into())];
    create
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_while_a_vm_is_made_leaves_nothing_and_its_name_and_key_are_free() {
    let world = World::new().await;
    let other = world.create(&create(9)).await.unwrap();
    for place in ["make", "made", "boot"] {
        let error = world.create(&struck(1, place)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal, "{place}");
        assert_eq!(world.names("vms"), [other.id.as_str()], "{place}");
        assert_eq!(world.names("staging"), [""; 0], "{place}");
        assert_eq!(world.supervisor.runs().len(), 1, "{place}");
    }
    // The same name and key, other arguments.
    let made = world.create(&struck(1, "nowhere")).await.unwrap();
    assert_eq!(made.state, VmState::Running);
    world.delete(&made).await;
    world.delete(&other).await;
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_vms_task_ends_its_run_only_and_the_vm_can_be_started_again() {
    let mut world = World::new().await;
    let other = world.create(&create(9)).await.unwrap();
    let made = world.create(&struck(1, "open")).await.unwrap();
    let open = OpenVm { vm: by_id(&made) };
    let error = world.api().ask::<_, Opened>("mine", &open).await;
    let error = error.unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal);
    assert!(error.message.contains(made.id.as_str()), "{error}");
    let got = world.until(&made, VmState::Stopped).await;
    assert_eq!(got.end_reason, EndReason::MonitorFailed);
    assert_eq!(world.supervisor.runs().len(), 1);
    let start = StartVm { vm: by_id(&made) };
    let started: VmInfo = world.ask(&start).await.unwrap();
    assert_eq!((started.state, started.generation), (VmState::Running, 2));
    let stop = StopVm {
        vm: by_id(&made),
        deadline_ms: None,
    };
    let stopped: VmInfo = world.ask(&stop).await.unwrap();
    assert_eq!(stopped.end_reason, EndReason::Stopped);
    let open = OpenVm { vm: by_id(&other) };
    let (_, descriptor) = world.api().ask::<_, Opened>("mine", &open).await.unwrap();
    echo(&mut stream(descriptor), "unharmed").await;
    // What happened is on disk.
    world.restart().await;
    world.delete(&made).await;
    world.delete(&other).await;
    world.assert_nothing_left().await;
}
