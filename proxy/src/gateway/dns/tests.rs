//! The resolver before name servers of every kind.

mod servers;

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::{CNAME, NS, SOA};
use hickory_proto::rr::{Name, RData, Record};
use protocol::network::{Egress, Rule, RuleAction, RuleProtocol};
use tokio::net::UdpSocket;

use servers::{Fake, addressed, coded, fake, honest, response};

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn vm(upstreams: &Arc<Upstreams>, egress: Egress) -> Arc<Resolver> {
    let policy = Policy::new(vec![], egress, Arc::default());
    Arc::new(Resolver::new(
        "supvm-1a2b",
        Arc::new(policy),
        Arc::clone(upstreams),
    ))
}

fn asking(servers: &[&Fake]) -> (Arc<Upstreams>, Arc<Resolver>) {
    let upstreams = Upstreams::new(servers.iter().map(|server| server.address).collect());
    let resolver = vm(&upstreams, Egress::default());
    (upstreams, resolver)
}

fn query(text: &str) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), RecordType::A));
    message.set_edns(Edns::new());
    message
}

async fn ask_over(resolver: &Resolver, text: &str, over: Transport) -> Message {
    let query = query(text);
    let answer = resolver
        .answer(query.to_vec().unwrap(), over)
        .await
        .unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.id, query.metadata.id);
    assert!(answer.queries[0].name().eq_case(query.queries[0].name()));
    answer
}

/// The answer's code and addresses.
async fn ask(resolver: &Resolver, text: &str) -> (ResponseCode, Vec<String>) {
    let answer = ask_over(resolver, text, Transport::Udp).await;
    let addresses = answer
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(address) => Some(address.to_string()),
            _ => None,
        });
    (answer.metadata.response_code, addresses.collect())
}

fn found(address: &str) -> (ResponseCode, Vec<String>) {
    (ResponseCode::NoError, vec![address.to_owned()])
}

fn failed() -> (ResponseCode, Vec<String>) {
    (ResponseCode::ServFail, vec![])
}

fn decide(resolver: &Resolver, address: &str) -> Verdict {
    resolver
        .policy
        .decide(RuleProtocol::Tcp, address.parse().unwrap(), 443)
}

fn rule(action: RuleAction, to: &str) -> Rule {
    Rule {
        action,
        to: to.parse().unwrap(),
        protocol: RuleProtocol::Any,
        ports: (0, u16::MAX),
    }
}

