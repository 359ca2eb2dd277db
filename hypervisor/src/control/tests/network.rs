//! A VM's network as control sees it: who holds which end of its frame channel, what is kept of its
//! settings, and what the edge asks.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use protocol::host::proxy::{Awake, DialAgent, FramesLost, LookUp, LookedUp, Wake};
use protocol::host::vmm::Ending;
use protocol::id::Subdomain;
use protocol::network::{
    CreateLink, Egress, GetNetwork, LinkCreated, NetworkInfo, Publication, Rule, RuleAction,
    RuleProtocol, SetNetwork,
};
use protocol::vm::{GetVm, OpenVm, Opened, StartVm, StopVm, VmInfo, VmState};
use protocol::{ErrorBody, ErrorCode, Retry};

use super::world::*;

/// Whether what proxy writes comes out at the VM's monitor.
fn is_connected(world: &World, vm: &VmInfo) -> bool {
    let copy = |end: &OwnedFd| {
        let end = UnixStream::from(end.as_fd().try_clone_to_owned().unwrap());
        end.set_nonblocking(true).unwrap();
        end
    };
    let mut proxy = copy(&world.has.state().vms.get(&vm.id).expect("not attached").1);
    let Some(mut monitor) = world.supervisor.state().frames.get(&vm.id).map(copy) else {
        return false;
    };
    let mut got = [0; 5];
    let passed = proxy
        .write_all(b"frame")
        .and_then(|()| monitor.read_exact(&mut got));
    passed.is_ok() && got == *b"frame"
}

/// Proxy has it; the monitor may still be reading what it was sent before.
async fn assert_connected(world: &World, vm: &VmInfo) {
    eventually(|| is_connected(world, vm)).await;
}

fn is_attached(world: &World, vm: &VmInfo) -> bool {
    world.has.state().vms.contains_key(&vm.id)
}

fn stop(vm: &VmInfo) -> StopVm {
    StopVm {
        vm: by_id(vm),
        deadline_ms: None,
    }
}

fn rules(to: &str) -> Egress {
    let rule = Rule {
        action: RuleAction::Allow,
        to: to.parse().unwrap(),
        protocol: RuleProtocol::Tcp,
        ports: (80, 443),
    };
    Egress {
        rules: vec![rule],
        ..Egress::default()
    }
}

fn closed() -> Publication {
    Publication {
        autostart: false,
        token: Some([7; 32]),
    }
}

async fn network(world: &World, vm: &VmInfo) -> NetworkInfo {
    world.ask(&GetNetwork { vm: by_id(vm) }).await.unwrap()
}

