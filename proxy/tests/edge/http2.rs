//! What is particular to HTTP/2: heads that do not end, on connections that do something else as well,
//! and connections to a guest that wait for the next request.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use crate::support::{Body, PATIENCE, World, channel, full, raw_server, soon};

/// What a connection begins with: the preface and empty settings.
const BEGIN: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The end of a block, a part of one, and more of it.
const END_HEADERS: u8 = 4;

/// A frame of a request without a body (RFC 9113, 4.1): HEADERS with END_STREAM, or CONTINUATION.
fn head(kind: u8, flags: u8, stream: u8, block: &[u8]) -> Vec<u8> {
    let length = u8::try_from(block.len()).unwrap();
    let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, stream];
    frame.extend(block);
    frame
}

/// A GET of `/` as HPACK has it (RFC 7541): three fields of its table, and the authority.
fn block(host: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x87, 0x84, 0x41, u8::try_from(host.len()).unwrap()];
    block.extend(host.as_bytes());
    block
}

/// A world whose visitors must send a head soon and may be idle for ever.
async fn strict() -> World {
    World::with(|limits| {
        limits.head = Duration::from_millis(300);
        limits.idle = 100 * PATIENCE;
    })
    .await
}

#[tokio::test]
async fn a_head_that_does_not_end_ends_the_connection() {
    let world = strict().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let block = block(&host);
    // Nothing more, or a little all the time; within a frame, or between frames.
    let begun = [
        (head(1, 1, 1, &block[..3]), Vec::new()),
        (head(1, 1, 1, &block)[..12].to_vec(), Vec::new()),
        (head(1, 1, 1, &block[..3]), head(9, 0, 1, b"")),
    ];
    for (begin, more) in begun {
        let mut stream = world.tls(&host, "h2").await;
        stream.write_all(&[BEGIN, &begin].concat()).await.unwrap();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let dripping = tokio::spawn(async move {
            while writer.write_all(&more).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let mut all = Vec::new();
        // With or without a farewell of TLS.
        let _ = soon("the end", reader.read_to_end(&mut all)).await;
        dripping.abort();
    }
}

#[tokio::test]
async fn a_head_that_does_not_end_is_not_excused_by_a_request_that_is_being_answered() {
    let world = strict().await;
    let vm = world
        .vm_with(|_| std::future::pending::<Response<Body>>())
        .await;
    let host = vm.host();
    let block = block(&host);
    let mut stream = world.tls(&host, "h2").await;
    let whole = head(1, 1 | END_HEADERS, 1, &block);
    stream.write_all(&[BEGIN, &whole].concat()).await.unwrap();
    let mut piece = [0; 1024];
    // A request that takes its time is no reason to end anything.
    let quiet = async { while stream.read(&mut piece).await.unwrap() > 0 {} };
    let quiet = tokio::time::timeout(Duration::from_secs(1), quiet).await;
    assert!(quiet.is_err(), "the connection was ended");
    assert_eq!(world.requests(&vm), 1);
    stream.write_all(&head(1, 1, 3, &block[..3])).await.unwrap();
    let mut all = Vec::new();
    let _ = soon("the end", stream.read_to_end(&mut all)).await;
}

#[tokio::test]
async fn a_head_in_two_pieces_is_whole_when_both_are_there() {
    let world = strict().await;
    let vm = world
        .vm_with(|_| std::future::pending::<Response<Body>>())
        .await;
    let host = vm.host();
    let block = block(&host);
    let (first, second) = block.split_at(3);
    let whole = head(1, 1 | END_HEADERS, 1, &block);
    for (begin, end) in [
        // Two frames, or one that is cut.
        (head(1, 1, 1, first), head(9, END_HEADERS, 1, second)),
        (whole[..12].to_vec(), whole[12..].to_vec()),
    ] {
        let before = world.requests(&vm);
        let mut stream = world.tls(&host, "h2").await;
        stream.write_all(&[BEGIN, &begin].concat()).await.unwrap();
        stream.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.write_all(&end).await.unwrap();
        let mut piece = [0; 1024];
        let quiet = async { while stream.read(&mut piece).await.unwrap() > 0 {} };
        let quiet = tokio::time::timeout(Duration::from_secs(1), quiet).await;
        assert!(quiet.is_err(), "the connection was ended");
        assert_eq!(world.requests(&vm), before + 1);
    }
}

#[tokio::test]
async fn a_connection_too_many_is_told_so_and_not_kept() {
    let world = World::with(|limits| {
        limits.connections_per_network = 1;
        limits.handshake = Duration::from_secs(1);
        limits.idle = 100 * PATIENCE;
    })
    .await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let _first = world.tls(&host, "h2").await;
    let stream = TokioIo::new(world.tls(&host, "h2").await);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("https://{host}/")).body(full(""));
    let asking = sender.send_request(request.unwrap());
    let answer = soon("an answer", asking).await.unwrap();
    assert_eq!(answer.status(), 503);
    let got = soon("the page", crate::support::Got::of(answer)).await;
    assert!(got.body.contains("too_many"), "{}", got.body);
    let _ = soon("the connection's end", connection).await.unwrap();
    assert_eq!(world.requests(&vm), 0);
}

#[tokio::test]
async fn a_connection_to_a_guest_is_closed_when_it_is_idle_and_not_before() {
    let world = World::with(|limits| {
        limits.upstream_idle = Duration::from_millis(200);
        limits.idle = 100 * PATIENCE;
    })
    .await;
    let vm = world.vm();
    let (ended, mut ends) = mpsc::unbounded_channel();
    let release = Arc::new(Notify::new());
    let released = Arc::clone(&release);
    let server = raw_server(move |stream| {
        let (ended, released) = (ended.clone(), Arc::clone(&released));
        async move {
            let service = hyper::service::service_fn(move |request: Request<_>| {
                let released = Arc::clone(&released);
                async move {
                    let _: Request<hyper::body::Incoming> = request;
                    let (sender, body) = channel();
                    tokio::spawn(async move {
                        released.notified().await;
                        let last = hyper::body::Frame::data("last".into());
                        sender.send(last).await.unwrap();
                    });
                    Ok::<_, std::convert::Infallible>(Response::new(body))
                }
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
            let _ = ended.send(());
        }
    });
    world.listens(&vm, 3000, server.await);
    let host = vm.host();
    let mut sender = world.http2(&host).await;
    let request = Request::post(format!("https://{host}/"))
        .header("content-type", "application/grpc")
        .body(full("message"));
    let asking = sender.send_request(request.unwrap());
    let answer = soon("an answer", asking).await.unwrap();
    // Long after the connection was last taken for a request.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(ends.try_recv().is_err(), "closed beneath an answer");
    release.notify_one();
    let got = soon("the answer", crate::support::Got::of(answer)).await;
    assert_eq!(got.body, "last");
    soon("the connection's end", ends.recv()).await.unwrap();
}
