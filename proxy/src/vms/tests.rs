use std::io::Read;
use std::os::unix::net::UnixStream;

use protocol::host::proxy::{ApiReply, Awake, LookedUp};
use protocol::message::encode_body;

use super::*;
use crate::api::desk::Outgoing;

/// A limit that only a hang reaches.
const HANG: std::time::Duration = std::time::Duration::from_secs(20);

fn id(number: u32) -> VmId {
    format!("vm-{number:08}").parse().unwrap()
}

fn label(letter: char) -> Subdomain {
    letter.to_string().repeat(20).parse().unwrap()
}

/// A VM's attachment, and what the monitor would hold.
fn attach(number: u32, letter: char, generation: u64) -> (AttachVm, OwnedFd, UnixStream) {
    let attach = AttachVm {
        vm: id(number),
        generation,
        hostname: "supvm-1234".into(),
        subdomain: label(letter),
        egress: Egress::default(),
        publication: Publication::default(),
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    (attach, ours.into(), theirs)
}

fn vms() -> (Arc<Desk>, Arc<Vms>) {
    let desk = Arc::new(Desk::new());
    (Arc::clone(&desk), Vms::new(desk))
}

fn detach(number: u32, generation: u64) -> DetachVm {
    DetachVm {
        vm: id(number),
        generation,
    }
}

/// The label that control is asked for next, with the ticket.
async fn asked(desk: &Desk, control: u64) -> (u64, protocol::host::proxy::Wake) {
    let next = tokio::time::timeout(HANG, desk.next(control)).await;
    match next.expect("control is not asked").unwrap() {
        Outgoing::Edge(request) => (
            request.ticket,
            protocol::message::decode_body(&request.body).unwrap(),
        ),
        other => panic!("{other:?}"),
    }
}

fn reply<M: protocol::Message>(desk: &Desk, ticket: u64, message: &M) {
    let reply = ApiReply {
        ticket,
        kind: M::KIND.0,
        body: encode_body(message).unwrap(),
    };
    desk.answered(reply, Vec::new());
}

#[tokio::test]
async fn a_vm_is_found_by_its_label_until_it_is_replaced_or_detached() {
    let (_, vms) = vms();
    let (first, ours, mut theirs) = attach(1, 'a', 1);
    vms.attach(first, ours);
    let old = vms.find(&label('a')).unwrap();
    assert_eq!((&old.id, old.generation), (&id(1), 1));
    let (second, ours, _kept) = attach(1, 'a', 2);
    vms.attach(second, ours);
    old.gone().await;
    // Its channel is closed with it: the monitor sees the end.
    assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0);
    // The end of the run before is no news.
    vms.detach(&detach(1, 1));
    let new = vms.find(&label('a')).unwrap();
    assert_eq!(new.generation, 2);
    vms.detach(&detach(1, 2));
    new.gone().await;
    assert!(vms.find(&label('a')).is_none() && vms.get(&id(1)).is_none());
}

#[tokio::test]
async fn changes_reach_whoever_uses_the_vm() {
    let (_, vms) = vms();
    let (wanted, ours, _theirs) = attach(1, 'a', 1);
    vms.attach(wanted, ours);
    let vm = vms.get(&id(1)).unwrap();
    let mut egress = vm.egress();
    let update = UpdateVm {
        vm: id(1),
        egress: Egress {
            offline: true,
            ..Egress::default()
        },
        publication: Publication {
            autostart: false,
            token: None,
        },
    };
    vms.update(update.clone());
    egress.changed().await.unwrap();
    assert!(egress.borrow_and_update().offline);
    assert!(!vm.publication().autostart);
    // Said again it is no change.
    vms.update(update);
    assert!(!egress.has_changed().unwrap());
}

#[tokio::test]
async fn the_list_of_all_vms_comes_in_pages_that_leave_none_out() {
    let (_, vms) = vms();
    let mut kept = Vec::new();
    for number in 0..=PAGE as u32 {
        let (wanted, ours, theirs) = attach(number, 'a', u64::from(number) + 1);
        vms.attach(wanted, ours);
        kept.push(theirs);
    }
    let first = vms.list(None);
    assert_eq!((first.vms.len(), first.more), (PAGE, true));
    let last = first.vms.last().map(|(vm, _)| vm.clone()).unwrap();
    let second = vms.list(Some(&last));
    assert_eq!(second.vms, [(id(PAGE as u32), PAGE as u64 + 1)]);
    assert!(!second.more);
    // The longest fits a packet.
    assert!(protocol::encode(&first).unwrap().len() < protocol::host::MAX_PACKET);
}

#[tokio::test]
async fn a_lost_channel_is_told_to_control_and_again_to_the_next_one() {
    let (_, vms) = vms();
    let (wanted, ours, _theirs) = attach(1, 'a', 3);
    vms.attach(wanted, ours);
    let vm = vms.get(&id(1)).unwrap();
    vms.lost(&vm);
    let lost = FramesLost {
        vm: id(1),
        generation: 3,
    };
    assert_eq!(vms.next_lost().await, lost);
    vms.connected();
    assert_eq!(vms.next_lost().await, lost);
    // Made good: neither the old one's end nor a new control is news.
    let (wanted, ours, _theirs) = attach(1, 'a', 3);
    vms.attach(wanted, ours);
    vms.lost(&vm);
    vms.connected();
    assert!(vms.lock().lost.is_empty());
}

