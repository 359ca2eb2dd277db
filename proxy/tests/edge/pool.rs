//! Connections into a VM that are used again, and when they must not be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use http::{Method, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Barrier, Semaphore};

use crate::support::{Got, World, empty, full, raw_server, read_head, soon};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn requests_one_after_another_share_a_connection() {
    let world = World::with(|limits| limits.upstream_idle = crate::support::PATIENCE).await;
    let vm = world.vm_that_tells().await;
    let mut sender = world.http1(&vm.host()).await;
    for _ in 0..20 {
        let request = Request::get("/").header("host", vm.host()).body(empty());
        let got = sender.send_request(request.unwrap()).await.unwrap();
        assert_eq!(Got::of(got).await.status.as_u16(), 200);
    }
    let made = world.guests.connections.load(Ordering::SeqCst);
    // One that ends its answer late is not waited for.
    assert!(made < 5, "{made}");
}

#[tokio::test]
async fn a_hundred_visitors_at_a_time_use_the_same_connections_again() {
    const VISITORS: usize = 100;
    const ROUNDS: usize = 5;
    let world = World::with(|limits| limits.upstream_idle = crate::support::PATIENCE).await;
    let vm = world.vm();
    // Answers when all of a round have asked: each needs a connection of its own.
    let all = Arc::new(Barrier::new(VISITORS));
    let server = raw_server(move |mut stream| {
        let all = Arc::clone(&all);
        async move {
            while read_head(&mut stream).await.is_some() {
                all.wait().await;
                stream.write_all(ANSWER).await.unwrap();
            }
        }
    });
    world.listens(&vm, 3000, server.await);
    let mut visitors = Vec::new();
    for _ in 0..VISITORS {
        visitors.push(world.http1(&vm.host()).await);
    }
    for _ in 0..ROUNDS {
        let answers = visitors.iter_mut().map(|visitor| {
            let request = Request::get("/").header("host", vm.host()).body(empty());
            visitor.send_request(request.unwrap())
        });
        for answer in soon("a round", join_all(answers)).await {
            assert_eq!(Got::of(answer.unwrap()).await.body, "ok");
        }
    }
    let made = world.guests.connections.load(Ordering::SeqCst);
    // Here, too, one that ends its answer late is not waited for.
    assert!(made < 2 * VISITORS, "{made}");
}

#[tokio::test]
async fn what_must_not_happen_twice_goes_over_no_connection_that_its_server_may_be_closing() {
    let world = World::with(|limits| {
        limits.upstream_idle = crate::support::PATIENCE;
        limits.upstream_fresh = std::time::Duration::ZERO;
    })
    .await;
    let vm = world.vm_that_tells().await;
    let made = || world.guests.connections.load(Ordering::SeqCst);
    let ask = async |method: Method| {
        let mut sender = world.http1(&vm.host()).await;
        let request = Request::builder().method(method).header("host", vm.host());
        let answer = sender.send_request(request.body(empty()).unwrap());
        let got = Got::of(soon("an answer", answer).await.unwrap()).await;
        assert_eq!(got.status.as_u16(), 200);
    };
    // A connection that waits.
    soon("a pooled connection", async {
        loop {
            let before = made();
            ask(Method::GET).await;
            if made() == before {
                break;
            }
        }
    })
    .await;
    let before = made();
    ask(Method::POST).await;
    assert_eq!(made(), before + 1);
}

#[tokio::test]
async fn a_connection_that_waited_in_vain_is_replaced_unless_something_could_happen_twice() {
    let world = World::with(|limits| {
        limits.upstream_idle = crate::support::PATIENCE;
        limits.upstream_fresh = crate::support::PATIENCE;
    })
    .await;
    let vm = world.vm();
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    // Answers one request per connection, reads the next, and closes without a word.
    let server = raw_server(move |mut stream| {
        let counted = Arc::clone(&counted);
        async move {
            if read_head(&mut stream).await.is_some() {
                counted.fetch_add(1, Ordering::SeqCst);
                stream.write_all(ANSWER).await.unwrap();
                if read_head(&mut stream).await.is_some() {
                    counted.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    });
    world.listens(&vm, 3000, server.await);
    for (method, body, status, requests) in [
        (Method::GET, "", 200, 2),
        (Method::DELETE, "", 200, 2),
        (Method::POST, "", 502, 1),
        (Method::PUT, "data", 502, 1),
    ] {
        // A connection that waits, and no other.
        soon("a pooled connection", async {
            loop {
                let before = world.guests.connections.load(Ordering::SeqCst);
                assert_eq!(world.get(&vm.host(), &[]).await.status.as_u16(), 200);
                if world.guests.connections.load(Ordering::SeqCst) > before {
                    break;
                }
            }
        })
        .await;
        let before = seen.load(Ordering::SeqCst);
        let mut sender = world.http1(&vm.host()).await;
        let request = Request::builder().method(&method).header("host", vm.host());
        let request = request.body(full(body)).unwrap();
        let got = Got::of(
            soon("an answer", sender.send_request(request))
                .await
                .unwrap(),
        )
        .await;
        assert_eq!(got.status.as_u16(), status, "{method}");
        assert_eq!(seen.load(Ordering::SeqCst) - before, requests, "{method}");
    }
}

#[tokio::test]
async fn a_vm_that_changed_its_state_gets_no_request_over_an_old_connection() {
    let world = World::with(|limits| limits.upstream_idle = crate::support::PATIENCE).await;
    let vm = world.vm();
    let closed = Arc::new(Semaphore::new(0));
    let told = Arc::clone(&closed);
    let server = raw_server(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            while read_head(&mut stream).await.is_some() {
                stream.write_all(ANSWER).await.unwrap();
            }
            told.add_permits(1);
        }
    });
    world.listens(&vm, 3000, server.await);
    let mut visitor = world.http1(&vm.host()).await;
    for number in 1..=3 {
        let request = Request::get("/").header("host", vm.host()).body(empty());
        let got = visitor.send_request(request.unwrap()).await.unwrap();
        assert_eq!(Got::of(got).await.body, "ok");
        assert_eq!(world.guests.connections.load(Ordering::SeqCst), number);
        world.restart(&vm);
        soon("the end of the old connection", closed.acquire())
            .await
            .unwrap()
            .forget();
    }
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed_before_the_guest_would() {
    let world = World::with(|limits| {
        limits.upstream_idle = std::time::Duration::from_millis(20);
    })
    .await;
    let vm = world.vm();
    let closed = Arc::new(Semaphore::new(0));
    let told = Arc::clone(&closed);
    let server = raw_server(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(ANSWER).await.unwrap();
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            told.add_permits(1);
        }
    });
    world.listens(&vm, 3000, server.await);
    assert_eq!(world.get(&vm.host(), &[]).await.body, "ok");
    soon("the end", closed.acquire()).await.unwrap().forget();
}
