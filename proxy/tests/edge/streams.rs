//! Bodies pass as they come.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Frame;
use tokio::sync::Semaphore;

use crate::support::{Got, World, certificate, channel, empty, full, soon, tell};

#[tokio::test]
async fn a_chunk_arrives_before_the_next_is_made() {
    let world = World::start().await;
    let go = std::sync::Arc::new(Semaphore::new(0));
    let wait = go.clone();
    let vm = world
        .vm_with(move |_| {
            let wait = wait.clone();
            let (sender, body) = channel();
            tokio::spawn(async move {
                for number in 0..5 {
                    let event = format!("data: {number}\n\n");
                    sender.send(Frame::data(Bytes::from(event))).await.unwrap();
                    wait.acquire().await.unwrap().forget();
                }
            });
            async {
                let response = Response::builder().header("content-type", "text/event-stream");
                response.body(body).unwrap()
            }
        })
        .await;
    for http2 in [false, true] {
        let mut body = if http2 {
            let request = Request::get(format!("https://{}/", vm.host())).body(empty());
            let mut sender = world.http2(&vm.host()).await;
            sender
                .send_request(request.unwrap())
                .await
                .unwrap()
                .into_body()
        } else {
            let request = Request::get("/").header("host", vm.host()).body(empty());
            let mut sender = world.http1(&vm.host()).await;
            sender
                .send_request(request.unwrap())
                .await
                .unwrap()
                .into_body()
        };
        for number in 0..5 {
            let frame = soon("an event", body.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), format!("data: {number}\n\n"));
            // Only now may the guest make the next.
            go.add_permits(1);
        }
        let rest = soon("the end", body.collect()).await.unwrap();
        assert!(rest.to_bytes().is_empty());
    }
}

#[tokio::test]
async fn a_piece_of_an_upload_is_there_before_the_next_is_sent_and_is_answered_meanwhile() {
    let world = World::start().await;
    let vm = world
        .vm_with(|request| async {
            Response::new(request.into_body().map_err(|_| unreachable!()).boxed())
        })
        .await;
    for http2 in [false, true] {
        let (sender, body) = channel();
        let mut answer = if http2 {
            let request = Request::post(format!("https://{}/", vm.host())).body(body);
            let mut visitor = world.http2(&vm.host()).await;
            visitor
                .send_request(request.unwrap())
                .await
                .unwrap()
                .into_body()
        } else {
            let request = Request::post("/").header("host", vm.host()).body(body);
            let mut visitor = world.http1(&vm.host()).await;
            visitor
                .send_request(request.unwrap())
                .await
                .unwrap()
                .into_body()
        };
        for number in 0..5 {
            let piece = Bytes::from(format!("piece {number}"));
            sender.send(Frame::data(piece.clone())).await.unwrap();
            let frame = soon("the echo", answer.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), piece);
        }
        drop(sender);
        let rest = soon("the end", answer.collect()).await.unwrap();
        assert!(rest.to_bytes().is_empty());
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_visitor_too() {
    let world = World::start().await;
    let vm = world.vm();
    let server = crate::support::raw_server(|mut stream| async move {
        crate::support::read_head(&mut stream).await.unwrap();
        let answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, answer)
            .await
            .unwrap();
    });
    world.listens(&vm, 3000, server.await);
    let request = Request::get("/").header("host", vm.host()).body(empty());
    let mut sender = world.http1(&vm.host()).await;
    let answer = sender.send_request(request.unwrap()).await.unwrap();
    assert!(
        soon("an error", answer.into_body().collect())
            .await
            .is_err()
    );
    let request = Request::get(format!("https://{}/", vm.host())).body(empty());
    let mut sender = world.http2(&vm.host()).await;
    let answer = sender.send_request(request.unwrap()).await.unwrap();
    assert!(
        soon("an error", answer.into_body().collect())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_visitor_who_leaves_leaves_nothing_running_towards_the_guest() {
    let world = World::start().await;
    let vm = world.vm();
    let closed = std::sync::Arc::new(Semaphore::new(0));
    let told = closed.clone();
    let server = crate::support::raw_server(move |mut stream| {
        let told = told.clone();
        async move {
            crate::support::read_head(&mut stream).await.unwrap();
            // The answer never comes; the end does.
            let read = tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await;
            assert_eq!(read.unwrap_or(0), 0);
            told.add_permits(1);
        }
    });
    world.listens(&vm, 3000, server.await);
    let request = Request::get("/").header("host", vm.host()).body(empty());
    let mut sender = world.http1(&vm.host()).await;
    let sending = sender.send_request(request.unwrap());
    soon("a connection", async {
        tokio::pin!(sending);
        tokio::select! {
            answer = &mut sending => panic!("{answer:?}"),
            () = async {
                while world.guests.connections.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
            } => {}
        }
    })
    .await;
    drop(sender);
    soon("the end", closed.acquire()).await.unwrap().forget();
}

#[tokio::test]
async fn a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on() {
    let mut world = World::start().await;
    let vm = world.vm_with(tell).await;
    let mut old = world.http1(&vm.host()).await;
    let (config, _) = certificate();
    world.edge.set_tls(config);
    let refused = world.tls_from(None, &vm.host(), "http/1.1").await;
    assert!(refused.is_err(), "the root is another now");
    let request = Request::post("/").header("host", vm.host()).body(full("x"));
    let got = Got::of(old.send_request(request.unwrap()).await.unwrap()).await;
    assert_eq!(got.status.as_u16(), 200);
    let (config, root) = certificate();
    world.edge.set_tls(config);
    world.trust(root);
    assert_eq!(world.get(&vm.host(), &[]).await.status.as_u16(), 200);
}
