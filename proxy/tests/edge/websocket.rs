//! WebSockets through the edge, by both versions of HTTP. The guest is an echo of bytes: what is in
//! the frames is no matter of the edge.

use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Body, Got, Name, World, empty, full, read_head, soon};

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

fn accept(key: &[u8]) -> String {
    let mut text = key.to_vec();
    text.extend_from_slice(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &text);
    data_encoding::BASE64.encode(digest.as_ref())
}

/// Agrees to every WebSocket and echoes bytes.
async fn echo(mut request: Request<hyper::body::Incoming>) -> Response<Body> {
    let fields = request.headers();
    if request.uri().path() == "/refused" {
        let mut response = Response::new(full("not you"));
        *response.status_mut() = StatusCode::FORBIDDEN;
        return response;
    }
    assert_eq!(request.method(), Method::GET);
    assert_eq!(fields["upgrade"], "websocket");
    assert_eq!(fields["connection"], "Upgrade");
    assert_eq!(fields["sec-websocket-version"], "13");
    assert_eq!(fields["x-forwarded-proto"], "https");
    let mut accept = accept(fields["sec-websocket-key"].as_bytes());
    if request.uri().path() == "/wrong" {
        accept = "wrong".into();
    }
    tokio::spawn(async move {
        let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
        let _ = writer.shutdown().await;
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-accept", accept)
        .header("sec-websocket-protocol", "chat")
        .body(empty())
        .unwrap()
}

fn head(vm: &Name) -> String {
    format!(
        "GET /socket HTTP/1.1\r\nHost: {}\r\nConnection: keep-alive, Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
        vm.host()
    )
}

#[tokio::test]
async fn a_websocket_by_http1_carries_bytes_both_ways_also_those_sent_early() {
    let world = World::start().await;
    let vm = world.vm_with(echo).await;
    let mut stream = world.tls(&vm.host(), "http/1.1").await;
    let sent = format!("{}early", head(&vm));
    stream.write_all(sent.as_bytes()).await.unwrap();
    let answer = read_head(&mut stream).await.unwrap().to_lowercase();
    assert!(answer.starts_with("http/1.1 101 "), "{answer}");
    for field in [
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-protocol: chat",
    ] {
        assert!(answer.contains(field), "{answer}");
    }
    assert!(
        answer.contains(&accept(KEY.as_bytes()).to_lowercase()),
        "{answer}"
    );
    let mut echoed = [0; 5];
    soon("the echo", stream.read_exact(&mut echoed))
        .await
        .unwrap();
    assert_eq!(&echoed, b"early");
    let long = vec![7; 300_000];
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent = long.clone();
    tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut echoed = Vec::new();
    soon("the echo", reader.read_to_end(&mut echoed))
        .await
        .unwrap();
    assert!(echoed == long, "{}", echoed.len());
}

async fn connect(
    world: &World,
    vm: &Name,
    path: &str,
    protocol: &'static str,
) -> Response<hyper::body::Incoming> {
    let stream = TokioIo::new(world.tls(&vm.host(), "h2").await);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(executor)
        .handshake::<_, Body>(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    // With an answer the server's settings are there: they say whether it takes extended CONNECT.
    let first = Request::get(format!("https://{}/refused", vm.host())).body(empty());
    let first = soon("an answer", sender.send_request(first.unwrap()));
    let _ = first.await.unwrap().into_body().collect().await.unwrap();
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("https://{}{path}", vm.host()))
        .extension(Protocol::from_static(protocol))
        .header("sec-websocket-version", "13")
        .body(empty())
        .unwrap();
    soon("an answer", sender.send_request(request))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_websocket_by_http2_is_an_upgrade_to_the_guest() {
    let world = World::start().await;
    let vm = world.vm_with(echo).await;
    let mut response = connect(&world, &vm, "/socket", "websocket").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat");
    for gone in ["sec-websocket-accept", "upgrade", "connection"] {
        assert!(!response.headers().contains_key(gone), "{gone}");
    }
    let upgraded = hyper::upgrade::on(&mut response).await.unwrap();
    let mut stream = TokioIo::new(upgraded);
    for text in ["one", "two"] {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut echoed = [0; 3];
        soon("the echo", stream.read_exact(&mut echoed))
            .await
            .unwrap();
        assert_eq!(echoed, text.as_bytes());
    }
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon("the end", stream.read_to_end(&mut rest))
        .await
        .unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_guest_that_refuses_or_fools_a_websocket_is_passed_on_as_it_is() {
    let world = World::start().await;
    let vm = world.vm_with(echo).await;
    let response = connect(&world, &vm, "/refused", "websocket").await;
    let got = Got::of(response).await;
    assert_eq!((got.status.as_u16(), got.body.as_str()), (403, "not you"));
    let response = connect(&world, &vm, "/wrong", "websocket").await;
    assert_eq!(response.status().as_u16(), 502);
    let response = connect(&world, &vm, "/", "connect-udp").await;
    assert_eq!(response.status().as_u16(), 501);
    let refused = head(&vm).replace("/socket", "/refused");
    let mut stream = world.tls(&vm.host(), "http/1.1").await;
    stream.write_all(refused.as_bytes()).await.unwrap();
    let answer = read_head(&mut stream).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let plain = world.vm_that_tells().await;
    let response = connect(&world, &plain, "/", "websocket").await;
    assert_eq!(response.status().as_u16(), 502, "200 is no agreement");
    let _ = response.into_body().collect().await;
}

#[tokio::test]
async fn an_idle_websocket_outlives_every_limit_of_idle_connections() {
    let world = World::with(|limits| {
        let short = Duration::from_millis(100);
        (limits.head, limits.idle, limits.upstream_idle) = (short, short, short);
        limits.half_closed = short;
    })
    .await;
    let vm = world.vm_with(echo).await;
    let mut stream = world.tls(&vm.host(), "http/1.1").await;
    stream.write_all(head(&vm).as_bytes()).await.unwrap();
    let answer = read_head(&mut stream).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let mut response = connect(&world, &vm, "/socket", "websocket").await;
    let mut other = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    tokio::time::sleep(Duration::from_millis(400)).await;
    for _ in 0..2 {
        let mut echoed = [0; 5];
        stream.write_all(b"still").await.unwrap();
        soon("the echo", stream.read_exact(&mut echoed))
            .await
            .unwrap();
        other.write_all(b"there").await.unwrap();
        soon("the echo", other.read_exact(&mut echoed))
            .await
            .unwrap();
        assert_eq!(&echoed, b"there");
    }
}

#[tokio::test]
async fn a_websocket_counts_among_its_vms_requests_until_it_ends() {
    let world = World::with(|limits| limits.requests_per_vm = 1).await;
    let vm = world.vm_with(echo).await;
    let mut stream = world.tls(&vm.host(), "http/1.1").await;
    stream.write_all(head(&vm).as_bytes()).await.unwrap();
    assert!(
        read_head(&mut stream)
            .await
            .unwrap()
            .starts_with("HTTP/1.1 101 ")
    );
    assert_eq!(world.get(&vm.host(), &[]).await.status.as_u16(), 503);
    drop(stream);
    soon("the place", async {
        loop {
            let mut stream = world.tls(&vm.host(), "http/1.1").await;
            stream.write_all(head(&vm).as_bytes()).await.unwrap();
            if read_head(&mut stream)
                .await
                .unwrap()
                .starts_with("HTTP/1.1 101 ")
            {
                break;
            }
        }
    })
    .await;
}
