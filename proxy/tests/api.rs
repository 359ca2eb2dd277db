//! The face of proxy's API: real sockets, control played by the test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod common;

use std::time::Duration;

use common::*;
use protocol::frame::header_for;
use protocol::hello::Hello;
use protocol::host::proxy::Serve;
use protocol::vm::MAX_REQUEST;
use protocol::{ErrorBody, ErrorCode, Fault, Kind, Retry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn a_request_carries_the_connections_token_and_gets_its_answer() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let request = control.request().await;
    assert_eq!(request.token, "secret");
    assert_eq!(Kind(request.kind), Kind::GET_VM);
    control.reply(&request, &refusal()).await;
    assert_eq!(stream.error().await, refusal());
}

#[tokio::test]
async fn an_unknown_kind_reaches_control_and_its_refusal_the_client() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream
        .send_bytes(&header_for(Kind(0x0777), 0).unwrap())
        .await;
    let request = control.request().await;
    assert_eq!(request.kind, 0x0777);
    let unsupported = ErrorBody::caller(ErrorCode::Unsupported, "kind");
    control.reply(&request, &unsupported).await;
    assert_eq!(stream.error().await, unsupported);
}

#[tokio::test]
async fn a_kind_of_the_hosts_own_never_reaches_control() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream
        .send_bytes(&header_for(Kind::SERVE, 0).unwrap())
        .await;
    assert_eq!(stream.error().await.code, ErrorCode::Unsupported);
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    assert_eq!(Kind(control.request().await.kind), Kind::GET_VM);
}

#[tokio::test]
async fn a_wrong_token_is_refused_with_controls_words_and_ends_the_connection() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::new(proxy.connect().await);
    let mut first = client.stream().await;
    first.send(&hello()).await;
    let mut second = client.stream().await;
    second.send(&get_vm()).await;
    let request = control.request().await;
    let refused = ErrorBody::caller(ErrorCode::Unauthenticated, "wrong token; see `sup login`");
    control.reply(&request, &refused).await;
    assert_eq!(first.error().await, refused);
    assert_eq!(second.error().await, refused);
    client.ended.await.unwrap();
}

#[tokio::test]
async fn no_stream_is_served_before_hello_was_accepted() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::new(proxy.connect().await);
    let mut first = client.stream().await;
    first.send(&get_vm()).await;
    assert_eq!(first.error().await.code, ErrorCode::HelloRequired);
    client.ended.await.unwrap();

    let client = Client::new(proxy.connect().await);
    let mut first = client.stream().await;
    first.send(&hello()).await;
    let mut second = client.stream().await;
    second.send(&get_vm()).await;
    // The second stream's request waits: control sees the Hello and nothing else until it answers.
    control.welcome().await;
    assert_eq!(Kind(control.request().await.kind), Kind::GET_VM);
}

#[tokio::test]
async fn a_generation_that_is_not_spoken_here_is_refused() {
    let proxy = Proxy::start();
    let client = Client::new(proxy.connect().await);
    let mut stream = client.stream().await;
    let old = Hello {
        generation: 0,
        token: "secret".into(),
    };
    stream.send(&old).await;
    assert_eq!(stream.error().await.code, ErrorCode::GenerationUnsupported);
}

#[tokio::test]
async fn an_oversize_request_is_refused_at_its_header() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    for length in [MAX_REQUEST as u32 + 1, u32::MAX] {
        let mut stream = client.stream().await;
        let mut header = length.to_le_bytes().to_vec();
        header.extend_from_slice(&[0x01, 0x01, 0]);
        stream.send_bytes(&header).await;
        assert_eq!(stream.error().await.code, ErrorCode::FrameTooLarge);
    }
}

#[tokio::test]
async fn the_largest_request_fits_into_controls_packet() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::new(proxy.connect().await);
    let mut first = client.stream().await;
    let long = Hello {
        generation: 1,
        token: "t".repeat(protocol::hello::MAX_TOKEN),
    };
    first.send(&long).await;
    control.welcome().await;
    let mut stream = client.stream().await;
    let header = header_for(Kind::CREATE_VM, MAX_REQUEST).unwrap();
    stream.send_bytes(&header).await;
    stream.send_bytes(&vec![9; MAX_REQUEST]).await;
    assert_eq!(control.request().await.body.len(), MAX_REQUEST);
}

