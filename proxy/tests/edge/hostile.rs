//! Visitors who mean harm, or whose software is broken.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::support::{Got, PATIENCE, World, channel, empty, full, read_head, soon};

#[tokio::test]
async fn what_two_readers_could_understand_differently_is_a_400_and_the_end() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let smuggled = format!("GET /smuggled HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let length = smuggled.len() + 5;
    let sane = format!("Host: {host}\r\n");
    for (line, fields) in [
        (
            "POST / HTTP/1.1",
            format!("{sane}Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Content-Length: 5\r\nContent-Length: 5\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Content-Length: 5\r\nContent-Length: {length}\r\n"),
        ),
        ("POST / HTTP/1.1", format!("{sane}Content-Length: 5, 5\r\n")),
        ("POST / HTTP/1.1", format!("{sane}Content-Length: +5\r\n")),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding: chunked, chunked\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding: gzip, chunked\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding: xchunked\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding:\r\n chunked\r\n"),
        ),
        (
            "POST / HTTP/1.1",
            format!("{sane}Transfer-Encoding : chunked\r\n"),
        ),
        (
            "POST / HTTP/1.0",
            format!("{sane}Transfer-Encoding: chunked\r\n"),
        ),
        ("GET / HTTP/1.1", format!("{sane}X-Folded: a\r\n b\r\n")),
        ("GET / HTTP/1.1", format!("{sane}Host: {host}\r\n")),
        ("GET / HTTP/1.1", String::new()),
        ("GET / HTTP/1.1", format!("{sane}X\rY: z\r\n")),
        ("GET / HTTP/1.1", format!("{sane}X: a\0b\r\n")),
        ("GET / HTTP/1.1", "Host: user@name.vm.test\r\n".into()),
        ("GET / HTTP/1.1", "Host: a/b\r\n".into()),
        ("GET http://elsewhere.example/ HTTP/1.1", sane.clone()),
        ("GET elsewhere.example:80 HTTP/1.1", sane.clone()),
        ("GET * HTTP/1.1", sane.clone()),
        (
            "GET / HTTP/1.1",
            format!("{sane}Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n"),
        ),
        ("GET / HTTP/2.0", sane.clone()),
        ("GET / HTTP/1.1 x", sane.clone()),
        ("PRI * HTTP/2.0", String::new()),
    ] {
        let message = format!("{line}\r\n{fields}\r\n0\r\n\r\n{smuggled}");
        let answer = world.raw(&host, message.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 "),
            "{line} {fields}: {answer}"
        );
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        assert_eq!(
            answer.matches("connection: ").count(),
            1,
            "{line} {fields}: {answer}"
        );
    }
    assert_eq!(world.requests(&vm), 0);
}

#[tokio::test]
async fn requests_one_after_another_in_one_piece_are_answered_each() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let mut all = String::new();
    for number in 0..3 {
        all += &format!(
            "\r\nPOST /{number} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n\
             5\r\nhello\r\n0\r\n\r\nPUT /{number}b HTTP/1.1\r\nHost: {host}\r\n\
             Content-Length: 5\r\n\r\nworld"
        );
    }
    all += &format!("GET /last HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    for size in [1, 7, 64, all.len()] {
        let mut stream = world.tls(&host, "http/1.1").await;
        for piece in all.as_bytes().chunks(size) {
            stream.write_all(piece).await.unwrap();
            stream.flush().await.unwrap();
        }
        let mut answers = String::new();
        soon("the end", stream.read_to_string(&mut answers))
            .await
            .unwrap();
        let told = [
            "POST /0 ",
            "PUT /0b ",
            "POST /1 ",
            "PUT /1b ",
            "POST /2 ",
            "PUT /2b ",
            "GET /last ",
        ];
        let at: Vec<_> = told.iter().map(|line| answers.find(line)).collect();
        assert!(
            at.iter().all(Option::is_some) && at.is_sorted(),
            "{size} {answers}"
        );
        assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 7, "{answers}");
        assert_eq!(answers.matches("\n\nhello").count(), 3, "{answers}");
    }
}

#[tokio::test]
async fn an_absolute_form_with_the_same_host_is_a_request_like_others() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let head =
        format!("GET https://{host}/x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let answer = world.raw(&host, head.as_bytes()).await;
    assert!(answer.contains("GET /x HTTP/1.1\n"), "{answer}");
}