#[tokio::test]
async fn a_silent_server_is_passed_over_and_not_asked_first_again() {
    let silent = fake(|_, _| vec![]).await;
    let good = honest("1.1.1.1").await;
    let (_upstreams, resolver) = asking(&[&silent, &good]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    assert_eq!((silent.asked().0, good.asked().0), (1, 1));
    assert_eq!(ask(&resolver, "b.example.").await, found("1.1.1.1"));
    assert_eq!((silent.asked().0, good.asked().0), (1, 2));
}

#[tokio::test]
async fn a_server_that_cannot_tell_or_is_not_there_is_passed_over() {
    for code in [
        ResponseCode::ServFail,
        ResponseCode::Refused,
        ResponseCode::NotImp,
    ] {
        let bad = fake(move |query, _| coded(query, code)).await;
        let good = honest("1.1.1.1").await;
        let (_upstreams, resolver) = asking(&[&bad, &good]);
        assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
        assert_eq!(bad.asked(), (1, 0));
    }
    let gone = honest("9.9.9.9").await.address;
    let good = honest("1.1.1.1").await;
    let (upstreams, resolver) = asking(&[]);
    // A port that nobody has any more.
    tokio::task::yield_now().await;
    upstreams.set(vec![gone, good.address]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
}

#[tokio::test]
async fn when_no_server_can_tell_the_guest_is_told_so() {
    let one = fake(|query, _| coded(query, ResponseCode::ServFail)).await;
    let other = fake(|query, _| {
        let mut referral = response(query);
        let data = RData::NS(NS(name("ns.example.")));
        referral.add_authority(Record::from_rdata(name("example."), 60, data));
        vec![referral.to_vec().unwrap()]
    })
    .await;
    let (_upstreams, resolver) = asking(&[&one, &other]);
    assert_eq!(ask(&resolver, "a.example.").await, failed());
    assert_eq!((one.asked(), other.asked()), ((1, 0), (1, 0)));
    assert_eq!(resolver.counters().failed, 1);
}

#[tokio::test]
async fn a_question_that_nobody_could_answer_is_not_asked_again_at_once() {
    let broken = fake(|query, _| coded(query, ResponseCode::ServFail)).await;
    let (upstreams, resolver) = asking(&[&broken]);
    for failures in 1..=3 {
        assert_eq!(ask(&resolver, "a.example.").await, failed());
        assert_eq!(resolver.counters().failed, failures);
        assert_eq!(broken.asked(), (1, 0));
    }
    assert_eq!(ask(&resolver, "b.example.").await, failed());
    assert_eq!(broken.asked(), (2, 0));
    // What these servers could not, others may.
    let other = honest("1.1.1.1").await;
    upstreams.set(vec![other.address]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
}

#[tokio::test]
async fn a_lost_packet_is_sent_again() {
    let first = AtomicUsize::new(0);
    let lossy = fake(move |query, _| match first.fetch_add(1, Ordering::SeqCst) {
        0 => vec![],
        _ => vec![addressed(query, &["1.1.1.1"])],
    })
    .await;
    let (_upstreams, resolver) = asking(&[&lossy]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    assert_eq!(lossy.asked().0, 2);
}

#[tokio::test]
async fn without_servers_nothing_is_answered_and_new_ones_are_asked_at_once() {
    let (upstreams, resolver) = asking(&[]);
    assert_eq!(ask(&resolver, "a.example.").await, failed());
    let (old, new) = (honest("1.1.1.1").await, honest("2.2.2.2").await);
    upstreams.set(vec![old.address]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    upstreams.set(vec![old.address]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    assert_eq!(old.asked().0, 1, "the same servers: nothing is forgotten");
    upstreams.set(vec![new.address]);
    assert_eq!(ask(&resolver, "a.example.").await, found("2.2.2.2"));
}

#[tokio::test]
async fn only_the_answer_to_the_question_is_taken() {
    let liar = fake(|query, _| {
        let lie = |change: &dyn Fn(&mut Message)| {
            let mut message = Message::from_vec(&addressed(query, &["6.6.6.6"])).unwrap();
            change(&mut message);
            message.to_vec().unwrap()
        };
        let asked = query.queries[0].clone();
        let mut other_name = asked.clone();
        other_name.set_name(name("other.example."));
        let mut other_type = asked.clone();
        other_type.set_query_type(RecordType::AAAA);
        vec![
            lie(&|m| m.metadata.id ^= 1),
            lie(&|m| m.metadata.message_type = MessageType::Query),
            lie(&|m| m.metadata.op_code = OpCode::Notify),
            lie(&|m| m.queries = vec![other_name.clone()]),
            lie(&|m| m.queries = vec![other_type.clone()]),
            lie(&|m| m.queries.clear()),
            lie(&|m| m.queries.push(asked.clone())),
            vec![],
            vec![0; 11],
            vec![0xff; 600],
            addressed(query, &["1.1.1.1"]),
        ]
    })
    .await;
    let (_upstreams, resolver) = asking(&[&liar]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    assert_eq!(liar.asked(), (1, 0));
}

#[tokio::test]
async fn an_answer_from_another_port_or_address_is_not_taken() {
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let elsewhere = std::net::UdpSocket::bind("127.0.0.2:0").unwrap();
    let ports = Arc::new(std::sync::Mutex::new(Vec::new()));
    // The fake does not see the asker's port: a raw server that does.
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let seen = Arc::clone(&ports);
    let task = tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = server.recv_from(&mut buffer).await.unwrap();
            seen.lock().unwrap().push(from.port());
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let lie = addressed(&query, &["6.6.6.6"]);
            stranger.send_to(&lie, from).unwrap();
            elsewhere.send_to(&lie, from).unwrap();
            tokio::task::yield_now().await;
            let truth = addressed(&query, &["1.1.1.1"]);
            server.send_to(&truth, from).await.unwrap();
        }
    });
    let upstreams = Upstreams::new(vec![address]);
    let resolver = vm(&upstreams, Egress::default());
    for n in 0..8 {
        assert_eq!(
            ask(&resolver, &format!("n{n}.example.")).await,
            found("1.1.1.1")
        );
    }
    task.abort();
    let mut ports = ports.lock().unwrap().clone();
    ports.sort_unstable();
    ports.dedup();
    assert!(ports.len() > 1, "every question from the same port");
}

#[tokio::test]
async fn a_storm_of_guesses_ends_in_a_question_over_tcp() {
    let stormy = fake(|query, over| match over {
        Transport::Udp => (0..40_u16)
            .map(|n| {
                let mut message = Message::from_vec(&addressed(query, &["6.6.6.6"])).unwrap();
                message.metadata.id ^= n + 1;
                message.to_vec().unwrap()
            })
            .collect(),
        Transport::Tcp => vec![addressed(query, &["1.1.1.1"])],
    })
    .await;
    let (_upstreams, resolver) = asking(&[&stormy]);
    assert_eq!(ask(&resolver, "a.example.").await, found("1.1.1.1"));
    assert_eq!(stormy.asked(), (1, 1));
}

#[tokio::test]
async fn a_server_that_does_not_keep_our_spelling_is_asked_over_tcp() {
    let lower = fake(|query, over| {
        let mut query = query.clone();
        let asked = query.queries[0].name();
        if over == Transport::Udp {
            assert!(
                !asked.eq_case(&asked.to_lowercase()),
                "no spelling of our own"
            );
        }
        let asked = asked.to_lowercase();
        query.queries[0].set_name(asked);
        vec![addressed(&query, &["1.1.1.1"])]
    })
    .await;
    let (_upstreams, resolver) = asking(&[&lower]);
    let long = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz.Example.";
    let answer = ask_over(&resolver, long, Transport::Udp).await;
    assert!(
        answer.answers[0].name.eq_case(&name(long)),
        "the guest's own spelling"
    );
    assert_eq!(lower.asked(), (1, 1));
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_over_tcp_and_cut_for_the_guest() {
    let addresses: Vec<String> = (0..100).map(|n| format!("1.1.1.{n}")).collect();
    let large = fake(move |query, over| match over {
        Transport::Udp => {
            let mut cut = response(query);
            cut.metadata.truncation = true;
            let mut bytes = cut.to_vec().unwrap();
            // Cut in the middle of a record that its header announces.
            bytes[7] = 3;
            bytes.extend_from_slice(&[0xc0, 12, 0, 1]);
            vec![bytes]
        }
        Transport::Tcp => {
            let all: Vec<&str> = addresses.iter().map(String::as_str).collect();
            vec![addressed(query, &all)]
        }
    })
    .await;
    let (_upstreams, resolver) = asking(&[&large]);
    let cut = ask_over(&resolver, "a.example.", Transport::Udp).await;
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = ask_over(&resolver, "a.example.", Transport::Tcp).await;
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 100);
    assert_eq!(large.asked(), (1, 1), "the second answer is a kept one");
}

#[tokio::test]
async fn broken_answers_are_no_answers() {
    for broken in [
        // An owner that points at itself.
        &[0xc0, 29, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 1, 1, 1, 1][..],
        // One that points forwards.
        &[0xc0, 99, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 1, 1, 1, 1],
        // More data than there is.
        &[0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0xff, 0xff, 1],
        // An address of three bytes.
        &[0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 3, 1, 1, 1],
        &[],
    ] {
        let bad = fake(move |query, _| {
            let mut bytes = response(query).to_vec().unwrap();
            bytes[7] = 1;
            bytes.extend_from_slice(broken);
            vec![bytes]
        })
        .await;
        let good = honest("1.1.1.1").await;
        let (_upstreams, resolver) = asking(&[&bad, &good]);
        assert_eq!(
            ask(&resolver, "a.example.").await,
            found("1.1.1.1"),
            "{broken:?}"
        );
        assert_eq!(bad.asked(), (1, 0));
    }
}

#[tokio::test]
async fn an_answer_is_shared_by_vms_that_may_ask_and_never_by_others() {
    let server = honest("1.1.1.1").await;
    let (upstreams, one) = asking(&[&server]);
    let other = vm(&upstreams, Egress::default());
    let closed = vm(
        &upstreams,
        Egress {
            rules: vec![rule(RuleAction::Deny, "a.example")],
            ..Egress::default()
        },
    );
    let offline = vm(
        &upstreams,
        Egress {
            offline: true,
            ..Egress::default()
        },
    );
    for resolver in [&one, &other, &one] {
        assert_eq!(ask(resolver, "A.example.").await, found("1.1.1.1"));
    }
    assert_eq!(server.asked().0, 1);
    let refused = (ResponseCode::Refused, vec![]);
    assert_eq!(ask(&closed, "a.example.").await, refused);
    assert_eq!(ask(&closed, "b.example.").await, found("1.1.1.1"));
    for asked in ["a.example.", "b.example.", "c.example.", "."] {
        assert_eq!(ask(&offline, asked).await, refused, "{asked}");
    }
    assert_eq!(ask(&offline, "supvm-1a2b.").await, found("10.213.0.2"));
    assert_eq!(ask(&offline, "gateway.").await, found("10.213.0.1"));
    assert_eq!(server.asked().0, 2);
    assert_eq!(
        (offline.counters().asked, offline.counters().denied),
        (6, 4)
    );
}

#[tokio::test]
async fn that_a_name_does_not_exist_is_kept_only_as_its_zone_says() {
    let server = fake(|query, _| {
        let mut message = response(query);
        message.metadata.response_code = ResponseCode::NXDomain;
        if query.queries[0].name().to_lowercase() == name("soa.example.") {
            let soa = SOA::new(name("ns."), name("root."), 1, 1, 1, 1, 60);
            message.add_authority(Record::from_rdata(name("example."), 60, RData::SOA(soa)));
        }
        vec![message.to_vec().unwrap()]
    })
    .await;
    let (_upstreams, resolver) = asking(&[&server]);
    let nothing = (ResponseCode::NXDomain, vec![]);
    for (asked, questions) in [
        ("soa.example.", 1),
        ("soa.example.", 1),
        ("no.example.", 2),
        ("no.example.", 3),
    ] {
        assert_eq!(ask(&resolver, asked).await, nothing);
        assert_eq!(server.asked().0, questions, "{asked}");
    }
}

#[tokio::test]
async fn the_name_that_was_asked_for_counts_and_not_what_its_aliases_lead_to() {
    let server = fake(|query, _| {
        let mut message = response(query);
        let asked = query.queries[0].name().clone();
        let mut record = |owner: Name, data| {
            message.add_answer(Record::from_rdata(owner, 60, data));
        };
        record(asked, RData::CNAME(CNAME(name("cdn.example."))));
        record(
            name("cdn.example."),
            RData::CNAME(CNAME(name("host.example."))),
        );
        record(
            name("host.example."),
            RData::A(std::net::Ipv4Addr::new(1, 1, 1, 1).into()),
        );
        // Somebody else's, and a loop.
        record(
            name("other.example."),
            RData::A(std::net::Ipv4Addr::new(2, 2, 2, 2).into()),
        );
        record(
            name("host.example."),
            RData::CNAME(CNAME(name("cdn.example."))),
        );
        vec![message.to_vec().unwrap()]
    })
    .await;
    let upstreams = Upstreams::new(vec![server.address]);
    let allowed = |to: &str| {
        let rules = vec![rule(RuleAction::Allow, to), rule(RuleAction::Deny, "*")];
        vm(
            &upstreams,
            Egress {
                rules,
                ..Egress::default()
            },
        )
    };
    let resolver = allowed("www.example");
    assert_eq!(decide(&resolver, "1.1.1.1"), Verdict::Deny);
    assert_eq!(
        ask(&resolver, "www.example.").await.0,
        ResponseCode::NoError
    );
    assert_eq!(decide(&resolver, "1.1.1.1"), Verdict::Allow);
    assert_eq!(decide(&resolver, "2.2.2.2"), Verdict::Deny);
    // Kept answers count as well, for another VM, and rules for the alias do not.
    let second = allowed("www.example");
    assert_eq!(ask(&second, "www.example.").await.0, ResponseCode::NoError);
    assert_eq!(decide(&second, "1.1.1.1"), Verdict::Allow);
    assert_eq!(server.asked().0, 1);
    let alias = allowed("host.example");
    assert_eq!(ask(&alias, "www.example.").await.0, ResponseCode::Refused);
    assert_eq!(decide(&alias, "1.1.1.1"), Verdict::Deny);
}

#[tokio::test]
async fn a_name_that_was_rebound_to_a_closed_address_does_not_open_it() {
    let server = fake(|query, _| {
        vec![addressed(
            query,
            &["10.0.0.1", "127.0.0.1", "169.254.169.254", "1.1.1.1"],
        )]
    })
    .await;
    let upstreams = Upstreams::new(vec![server.address]);
    let rules = vec![rule(RuleAction::Allow, "rebound.example")];
    let resolver = vm(
        &upstreams,
        Egress {
            rules,
            ..Egress::default()
        },
    );
    assert_eq!(ask(&resolver, "rebound.example.").await.1.len(), 4);
    for address in ["10.0.0.1", "127.0.0.1", "169.254.169.254"] {
        assert_eq!(decide(&resolver, address), Verdict::Deny, "{address}");
    }
    assert_eq!(decide(&resolver, "1.1.1.1"), Verdict::Allow);
}

#[tokio::test]
async fn names_that_rules_cannot_spell_are_refused() {
    let server = honest("1.1.1.1").await;
    let (_upstreams, resolver) = asking(&[&server]);
    for label in [&b"a b"[..], b"a\0", b"\xe4", b"a*", b"a.b", b"a/b", b"4"] {
        let top = if label == b"4" { label } else { b"example" };
        let mut query = query("x.");
        let asked = Name::from_labels([label, top]).unwrap();
        query.queries[0].set_name(asked);
        let bytes = query.to_vec().unwrap();
        let answer = resolver.answer(bytes, Transport::Udp).await.unwrap();
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{label:?}"
        );
    }
    assert_eq!(server.asked().0, 0);
}

#[tokio::test]
async fn the_same_question_at_the_same_time_is_asked_once() {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let upstreams = Upstreams::new(vec![server.local_addr().unwrap()]);
    let resolver = vm(&upstreams, Egress::default());
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let resolver = Arc::clone(&resolver);
        waiting.push(tokio::spawn(
            async move { ask(&resolver, "a.example.").await },
        ));
    }
    // Whoever asked first goes away: the others get their answer all the same.
    tokio::task::yield_now().await;
    waiting.swap_remove(0).abort();
    let mut buffer = [0; 4096];
    let (length, from) = server.recv_from(&mut buffer).await.unwrap();
    while resolver.counters().asked < 20 {
        tokio::task::yield_now().await;
    }
    let query = Message::from_vec(&buffer[..length]).unwrap();
    server
        .send_to(&addressed(&query, &["1.1.1.1"]), from)
        .await
        .unwrap();
    for task in waiting {
        assert_eq!(task.await.unwrap(), found("1.1.1.1"));
    }
    assert!(server.try_recv_from(&mut buffer).is_err(), "asked again");
}

#[tokio::test]
async fn a_vm_that_asks_for_too_much_is_limited_and_another_is_not() {
    let server = fake(|query, _| {
        if query.queries[0].name().to_lowercase() == name("good.example.") {
            vec![addressed(query, &["1.1.1.1"])]
        } else {
            vec![]
        }
    })
    .await;
    let (upstreams, greedy) = asking(&[&server]);
    let modest = vm(&upstreams, Egress::default());
    let mut waiting = tokio::task::JoinSet::new();
    for n in 0..MAX_UNDER_WAY {
        let greedy = Arc::clone(&greedy);
        waiting.spawn(async move { ask(&greedy, &format!("n{n}.example.")).await });
    }
    while greedy.under_way.available_permits() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(ask(&greedy, "good.example.").await, failed());
    assert_eq!(greedy.counters().limited, 1);
    assert_eq!(ask(&modest, "good.example.").await, found("1.1.1.1"));
    assert_eq!(ask(&greedy, "gateway.").await, found("10.213.0.1"));
    // Who goes away is not counted any more.
    waiting.shutdown().await;
    assert_eq!(ask(&greedy, "good.example.").await, found("1.1.1.1"));
}

#[tokio::test]
async fn hostile_queries_get_an_error_or_silence() {
    let (_upstreams, resolver) = asking(&[]);
    let sound = query("a.example.").to_vec().unwrap();
    for length in 0..sound.len() {
        let answer = resolver
            .answer(sound[..length].to_vec(), Transport::Udp)
            .await;
        assert_eq!(answer.is_some(), length >= 12, "{length}");
    }
    let mut response = sound.clone();
    response[2] |= 0x80;
    assert_eq!(resolver.answer(response, Transport::Udp).await, None);
    let giant = resolver
        .answer(vec![0; 1 << 20], Transport::Tcp)
        .await
        .unwrap();
    assert_eq!(giant.len(), 12);
}
