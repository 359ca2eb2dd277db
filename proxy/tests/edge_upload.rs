//! Bodies larger than what the edge may hold, in a process of their own: its memory is measured.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "edge/support.rs"]
#[allow(dead_code)]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use hyper::body::Frame;
use support::{Got, World, channel, raw_server, read_head, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GIB: u64 = 1 << 30;
const PIECE: usize = 1 << 20;

/// The most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().nth(1))
        .unwrap()
        .parse()
        .unwrap();
    kib * 1024
}

/// Reads a body of a known length and tells how long it was.
async fn counting() -> std::net::SocketAddr {
    raw_server(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap().to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: u64 = length.split("\r\n").next().unwrap().parse().unwrap();
        let mut piece = vec![0; 256 * 1024];
        let mut got = 0;
        while got < length {
            got += stream.read(&mut piece).await.unwrap() as u64;
        }
        let text = got.to_string();
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_goes_through_in_constant_memory_and_a_guest_that_does_not_read_holds_it_back() {
    let world = World::start().await;
    let vm = world.vm();
    world.listens(&vm, 3000, counting().await);
    // What the connections themselves need is there before the measurement.
    for length in [PIECE as u64, GIB] {
        let before = peak();
        let stream = world.tls(&vm.host(), "http/1.1").await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let head = format!(
            "PUT / HTTP/1.1\r\nHost: {}\r\nContent-Length: {length}\r\n\r\n",
            vm.host()
        );
        writer.write_all(head.as_bytes()).await.unwrap();
        let piece = vec![7; PIECE];
        for _ in 0..length / PIECE as u64 {
            soon("a piece", writer.write_all(&piece)).await.unwrap();
        }
        writer.flush().await.unwrap();
        assert!(
            read_head(&mut reader)
                .await
                .unwrap()
                .starts_with("HTTP/1.1 200 ")
        );
        let mut told = vec![0; length.to_string().len()];
        reader.read_exact(&mut told).await.unwrap();
        assert_eq!(told, length.to_string().as_bytes());
        if length == GIB {
            let grown = peak() - before;
            assert!(grown < 16 << 20, "{grown} bytes more");
        }
    }
    // The same by HTTP/2, shorter.
    let before = peak();
    let (parts, body) = channel();
    let length = GIB / 8;
    let request = Request::put(format!("https://{}/", vm.host()))
        .header("content-length", length)
        .body(body)
        .unwrap();
    let mut visitor = world.http2(&vm.host()).await;
    let answer = tokio::spawn(async move { visitor.send_request(request).await });
    let piece = Bytes::from(vec![7; PIECE]);
    for _ in 0..length / PIECE as u64 {
        soon("a piece", parts.send(Frame::data(piece.clone())))
            .await
            .unwrap();
    }
    drop(parts);
    let got = Got::of(soon("an answer", answer).await.unwrap().unwrap()).await;
    assert_eq!(got.body, length.to_string());
    let grown = peak() - before;
    assert!(grown < 16 << 20, "{grown} bytes more");

    // A guest that takes the head and nothing else.
    let deaf = raw_server(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        std::future::pending::<()>().await;
    });
    world.listens(&vm, 1, deaf.await);
    let before = peak();
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let mut stream = world.tls(&vm.at(1), "http/1.1").await;
    let head = format!(
        "PUT / HTTP/1.1\r\nHost: {}\r\nContent-Length: {GIB}\r\n\r\n",
        vm.at(1)
    );
    let writing = tokio::spawn(async move {
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..GIB / PIECE as u64 {
            stream.write_all(&piece).await.unwrap();
            counter.fetch_add(PIECE as u64, Ordering::SeqCst);
        }
    });
    // Until nothing moves any more.
    let mut last = u64::MAX;
    while last != sent.load(Ordering::SeqCst) {
        last = sent.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(!writing.is_finished());
    assert!(last < 32 << 20, "{last} bytes are somewhere");
    let grown = peak() - before;
    assert!(grown < 16 << 20, "{grown} bytes more");
    writing.abort();
}
