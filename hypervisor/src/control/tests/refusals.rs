//! Bad input: a named error for the caller, everything else unharmed.

use protocol::agent::Configured;
use protocol::hello::{Hello, HelloOk};
use protocol::vm::{
    DeleteVm, Deleted, GetVm, ListVms, OpenVm, Opened, StartVm, StopVm, VmInfo, VmPage, VmRef,
};
use protocol::{ErrorBody, ErrorCode, Fault, Kind};

use super::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hello_names_the_limits_and_refuses_strangers() {
    let world = World::with("limits = { max_cpus = 3 }").await;
    let hello = Hello {
        generation: 7,
        token: "mine".into(),
    };
    let ok: HelloOk = world.ask(&hello).await.unwrap();
    assert_eq!(
        (ok.generation, ok.limits.max_cpus, ok.limits.max_streams),
        (1, 3, 256)
    );
    let old = Hello {
        generation: 0,
        ..hello.clone()
    };
    let error = world.ask::<_, HelloOk>(&old).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::GenerationUnsupported);
    for token in ["", "min", "mine ", &"x".repeat(300)] {
        let error = world
            .api()
            .ask::<_, HelloOk>(token, &hello)
            .await
            .unwrap_err();
        assert_eq!(
            (error.code, error.fault),
            (ErrorCode::Unauthenticated, Fault::Caller)
        );
        let error = world
            .api()
            .ask::<_, VmInfo>(token, &create(1))
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Unauthenticated);
    }
    world.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_things_are_named_and_harm_nothing() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    for vm in ["vm-00000000", "nobody"] {
        let vm: VmRef = vm.parse().unwrap();
        let mut errors: Vec<ErrorBody> = Vec::new();
        errors.push(
            world
                .ask::<_, VmInfo>(&GetVm { vm: vm.clone() })
                .await
                .unwrap_err(),
        );
        errors.push(
            world
                .ask::<_, VmInfo>(&StartVm { vm: vm.clone() })
                .await
                .unwrap_err(),
        );
        errors.push(
            world
                .ask::<_, Opened>(&OpenVm { vm: vm.clone() })
                .await
                .unwrap_err(),
        );
        errors.push(
            world
                .ask::<_, Deleted>(&DeleteVm { vm: vm.clone() })
                .await
                .unwrap_err(),
        );
        let stop = StopVm {
            vm: vm.clone(),
            deadline_ms: None,
        };
        errors.push(world.ask::<_, VmInfo>(&stop).await.unwrap_err());
        for error in errors {
            assert_eq!(
                (error.code, error.fault),
                (ErrorCode::VmNotFound, Fault::Caller)
            );
            assert!(error.message.contains(vm.as_str()), "{}", error.message);
        }
    }
    let mut bad = create(2);
    bad.template = Some("plan9".parse().unwrap());
    let error = world.create(&bad).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::TemplateNotFound);
    assert!(error.message.contains("plan9"));
    let mut bad = create(2);
    bad.disk_mib = Some(1);
    assert_eq!(
        world.create(&bad).await.unwrap_err().code,
        ErrorCode::InvalidArgument
    );

    for kind in [
        0x0199,
        Kind::CONFIGURE.0,
        Kind::START_PROCESS.0,
        0x8303,
        0xffff,
    ] {
        let error = world
            .api()
            .raw::<VmInfo>("mine", kind, vec![])
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported, "{kind:#x}");
    }
    for kind in [
        Kind::CREATE_VM,
        Kind::GET_VM,
        Kind::LIST_VMS,
        Kind::OPEN_VM,
        Kind::HELLO,
    ] {
        for body in [vec![], vec![0xff; 40], vec![0xff; 50_000]] {
            let error = world
                .api()
                .raw::<Configured>("mine", kind.0, body)
                .await
                .unwrap_err();
            assert_eq!(error.code, ErrorCode::Malformed, "{kind}");
        }
    }
    assert_eq!(world.list().await[0].id, made.id);
    assert_eq!(world.names("vms").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_owners_vms_do_not_exist_and_names_are_each_owner_s_own() {
    let world = World::new().await;
    let mut named = create(1);
    named.name = Some("web".parse().unwrap());
    let mine = world.create(&named).await.unwrap();
    let api = world.api();
    let by_name = GetVm {
        vm: "web".parse().unwrap(),
    };
    for question in [GetVm { vm: by_id(&mine) }, by_name.clone()] {
        let error = api.ask::<_, VmInfo>("yours", &question).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::VmNotFound);
    }
    let delete = DeleteVm { vm: by_id(&mine) };
    let error = api.ask::<_, Deleted>("yours", &delete).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    let (theirs, _) = api.ask::<_, VmInfo>("yours", &named).await.unwrap();
    let (found, _) = api.ask::<_, VmInfo>("yours", &by_name).await.unwrap();
    assert_eq!(found.id, theirs.id);
    assert_eq!(world.ask::<_, VmInfo>(&by_name).await.unwrap().id, mine.id);
    assert_eq!(world.list().await.len(), 1);
    // Taken among one's own; free again after a delete.
    named.key = protocol::id::IdempotencyKey([2; 16]);
    let error = world.create(&named).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NameTaken);
    assert!(error.message.contains("web") && error.message.contains(mine.id.as_str()));
    world.delete(&mine).await;
    world.create(&named).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_list_comes_in_pages_that_fit_a_packet() {
    let world = World::with("limits = { total_memory_mib = 1000000 }").await;
    for key in 0..5 {
        let mut big = create(key);
        big.labels = (0..60).map(|n| (format!("{n}"), "x".repeat(250))).collect();
        world.create(&big).await.unwrap();
    }
    let mut after = None;
    let mut seen = Vec::new();
    let mut pages = 0;
    loop {
        let page: VmPage = world.ask(&ListVms { after, limit: 0 }).await.unwrap();
        seen.extend(page.vms.iter().map(|vm| vm.id.clone()));
        after = page.vms.last().map(|vm| vm.id.clone());
        pages += 1;
        if !page.more {
            break;
        }
    }
    assert_eq!(seen.len(), 5);
    assert!(seen.is_sorted());
    assert!(pages > 1);
    let page: VmPage = world
        .ask(&ListVms {
            after: Some(seen[1].clone()),
            limit: 1,
        })
        .await
        .unwrap();
    assert_eq!(page.vms[0].id, seen[2]);
    assert!(page.more);
}