#[tokio::test]
async fn a_stream_too_many_is_refused_and_the_others_go_on() {
    let proxy = Proxy::start();
    let control = proxy.control();
    control.limits(3, 8).await;
    let client = Client::welcomed(&proxy, &control).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(client.opened(&control).await);
    }
    let mut refused = client.stream().await;
    refused.send(&get_vm()).await;
    assert_eq!(refused.error().await.code, ErrorCode::TooManyStreams);
    let (stream, agent) = &mut open[0];
    stream.send_bytes(b"still").await;
    let mut buffer = [0; 5];
    agent.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"still");
    // One that ends makes room at once.
    drop(open.pop());
    let mut next = client.stream().await;
    next.send(&get_vm()).await;
    let request = control.request().await;
    control.reply(&request, &refusal()).await;
    assert_eq!(next.error().await, refusal());
}

#[tokio::test]
async fn bytes_pass_both_ways_and_each_end_by_itself() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let (stream, mut agent) = client.opened(&control).await;
    // More than all buffers together hold, echoed, so back-pressure works in both directions.
    let length = 5 << 20;
    let sent: Vec<u8> = (0..length).map(|index: u32| (index % 251) as u8).collect();
    let (mut agent_read, mut agent_write) = agent.split();
    let (mut read, mut write) = tokio::io::split(stream.inner);
    let mut back = vec![0; sent.len()];
    let ((), copied, ()) = tokio::join!(
        async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        },
        async {
            let copied = tokio::io::copy(&mut agent_read, &mut agent_write)
                .await
                .unwrap();
            // The client's half-close came through; ours has not happened yet.
            agent_write.write_all(b"last").await.unwrap();
            agent_write.shutdown().await.unwrap();
            copied
        },
        async {
            read.read_exact(&mut back).await.unwrap();
            let mut last = Vec::new();
            read.read_to_end(&mut last).await.unwrap();
            assert_eq!(last, b"last");
        },
    );
    assert_eq!(copied, u64::from(length));
    assert!(back == sent);
}

#[tokio::test]
async fn an_agent_that_ends_first_still_gets_the_clients_bytes() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let (mut stream, mut agent) = client.opened(&control).await;
    agent.shutdown().await.unwrap();
    assert!(stream.frame().await.is_none());
    stream.send_bytes(b"late").await;
    stream.inner.shutdown().await.unwrap();
    let mut all = Vec::new();
    agent.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"late");
}

#[tokio::test]
async fn the_last_words_of_an_agent_that_left_reach_a_client_that_still_sends() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let (mut stream, mut agent) = client.opened(&control).await;
    // The agent reads nothing, so what the client sends waits in the relay.
    tokio::select! {
        _ = stream.inner.write_all(&[5; 4 << 20]) => panic!("nobody reads"),
        () = tokio::time::sleep(Duration::from_millis(300)) => {}
    }
    let words = [7; 50_000];
    agent.write_all(&words).await.unwrap();
    drop(agent);
    let mut heard = Vec::new();
    stream.inner.read_to_end(&mut heard).await.unwrap();
    assert!(heard == words);
}

#[tokio::test]
async fn frames_sent_right_behind_an_open_reach_the_agent() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    let mut bytes = protocol::encode(&open_vm()).unwrap();
    bytes.extend_from_slice(b"for the agent");
    stream.send_bytes(&bytes).await;
    let mut agent = control.open(&control.request().await).await;
    let mut buffer = [0; 13];
    agent.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"for the agent");
}

#[tokio::test]
async fn a_client_that_resets_its_stream_frees_the_agent_even_when_it_was_blocked() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let (mut stream, mut agent) = client.opened(&control).await;
    // The agent reads nothing, so the relay's buffer and the socket's fill up.
    let write = stream.inner.write_all(&[5; 4 << 20]);
    tokio::select! {
        _ = write => panic!("nobody reads"),
        () = tokio::time::sleep(Duration::from_millis(300)) => {}
    }
    drop(stream);
    let mut seen = vec![0; 1 << 20];
    while agent.read(&mut seen).await.unwrap() > 0 {}
}

#[tokio::test]
async fn a_relay_outlives_control_and_loses_no_byte() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let (mut stream, mut agent) = client.opened(&control).await;
    agent.write_all(b"one ").await.unwrap();
    drop(control);
    agent.write_all(b"two ").await.unwrap();
    let control = proxy.control();
    agent.write_all(b"three").await.unwrap();
    agent.shutdown().await.unwrap();
    let mut all = Vec::new();
    stream.inner.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"one two three");
    // The new control serves the same connection.
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let request = control.request().await;
    assert_eq!(request.token, "secret");
    control.reply(&request, &refusal()).await;
    assert_eq!(stream.error().await, refusal());
}