#[tokio::test]
async fn a_head_above_the_limits_is_a_431() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    for fields in [
        "X: y\r\n".repeat(101),
        format!("X: {}\r\n", "y".repeat(40_000)),
    ] {
        let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n");
        let answer = world.raw(&host, head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(answer.contains("head_too_large"), "{answer}");
    }
    // A line that never ends.
    let mut stream = world.tls(&host, "http/1.1").await;
    let mut answer = Vec::new();
    let line = vec![b'a'; 1024];
    while stream.write_all(&line).await.is_ok() && answer.is_empty() {
        tokio::select! {
            biased;
            read = stream.read_buf(&mut answer) => assert!(read.unwrap() > 0),
            () = tokio::task::yield_now() => {}
        }
    }
    assert!(answer.starts_with(b"HTTP/1.1 431 "));
    let mut sender = world.http2(&host).await;
    let mut request = Request::get(format!("https://{host}/"));
    for number in 0..101 {
        request = request.header(format!("x-{number}"), "y");
    }
    let sending = sender.send_request(request.body(empty()).unwrap());
    assert_eq!(
        soon("an answer", sending).await.unwrap().status().as_u16(),
        431
    );
    assert_eq!(world.requests(&vm), 0);
}

#[tokio::test]
async fn a_slow_head_ends_the_connection_and_a_slow_body_does_not() {
    let world = World::with(|limits| {
        limits.head = Duration::from_millis(50);
        limits.idle = Duration::from_millis(50);
    })
    .await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let answer = world.raw(&host, b"GET / HTTP/1.1\r\nHost: ").await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    let answer = world.raw(&host, b"").await;
    assert_eq!(answer, "", "nothing came");
    let mut idle = world.http2(&host).await;
    soon("the end", async {
        while idle.ready().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    for http2 in [false, true] {
        let (parts, body) = channel();
        let request = Request::post(format!("https://{host}/"));
        let answer = tokio::spawn(if http2 {
            let request = request.body(body).unwrap();
            let mut sender = world.http2(&host).await;
            futures::future::Either::Left(async move { sender.send_request(request).await })
        } else {
            let mut request = request.header("host", &host).body(body).unwrap();
            *request.uri_mut() = "/".parse().unwrap();
            let mut sender = world.http1(&host).await;
            futures::future::Either::Right(async move { sender.send_request(request).await })
        });
        parts
            .send(Frame::data(Bytes::from("slowly ")))
            .await
            .unwrap();
        // Longer than head and idle connection may take.
        tokio::time::sleep(Duration::from_millis(400)).await;
        parts
            .send(Frame::data(Bytes::from("but surely")))
            .await
            .unwrap();
        drop(parts);
        let got = Got::of(soon("an answer", answer).await.unwrap().unwrap()).await;
        assert!(got.body.ends_with("slowly but surely"), "{}", got.body);
    }
}

#[tokio::test]
async fn one_address_takes_its_share_of_connections_and_leaves_others_theirs() {
    let world = World::with(|limits| limits.connections_per_network = 100).await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let mut open = Vec::new();
    let mut refused = 0;
    for _ in 0..1_000 {
        match world.tls_from(None, &host, "http/1.1").await {
            Ok(stream) => open.push(stream),
            Err(_) => refused += 1,
        }
    }
    // The last of them are told so.
    assert_eq!((open.len(), refused), (116, 884));
    let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let mut told = open.split_off(100);
    let stream = &mut told[0];
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = read_head(stream).await.unwrap().to_lowercase();
    assert!(answer.starts_with("http/1.1 503 "), "{answer}");
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    assert!(answer.contains("\r\nretry-after: "), "{answer}");
    let mut page = String::new();
    let _ = soon("the page's end", stream.read_to_string(&mut page)).await;
    assert!(page.contains("too_many"), "{page}");
    let other = Some("127.0.0.2".parse().unwrap());
    for (stream, expected) in [
        (&mut open[99], "HTTP/1.1 200 "),
        (
            &mut world.tls_from(other, &host, "http/1.1").await.unwrap(),
            "HTTP/1.1 200 ",
        ),
        (&mut told[1], "HTTP/1.1 503 "),
    ] {
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = read_head(stream).await.unwrap();
        assert!(answer.starts_with(expected), "{answer}");
    }
    drop((open, told));
    soon("places that come back", async {
        loop {
            let Ok(mut stream) = world.tls_from(None, &host, "http/1.1").await else {
                tokio::task::yield_now().await;
                continue;
            };
            let _ = stream.write_all(head.as_bytes()).await;
            let answer = read_head(&mut stream).await;
            if answer.is_some_and(|head| head.starts_with("HTTP/1.1 200 ")) {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn one_address_has_so_many_requests_at_a_time_over_all_its_connections() {
    let world = World::with(|limits| limits.requests_per_network = 3).await;
    let entered = std::sync::Arc::new(Semaphore::new(0));
    let inside = entered.clone();
    let vm = world
        .vm_with(move |_| {
            inside.add_permits(1);
            async {
                tokio::time::sleep(PATIENCE).await;
                http::Response::new(empty())
            }
        })
        .await;
    let host = vm.host();
    let (mut one, mut other) = (world.http2(&host).await, world.http2(&host).await);
    let request = || {
        let request = Request::get(format!("https://{host}/")).body(empty());
        request.unwrap()
    };
    let waiting = [
        tokio::spawn(one.send_request(request())),
        tokio::spawn(one.send_request(request())),
        tokio::spawn(other.send_request(request())),
    ];
    soon("all three", entered.acquire_many(3))
        .await
        .unwrap()
        .forget();
    let sending = other.send_request(request());
    let got = Got::of(soon("an answer", sending).await.unwrap()).await;
    assert_eq!(
        (got.status.as_u16(), &got.json()["error"]),
        (503, &"too_many".into())
    );
    for visitor in waiting {
        visitor.abort();
    }
    let tells = world.vm_that_tells().await;
    soon("the places", async {
        while world.get(&tells.host(), &[]).await.status.as_u16() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_vm_has_so_many_requests_at_a_time_and_its_neighbour_its_own() {
    let world = World::with(|limits| limits.requests_per_vm = 2).await;
    let hold = std::sync::Arc::new(Semaphore::new(0));
    let (held, entered) = (hold.clone(), std::sync::Arc::new(Semaphore::new(0)));
    let inside = entered.clone();
    let vm = world
        .vm_with(move |_| {
            let (held, inside) = (held.clone(), inside.clone());
            async move {
                inside.add_permits(1);
                held.acquire().await.unwrap().forget();
                http::Response::new(full("done"))
            }
        })
        .await;
    let host = vm.host();
    let mut sender = world.http2(&host).await;
    let mut ask = || {
        let request = Request::get(format!("https://{host}/")).body(empty());
        sender.send_request(request.unwrap())
    };
    let waiting = [tokio::spawn(ask()), tokio::spawn(ask())];
    soon("both", entered.acquire_many(2))
        .await
        .unwrap()
        .forget();
    let got = Got::of(soon("an answer", ask()).await.unwrap()).await;
    assert_eq!(got.status.as_u16(), 503);
    assert!(got.headers.contains_key("retry-after"));
    assert_eq!(got.json()["error"], "too_many");
    let neighbour = world.vm_that_tells().await;
    assert_eq!(world.get(&neighbour.host(), &[]).await.status.as_u16(), 200);
    hold.add_permits(3);
    for answer in waiting {
        let got = Got::of(soon("an answer", answer).await.unwrap().unwrap()).await;
        assert_eq!(got.body, "done");
    }
    let got = Got::of(soon("an answer", ask()).await.unwrap()).await;
    assert_eq!(got.body, "done", "the places came back");
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

#[tokio::test]
async fn requests_that_are_reset_as_fast_as_they_are_sent_end_the_connection() {
    let world = World::start().await;
    let vm = world
        .vm_with(|_| async {
            tokio::time::sleep(PATIENCE).await;
            http::Response::new(empty())
        })
        .await;
    let host = vm.host();
    let stream = world.tls(&host, "h2").await;
    let mut attack = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    attack.extend(frame(4, 0, 0, &[]));
    // GET, https, `/`, and the authority, by HPACK's static table.
    let mut fields = vec![0x82, 0x87, 0x84, 0x01, host.len() as u8];
    fields.extend_from_slice(host.as_bytes());
    for number in 0..20_000 {
        let id = 2 * number + 1;
        attack.extend(frame(1, 0x5, id, &fields));
        attack.extend(frame(3, 0, id, &8_u32.to_be_bytes()));
    }
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = tokio::spawn(async move { writer.write_all(&attack).await });
    let mut answer = Vec::new();
    let _ = soon("the end", reader.read_to_end(&mut answer)).await;
    let _ = soon("the end of writing", writing).await;
    let made = world
        .guests
        .connections
        .load(std::sync::atomic::Ordering::SeqCst);
    assert!(made < 1_000 && world.requests(&vm) < 1_000, "{made}");
    let other = world.vm_that_tells().await;
    assert_eq!(world.get(&other.host(), &[]).await.status.as_u16(), 200);
}

#[tokio::test]
async fn giving_up_requests_again_and_again_ends_the_connection_that_does_it() {
    let world = World::start().await;
    let vm = world
        .vm_with(|_| async {
            tokio::time::sleep(PATIENCE).await;
            http::Response::new(empty())
        })
        .await;
    let host = vm.host();
    let mut sender = world.http2(&host).await;
    let mut given_up = 0;
    soon("the end", async {
        while sender.ready().await.is_ok() {
            let request = Request::get(format!("https://{host}/")).body(empty());
            let sending = sender.send_request(request.unwrap());
            let _ = tokio::time::timeout(Duration::from_millis(5), sending).await;
            given_up += 1;
        }
    })
    .await;
    assert!(given_up < 2_000, "{given_up}");
    let other = world.vm_that_tells().await;
    assert_eq!(world.get(&other.host(), &[]).await.status.as_u16(), 200);
}

#[tokio::test]
async fn a_panic_ends_one_connection_and_is_counted() {
    let world = World::start().await;
    let (bad, good) = (world.vm(), world.vm_that_tells().await);
    world.panic_at(&bad);
    let mut stays = world.http1(&good.host()).await;
    let head = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", bad.host());
    let mut stream = world.tls(&bad.host(), "http/1.1").await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the end", stream.read_to_end(&mut answer)).await;
    assert!(answer.is_empty());
    assert_eq!(world.edge.panics(), 1);
    let mut sender = world.http2(&bad.host()).await;
    let request = Request::get(format!("https://{}/", bad.host())).body(empty());
    assert!(
        soon("an error", sender.send_request(request.unwrap()))
            .await
            .is_err()
    );
    assert_eq!(world.edge.panics(), 2);
    let request = Request::get("/").header("host", good.host()).body(empty());
    let sending = stays.send_request(request.unwrap());
    assert_eq!(
        soon("an answer", sending).await.unwrap().status().as_u16(),
        200
    );
}

#[tokio::test]
async fn what_follows_a_bare_line_feed_in_a_chunked_body_is_never_a_request() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    // One reader ends the body at the line feed and takes the last lines for the body of a second
    // request; the other takes the second request for trailers and the last lines for a request.
    let hidden = format!("GET /hidden HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let length = hidden.len();
    for end in ["0\r\n\n", "0\r\nX: y\n\r\n"] {
        let message = format!(
            "POST /a HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n{end}\
             POST /b HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{hidden}"
        );
        let answer = world.raw(&host, message.as_bytes()).await;
        assert!(!answer.contains(" /hidden "), "{end:?}: {answer}");
        assert!(!answer.contains(" /b "), "{end:?}: {answer}");
    }
}

#[tokio::test]
async fn trailers_claim_nothing_that_header_fields_may_not() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let message = format!(
        "POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\
         Trailer: X-Forwarded-For, X_Real_IP, X-Supvm-Token, Cookie, Via, X-Sum\r\n\r\n\
         2\r\nhi\r\n0\r\nX-Forwarded-For: 10.0.0.1\r\nX_Real_IP: 10.0.0.1\r\n\
         X-Supvm-Token: secret\r\nCookie: a=1\r\nVia: 1.1 evil\r\nX-Sum: 7\r\n\r\n"
    );
    let answer = world.raw(&host, message.as_bytes()).await;
    assert!(answer.contains("trailer x-sum: 7"), "{answer}");
    assert_eq!(answer.matches("\ntrailer ").count(), 1, "{answer}");
}

#[tokio::test]
async fn a_length_without_a_body_does_not_swallow_the_next_request() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let mut sender = world.http2(&vm.host()).await;
    let url = |path: &str| format!("https://{}{path}", vm.host());
    let request = Request::get(url("/short")).header("content-length", "40");
    let first = soon(
        "an end",
        sender.send_request(request.body(empty()).unwrap()),
    )
    .await;
    if let Ok(answer) = first {
        assert_eq!(answer.status().as_u16(), 400);
    }
    let mut sender = world.http2(&vm.host()).await;
    for path in ["/one", "/two"] {
        let request = Request::get(url(path)).body(empty()).unwrap();
        let answer = soon("an answer", sender.send_request(request)).await;
        let got = Got::of(answer.unwrap()).await;
        assert!(
            got.body.starts_with(&format!("GET {path} ")),
            "{}",
            got.body
        );
    }
}