#[tokio::test]
async fn visitors_of_one_address_share_one_question() {
    let (desk, vms) = vms();
    let control = desk.connected();
    let wake = || {
        let vms = Arc::clone(&vms);
        tokio::spawn(async move { vms.wake(&label('a')).await })
    };
    let first = wake();
    let (ticket, question) = asked(&desk, control).await;
    assert_eq!(question.subdomain, label('a'));
    // Whoever asked first leaves: the others' question goes on.
    let others = [wake(), wake()];
    tokio::task::yield_now().await;
    first.abort();
    tokio::task::yield_now().await;
    let (wanted, ours, _theirs) = attach(1, 'a', 7);
    vms.attach(wanted, ours);
    let awake = Awake {
        vm: id(1),
        generation: 7,
    };
    reply(&desk, ticket, &awake);
    for other in others {
        let woken = tokio::time::timeout(HANG, other).await.expect("a hang");
        assert_eq!(woken.unwrap().unwrap(), (id(1), 7));
    }
    // It is here now: control is not asked.
    assert_eq!(vms.wake(&label('a')).await.unwrap(), (id(1), 7));
    assert!(vms.lock().waking.is_empty());
}

#[tokio::test]
async fn a_question_that_nobody_waits_for_is_given_up_and_asked_anew() {
    let (desk, vms) = vms();
    let control = desk.connected();
    let wake = || {
        let vms = Arc::clone(&vms);
        tokio::spawn(async move { vms.wake(&label('a')).await })
    };
    let first = wake();
    let (ticket, _) = asked(&desk, control).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert!(vms.lock().waking.is_empty());
    match desk.next(control).await.unwrap() {
        Outgoing::Abandoned(abandoned) => assert_eq!(abandoned.ticket, ticket),
        other => panic!("{other:?}"),
    }
    let second = wake();
    let (ticket, _) = asked(&desk, control).await;
    let stopped = ErrorBody::caller(ErrorCode::VmStopped, "off");
    reply(&desk, ticket, &stopped);
    assert_eq!(second.await.unwrap().unwrap_err(), stopped);
}

#[tokio::test]
async fn a_label_that_nobody_has_reaches_control_once() {
    let (desk, vms) = vms();
    let control = desk.connected();
    let first = tokio::spawn({
        let vms = Arc::clone(&vms);
        async move { vms.wake(&label('b')).await }
    });
    let (ticket, _) = asked(&desk, control).await;
    let unknown = ErrorBody::caller(ErrorCode::VmNotFound, "none");
    reply(&desk, ticket, &unknown);
    assert_eq!(first.await.unwrap().unwrap_err(), unknown);
    // Answered without control, which says nothing more.
    let label_b = label('b');
    let woken = tokio::time::timeout(HANG, vms.wake(&label_b)).await;
    let error = woken.expect("control was asked").unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    // A VM that is made with it is there at once.
    let (wanted, ours, _theirs) = attach(2, 'b', 1);
    vms.attach(wanted, ours);
    assert_eq!(vms.wake(&label('b')).await.unwrap(), (id(2), 1));
    // And no longer unknown when it stops.
    vms.detach(&detach(2, 1));
    let again = tokio::spawn({
        let vms = Arc::clone(&vms);
        async move { vms.wake(&label('b')).await }
    });
    let (ticket, _) = asked(&desk, control).await;
    let stopped = ErrorBody::caller(ErrorCode::VmStopped, "off");
    reply(&desk, ticket, &stopped);
    assert_eq!(again.await.unwrap().unwrap_err(), stopped);
}

#[tokio::test]
async fn who_may_come_in_is_asked_without_waking_the_vm() {
    let (desk, vms) = vms();
    let control = desk.connected();
    let ask = |letter| {
        let vms = Arc::clone(&vms);
        tokio::spawn(async move { vms.publication(&label(letter)).await })
    };
    let next = async || {
        let Some(Outgoing::Edge(request)) = desk.next(control).await else {
            panic!("not asked");
        };
        assert_eq!(Kind(request.kind), Kind::LOOK_UP);
        request.ticket
    };
    let first = ask('a');
    let guarded = LookedUp {
        publication: Publication {
            autostart: true,
            token: Some([7; 32]),
        },
    };
    reply(&desk, next().await, &guarded);
    assert_eq!(first.await.unwrap().unwrap(), guarded.publication);
    let nobody = ask('b');
    let unknown = ErrorBody::caller(ErrorCode::VmNotFound, "none");
    reply(&desk, next().await, &unknown);
    assert_eq!(nobody.await.unwrap().unwrap_err(), unknown);
    // Neither what nobody has nor what is attached is asked for.
    let again = tokio::time::timeout(HANG, ask('b')).await;
    let error = again.expect("control was asked").unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::VmNotFound);
    let (wanted, ours, _theirs) = attach(1, 'a', 1);
    let attached = wanted.publication.clone();
    vms.attach(wanted, ours);
    let again = tokio::time::timeout(HANG, ask('a')).await;
    let publication = again.expect("control was asked").unwrap().unwrap();
    assert_eq!(publication, attached);
}

#[tokio::test]
async fn a_stream_to_an_agent_is_handed_over() {
    let (desk, vms) = vms();
    let control = desk.connected();
    let dial = tokio::spawn({
        let vms = Arc::clone(&vms);
        async move { vms.dial_agent(&id(1)).await }
    });
    let Some(Outgoing::Edge(request)) = desk.next(control).await else {
        panic!("not asked");
    };
    assert_eq!(Kind(request.kind), Kind::DIAL_AGENT);
    let (stream, mut agent) = UnixStream::pair().unwrap();
    let opened = protocol::vm::Opened {
        id: id(1),
        generation: 1,
    };
    let answer = ApiReply {
        ticket: request.ticket,
        kind: Kind::OPENED.0,
        body: encode_body(&opened).unwrap(),
    };
    desk.answered(answer, vec![stream.into()]);
    drop(dial.await.unwrap().unwrap());
    assert_eq!(agent.read(&mut [0; 1]).unwrap(), 0);
}