#[tokio::test]
async fn a_request_in_flight_when_control_dies_is_answered_by_the_next() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let first = control.request().await;
    drop(control);
    let control = proxy.control();
    let second = control.request().await;
    assert_eq!(first, second);
    control.reply(&second, &refusal()).await;
    assert_eq!(stream.error().await, refusal());
}

#[tokio::test]
async fn a_delete_in_flight_when_control_dies_is_the_clients_to_repeat() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    let vm = "vm-00000000".parse().unwrap();
    stream.send(&protocol::vm::DeleteVm { vm }).await;
    control.request().await;
    drop(control);
    let error = stream.error().await;
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert_eq!(error.fault, Fault::Host);
    assert_eq!(error.retry, Retry::AfterMs);
}

#[tokio::test]
async fn a_request_made_while_there_is_no_control_waits_for_one() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    drop(control);
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let control = proxy.control();
    let request = control.request().await;
    control.reply(&request, &refusal()).await;
    assert_eq!(stream.error().await, refusal());
}

#[tokio::test]
async fn control_learns_that_a_client_left_before_its_answer() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let request = control.request().await;
    drop(stream);
    assert_eq!(control.abandoned().await.ticket, request.ticket);
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    let request = control.request().await;
    client.ended.abort();
    assert_eq!(control.abandoned().await.ticket, request.ticket);
}

#[tokio::test]
async fn a_client_that_vanishes_inside_a_frame_harms_nobody() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let other = Client::welcomed(&proxy, &control).await;
    let client = Client::welcomed(&proxy, &control).await;
    let mut stream = client.stream().await;
    stream.send_bytes(&[200, 0, 0, 0, 0x01]).await;
    stream.inner.shutdown().await.unwrap();
    assert!(stream.frame().await.is_none());
    let mut stream = client.stream().await;
    stream
        .send_bytes(&header_for(Kind::GET_VM, 100).unwrap())
        .await;
    client.ended.abort();
    let mut stream = other.stream().await;
    stream.send(&get_vm()).await;
    assert_eq!(Kind(control.request().await.kind), Kind::GET_VM);
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let other = Client::welcomed(&proxy, &control).await;
    let mut socket = proxy.connect().await;
    socket.write_all(&[0xff; 4096]).await.unwrap();
    let mut rest = Vec::new();
    // Closed by proxy: an end or a reset, but no wait for ever.
    let _ = socket.read_to_end(&mut rest).await;
    let mut stream = other.stream().await;
    stream.send(&get_vm()).await;
    assert_eq!(Kind(control.request().await.kind), Kind::GET_VM);
}

#[tokio::test]
async fn a_client_that_floods_and_never_reads_leaves_others_alone() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let flooder = Client::welcomed(&proxy, &control).await;
    let (mut flood, flooded) = flooder.opened(&control).await;
    let mut deaf = proxy.connect().await;
    // Pings that are never read: proxy's answers fill the socket until it stops reading this one.
    let ping = [0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1];
    let deafening = tokio::spawn(async move { while deaf.write_all(&ping).await.is_ok() {} });
    let flooding = tokio::spawn(async move {
        let _ = flood.inner.write_all(&vec![1; 64 << 20]).await;
    });
    let client = Client::welcomed(&proxy, &control).await;
    for _ in 0..20 {
        let mut stream = client.stream().await;
        stream.send(&get_vm()).await;
        let request = control.request().await;
        control.reply(&request, &refusal()).await;
        assert_eq!(stream.error().await, refusal());
    }
    // The agent never read either: what it was not given stays with its sender.
    assert!(!flooding.is_finished());
    drop(flooded);
    flooding.abort();
    deafening.abort();
}

#[tokio::test]
async fn connections_beyond_the_maximum_are_closed() {
    let proxy = Proxy::start();
    let control = proxy.control();
    control.limits(4, 1).await;
    let first = Client::welcomed(&proxy, &control).await;
    let mut second = proxy.connect().await;
    assert_eq!(second.read(&mut [0; 1]).await.unwrap(), 0);
    first.ended.abort();
    let _ = first.ended.await;
    // The place is free again once proxy has seen the end.
    loop {
        let client = Client::new(proxy.connect().await);
        let mut stream = client.stream().await;
        let sent = stream
            .inner
            .write_all(&protocol::encode(&hello()).unwrap())
            .await;
        if sent.is_ok() {
            control.welcome().await;
            break;
        }
    }
}