fn wake(vm: &VmInfo) -> Wake {
    Wake {
        subdomain: vm.subdomain.clone(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_runs_is_connected_to_proxy_and_one_that_is_off_is_not() {
    let world = World::new().await;
    let mut wanted = create(1);
    wanted.egress = rules("10.0.0.0/8");
    wanted.publication = closed();
    let made = world.create(&wanted).await.unwrap();
    assert_connected(&world, &made).await;
    {
        let state = world.has.state();
        let (attached, _) = &state.vms[&made.id];
        assert_eq!(attached.generation, 1);
        assert_eq!(attached.hostname, made.id.hostname());
        assert_eq!(attached.subdomain, made.subdomain);
        assert_eq!(attached.egress, wanted.egress);
        assert_eq!(attached.publication, wanted.publication);
    }
    assert_eq!(
        world.supervisor.state().configured[0].dns,
        ["10.213.0.1", "fd73:7570::1"]
    );
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    eventually(|| !is_attached(&world, &made)).await;
    let _: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!(world.has.state().vms[&made.id].0.generation, 2);
    assert_connected(&world, &made).await;
    // A guest that resets is the next run as well.
    let run = world.supervisor.runs().remove(0);
    let reset = Ending::Reset.to_wire();
    world.supervisor.end(&run, Some(reset), None).await;
    world.until_generation(&made, 3).await;
    assert_eq!(world.has.state().vms[&made.id].0.generation, 3);
    assert_connected(&world, &made).await;
    world.delete(&made).await;
    eventually(|| !is_attached(&world, &made)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_that_is_killed_cuts_no_connection_of_a_guest() {
    let mut world = World::new().await;
    let made = [
        world.create(&create(1)).await.unwrap(),
        world.create(&create(2)).await.unwrap(),
        world.create(&create(3)).await.unwrap(),
    ];
    let [first, second, ended] = &made;
    world.kill().await;
    assert_connected(&world, first).await;
    let run = |run: &protocol::host::supervisor::Run| run.vm == ended.id;
    let gone = world.supervisor.runs().into_iter().find(run).unwrap();
    let off = Ending::PoweredOff.to_wire();
    world.supervisor.end(&gone, Some(off), None).await;
    world.start().await;
    // Both are found again, the third is taken away.
    eventually(|| world.has.state().updates == 2 && !is_attached(&world, ended)).await;
    assert_eq!(world.has.state().attaches, 3);
    for vm in [first, second] {
        assert_connected(&world, vm).await;
    }
    // And they are connected anew when they start anew.
    let _: VmInfo = world.ask(&stop(first)).await.unwrap();
    let _: VmInfo = world.ask(&StartVm { vm: by_id(first) }).await.unwrap();
    assert_eq!(world.has.state().attaches, 4);
    assert_connected(&world, first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_proxy_gets_new_channels_for_all_vms_that_run() {
    let mut world = World::new().await;
    let first = world.create(&create(1)).await.unwrap();
    let second = world.create(&create(2)).await.unwrap();
    let off = world.create(&create(3)).await.unwrap();
    let _: VmInfo = world.ask(&stop(&off)).await.unwrap();
    world.restart_proxy().await;
    eventually(|| world.has.state().vms.len() == 2).await;
    assert_connected(&world, &first).await;
    assert_connected(&world, &second).await;
    assert!(!is_attached(&world, &off));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_proxy_lost_is_made_again_and_one_of_an_earlier_run_is_not() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let mut lost = FramesLost {
        vm: made.id.clone(),
        generation: 7,
    };
    world.api().say(&lost).await;
    network(&world, &made).await;
    assert_eq!(world.has.state().attaches, 1);
    lost.generation = 1;
    world.api().say(&lost).await;
    eventually(|| world.has.state().attaches == 2).await;
    assert_connected(&world, &made).await;
    // Again, after a pause.
    world.api().say(&lost).await;
    eventually(|| world.has.state().attaches == 3).await;
    assert_connected(&world, &made).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_network_is_known_to_proxy_and_durable_when_it_is_answered() {
    let mut world = World::new().await;
    world.has.state().requests = Some(9);
    let made = world.create(&create(1)).await.unwrap();
    let before = network(&world, &made).await;
    assert_eq!(before.egress, Egress::default());
    assert_eq!(before.publication, Publication::default());
    assert_eq!(before.counters.requests, 9);
    let set = SetNetwork {
        vm: by_id(&made),
        egress: Some(rules("192.0.2.0/24")),
        publication: None,
    };
    let after: NetworkInfo = world.ask(&set).await.unwrap();
    assert_eq!(after.egress, rules("192.0.2.0/24"));
    assert_eq!(after.publication, before.publication);
    {
        let state = world.has.state();
        assert_eq!(state.vms[&made.id].0.egress, after.egress);
        assert_eq!(state.attaches, 1);
    }
    // The other half alone, while it is off.
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    let set = SetNetwork {
        vm: by_id(&made),
        egress: None,
        publication: Some(closed()),
    };
    let after: NetworkInfo = world.ask(&set).await.unwrap();
    assert_eq!((after.publication, after.counters.requests), (closed(), 0));
    world.restart().await;
    let kept = network(&world, &made).await;
    assert_eq!(kept.egress, rules("192.0.2.0/24"));
    assert_eq!(kept.publication, closed());
    let _: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    let attached = world.has.state().vms[&made.id].0.clone();
    assert_eq!(
        (attached.egress, attached.publication),
        (kept.egress, kept.publication)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_is_its_owners_and_bad_rules_change_nothing() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let get = GetNetwork { vm: by_id(&made) };
    let mut set = SetNetwork {
        vm: by_id(&made),
        egress: Some(Egress::default()),
        publication: None,
    };
    let refused = |result: Result<(NetworkInfo, _), ErrorBody>| result.unwrap_err().code;
    let api = world.api();
    assert_eq!(refused(api.ask("yours", &get).await), ErrorCode::VmNotFound);
    assert_eq!(refused(api.ask("yours", &set).await), ErrorCode::VmNotFound);
    let mut bad = rules("*");
    bad.rules[0].ports = (443, 80);
    set.egress = Some(bad);
    assert_eq!(
        refused(api.ask("mine", &set).await),
        ErrorCode::InvalidArgument
    );
    set.egress = Some(Egress {
        max_connections: 16_385,
        ..Egress::default()
    });
    assert_eq!(
        refused(api.ask("mine", &set).await),
        ErrorCode::InvalidArgument
    );
    assert_eq!(network(&world, &made).await.egress, Egress::default());
    let mut bad = create(2);
    bad.egress.rules = vec![rules("*").rules.remove(0); 257];
    let error = world.create(&bad).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_is_known_to_proxy_when_it_is_told_and_only_proxy_knows_its_secret() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let ask = CreateLink { vm: by_id(&made) };
    let link = async |token| world.api().ask::<_, LinkCreated>(token, &ask).await;
    let error = link("mine").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument, "it has no token");
    let set = SetNetwork {
        vm: by_id(&made),
        egress: None,
        publication: Some(closed()),
    };
    let _: NetworkInfo = world.ask(&set).await.unwrap();
    let error = link("yours").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    // One that is stopped is as good.
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    let (first, second) = (link("mine").await.unwrap().0, link("mine").await.unwrap().0);
    let state = world.has.state();
    assert_eq!(state.links.len(), 2);
    for (link, admitted) in [first, second].iter().zip(&state.links) {
        let (address, secret) = link.url.split_once("/?supvm_link=").unwrap();
        assert_eq!(address, made.url);
        let hash = *blake3::hash(secret.as_bytes()).as_bytes();
        assert_eq!(admitted.secret, hash);
        assert_eq!(admitted.subdomain, made.subdomain);
        assert_eq!(Some(admitted.token), closed().token);
        assert_eq!(admitted.lifetime_s, link.lifetime_s);
    }
    assert_ne!(state.links[0].secret, state.links[1].secret);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_does_not_count_is_not_waited_for_without_end() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    assert_eq!(network(&world, &made).await.counters.requests, 0);
    world.has.state().requests = Some(3);
    assert_eq!(network(&world, &made).await.counters.requests, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_autostart_only_a_start_starts_a_vm() {
    let world = World::new().await;
    let mut wanted = create(1);
    wanted.publication.autostart = false;
    let made = world.create(&wanted).await.unwrap();
    let open = OpenVm { vm: by_id(&made) };
    let _: (Opened, _) = world.api().ask("mine", &open).await.unwrap();
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    let error = world
        .api()
        .ask::<_, Opened>("mine", &open)
        .await
        .unwrap_err();
    assert_eq!((error.code, error.retry), (ErrorCode::VmStopped, Retry::No));
    assert!(error.message.contains("sup start vm-"), "{error}");
    let error = world
        .api()
        .ask_edge::<_, Awake>(&wake(&made))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::VmStopped);
    assert_eq!(world.list().await[0].state, VmState::Stopped);
    let _: VmInfo = world.ask(&StartVm { vm: by_id(&made) }).await.unwrap();
    let _: (Opened, _) = world.api().ask("mine", &open).await.unwrap();
    // It is up: then nothing has to be started.
    let (awake, _) = world
        .api()
        .ask_edge::<_, Awake>(&wake(&made))
        .await
        .unwrap();
    assert_eq!(awake.generation, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_edge_learns_who_may_come_in_without_starting_anything() {
    let world = World::new().await;
    let mut wanted = create(1);
    wanted.publication.token = Some([7; 32]);
    let made = world.create(&wanted).await.unwrap();
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    let look_up = |subdomain: &Subdomain| LookUp {
        subdomain: subdomain.clone(),
    };
    let (looked_up, _) = world
        .api()
        .ask_edge::<_, LookedUp>(&look_up(&made.subdomain))
        .await
        .unwrap();
    assert_eq!(looked_up.publication, wanted.publication);
    let now = &world.list().await[0];
    assert_eq!((now.state, now.generation), (VmState::Stopped, 1));
    let stranger = "aaaaaaaaaaaaaaaaaaaa".parse().unwrap();
    let error = world
        .api()
        .ask_edge::<_, LookedUp>(&look_up(&stranger))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_at_a_public_address_starts_its_vm_which_is_connected_before_the_answer() {
    let mut world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    world.restart().await;
    let (awake, _) = world
        .api()
        .ask_edge::<_, Awake>(&wake(&made))
        .await
        .unwrap();
    assert_eq!((&awake.vm, awake.generation), (&made.id, 2));
    assert_connected(&world, &made).await;
    let stranger = Wake {
        subdomain: "aaaaaaaaaaaaaaaaaaaa".parse().unwrap(),
    };
    let error = world
        .api()
        .ask_edge::<_, Awake>(&stranger)
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    world.delete(&made).await;
    let error = world
        .api()
        .ask_edge::<_, Awake>(&wake(&made))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_edge_reaches_the_agent_of_a_vm_that_runs_and_starts_none_for_it() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let dial = DialAgent {
        vm: made.id.clone(),
    };
    let (opened, descriptor) = world.api().ask_edge::<_, Opened>(&dial).await.unwrap();
    assert_eq!((opened.id, opened.generation), (made.id.clone(), 1));
    echo(&mut stream(descriptor), "from the edge").await;
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    let error = world.api().ask_edge::<_, Opened>(&dial).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmStopped);
    assert_eq!(world.list().await[0].generation, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_at_the_edge_leaves_clients_their_room() {
    let world = World::new().await;
    let made = world.create(&create(1)).await.unwrap();
    let _: VmInfo = world.ask(&stop(&made)).await.unwrap();
    world.supervisor.guests_are(Guest::NeverRings);
    let mut waiting = vec![world.api().begin_edge(&wake(&made)).await];
    world.until(&made, VmState::Starting).await;
    while waiting.len() < 256 {
        waiting.push(world.api().begin_edge(&wake(&made)).await);
        // The VM takes them in one by one.
        network(&world, &made).await;
    }
    let error = world.api().ask_edge::<_, Awake>(&wake(&made)).await;
    let error = error.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.starts_with("256 requests"), "{error}");
    let info: VmInfo = world.ask(&GetVm { vm: by_id(&made) }).await.unwrap();
    assert_eq!(info.state, VmState::Starting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_settings_say_of_the_network_reaches_proxy() {
    let more = "public_port = 8443\n\
                edge = { listen = \"127.0.0.1:1443\", http = \"\" }\n\
                gateway = { name_servers = [\"192.0.2.1:53\"], max_connections = 7, \
                rules = [{ action = \"deny\", to = \"*.example.org\" }] }\n";
    let world = World::with(more).await;
    let serve = world.api().serve.borrow().clone();
    assert_eq!(serve.edge.https_address, "127.0.0.1:1443");
    assert_eq!(serve.edge.http_address, "");
    assert_eq!(serve.edge.domain, "supvm.localhost");
    assert_eq!(serve.edge.public_port, 8443);
    assert_eq!(serve.gateway.name_servers, ["192.0.2.1:53"]);
    assert_eq!(serve.gateway.max_connections, 7);
    assert_eq!(serve.gateway.rules[0].to.to_string(), "*.example.org");
}