#[tokio::test]
async fn strangers_of_one_address_leave_room_for_others() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let (ca, certificates, key) = certificates();
    let serve = Serve {
        api_address: "127.0.0.1:0".into(),
        certificates,
        key,
        max_streams: 8,
        max_connections: 64,
        edge: protocol::host::proxy::ServeEdge::default(),
        gateway: protocol::host::proxy::ServeGateway::default(),
    };
    let address = control.serve(&serve).await.api_address;
    let greet = async |client: &Client| {
        let mut stream = client.stream().await;
        stream.send(&hello()).await;
        control.welcome().await;
        assert_eq!(stream.frame().await.unwrap().kind, Kind::HELLO_OK);
    };
    let known = Client::new(tls(&address, &ca, &[b"supvm/1"]).await.unwrap());
    greet(&known).await;
    // Some that say nothing at all, and one that speaks TLS but no `Hello`.
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(tokio::net::TcpStream::connect(&address).await.unwrap());
    }
    let stranger = Client::new(tls(&address, &ca, &[b"supvm/1"]).await.unwrap());
    assert!(tls(&address, &ca, &[b"supvm/1"]).await.is_err());
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(address.parse().unwrap()).await.unwrap();
    let mut byte = [0; 1];
    let shut = other.read(&mut byte);
    tokio::time::timeout(Duration::from_millis(200), shut)
        .await
        .expect_err("another address is let in");
    // Who is known is a stranger no more.
    greet(&stranger).await;
    let next = Client::new(tls(&address, &ca, &[b"supvm/1"]).await.unwrap());
    greet(&next).await;
}

#[tokio::test]
async fn tls_serves_supvm_1_and_refuses_every_other_name() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let (ca, certificates, key) = certificates();
    let serve = Serve {
        api_address: "127.0.0.1:0".into(),
        certificates,
        key,
        max_streams: 8,
        max_connections: 8,
        edge: protocol::host::proxy::ServeEdge::default(),
        gateway: protocol::host::proxy::ServeGateway::default(),
    };
    let serving = control.serve(&serve).await;
    assert_eq!(serving.message, "");
    let address = serving.api_address;
    let good = tls(&address, &ca, &[b"supvm/1"]).await.unwrap();
    let client = Client::new(good);
    let mut stream = client.stream().await;
    stream.send(&hello()).await;
    control.welcome().await;
    assert_eq!(stream.frame().await.unwrap().kind, Kind::HELLO_OK);

    for names in [&[b"h2" as &[u8]] as &[&[u8]], &[]] {
        let error = tls(&address, &ca, names).await.unwrap_err();
        assert!(
            error.to_string().contains("NoApplicationProtocol"),
            "{error}"
        );
    }
    let mut garbage = tokio::net::TcpStream::connect(&address).await.unwrap();
    garbage.write_all(&[0x42; 1024]).await.unwrap();
    let _ = garbage.read_to_end(&mut Vec::new()).await;

    // Said again, it keeps its port and its connections.
    assert_eq!(control.serve(&serve).await.api_address, address);
    let mut stream = client.stream().await;
    stream.send(&get_vm()).await;
    assert_eq!(Kind(control.request().await.kind), Kind::GET_VM);
}

#[tokio::test]
async fn a_serve_that_cannot_be_done_says_why() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let (_, certificates, key) = certificates();
    let mut serve = Serve {
        api_address: "192.0.2.1:1".into(),
        certificates,
        key,
        max_streams: 8,
        max_connections: 8,
        edge: protocol::host::proxy::ServeEdge::default(),
        gateway: protocol::host::proxy::ServeGateway::default(),
    };
    let serving = control.serve(&serve).await;
    assert_eq!(serving.api_address, "");
    assert!(serving.message.contains("192.0.2.1:1"), "{serving:?}");
    serve.key = vec![1, 2, 3];
    assert!(control.serve(&serve).await.message.contains("key"));
    serve.certificates.clear();
    assert!(control.serve(&serve).await.message.contains("certificate"));
}
