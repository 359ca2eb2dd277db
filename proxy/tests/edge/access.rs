//! VMs whose owner set a token.

use std::sync::atomic::Ordering;

use http::Request;
use proxy::edge::guests::Refusal;

use crate::support::{Got, World, empty, soon};

/// What a visitor without anything gets for a path.
async fn follow(world: &World, host: &str, path: &str) -> Got {
    let mut sender = world.http1(host).await;
    let request = Request::get(path).header("host", host);
    let sending = sender.send_request(request.body(empty()).unwrap());
    Got::of(soon("an answer", sending).await.unwrap()).await
}

#[tokio::test]
async fn a_link_opens_for_one_of_many_who_come_at_once() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    let host = vm.host();
    let link = format!("/?{}", world.link(&vm, "secret"));
    let visitors = (0..20).map(|_| follow(&world, &host, &link));
    let got = futures::future::join_all(visitors).await;
    let count = |status| {
        got.iter()
            .filter(|got| got.status.as_u16() == status)
            .count()
    };
    assert_eq!((count(303), count(403)), (1, 19));
}

#[tokio::test]
async fn a_token_opens_by_field_or_by_link_and_cookie_and_the_guest_sees_none_of_it() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    let host = vm.host();
    assert_eq!(world.get(&host, &[]).await.status.as_u16(), 401);
    let got = world.get(&host, &[("x-supvm-token", "wrong")]).await;
    assert_eq!(got.status.as_u16(), 403);
    for field in [
        ("x-supvm-token", "secret"),
        ("authorization", "Bearer secret"),
    ] {
        let got = world.get(&host, &[field]).await;
        assert_eq!(got.status.as_u16(), 200);
        assert!(!got.body.contains("secret"), "{}", got.body);
    }
    let link = format!("//evil.example/x?{}&a=1", world.link(&vm, "secret"));
    let got = follow(&world, &host, &link).await;
    assert_eq!(got.status.as_u16(), 303);
    let location = got.headers["location"].to_str().unwrap();
    assert_eq!(location, format!("https://{host}//evil.example/x?a=1"));
    let again = follow(&world, &host, &link).await;
    assert_eq!(again.status.as_u16(), 403, "{}", again.body);
    assert!(again.body.contains("link_spent"), "{}", again.body);
    assert!(!again.headers.contains_key("set-cookie"));
    let cookie = got.headers["set-cookie"].to_str().unwrap();
    assert!(!cookie.contains("secret") && !cookie.contains("once"));
    let (pair, _) = cookie.split_once(';').unwrap();
    let cookies = format!("own=1; {pair}");
    let got = world.get(&host, &[("cookie", &cookies)]).await;
    assert_eq!(got.status.as_u16(), 200);
    assert!(got.body.contains("cookie: own=1\n"), "{}", got.body);
    assert!(!got.body.contains("supvm="), "{}", got.body);
    let other = world.vm_that_tells().await;
    world.token(&other, "secret");
    let got = world.get(&other.host(), &[("cookie", &cookies)]).await;
    assert_eq!(got.status.as_u16(), 401, "a cookie is for one VM");
    let link = format!("/?{}", world.link(&vm, "secret"));
    world.token(&vm, "changed");
    let got = follow(&world, &host, &link).await;
    assert_eq!(got.status.as_u16(), 403, "a link ends with the token");
    let got = world.get(&host, &[("cookie", &cookies)]).await;
    assert_eq!(got.status.as_u16(), 401, "and ends with the token");
}

#[tokio::test]
async fn a_stopped_vm_is_started_only_for_who_may_come_in() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    world.refuse(&vm, Refusal::Stopped);
    let host = vm.host();
    assert_eq!(world.get(&host, &[]).await.status.as_u16(), 401);
    let got = world.get(&host, &[("x-supvm-token", "wrong")]).await;
    assert_eq!(got.status.as_u16(), 403);
    assert_eq!(world.guests.found.load(Ordering::SeqCst), 0, "it was woken");
    let got = world.get(&host, &[("x-supvm-token", "secret")]).await;
    assert_eq!(got.status.as_u16(), 503, "who may come in learns its state");
    assert_eq!(world.guests.found.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn who_tries_too_often_waits_and_others_do_not() {
    let world = World::with(|limits| limits.tries = 3).await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    for _ in 0..3 {
        let got = world.get(&vm.host(), &[("x-supvm-token", "wrong")]).await;
        assert_eq!(got.status.as_u16(), 403);
    }
    let got = world.get(&vm.host(), &[("x-supvm-token", "secret")]).await;
    assert_eq!(got.status.as_u16(), 429);
    assert!(got.headers.contains_key("retry-after"));
    let from = Some("127.0.0.2".parse().unwrap());
    let stream = world.tls_from(from, &vm.host(), "http/1.1").await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("/")
        .header("host", vm.host())
        .header("x-supvm-token", "secret");
    let sending = sender.send_request(request.body(empty()).unwrap());
    assert_eq!(
        soon("an answer", sending).await.unwrap().status().as_u16(),
        200
    );
}

#[tokio::test]
async fn a_token_shown_in_two_ways_at_once_is_hidden_in_both() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    let host = vm.host();
    let link = format!("/x?{}&a=1", world.link(&vm, "secret"));
    let got = follow(&world, &host, &link).await;
    let cookie = got.headers["set-cookie"].to_str().unwrap();
    let (cookie, _) = cookie.split_once(';').unwrap();
    for fields in [
        [("cookie", cookie), ("authorization", "Bearer secret")],
        [
            ("x-supvm-token", "secret"),
            ("authorization", "Bearer secret"),
        ],
    ] {
        for method in ["GET", "POST"] {
            let mut request = Request::builder().method(method).uri(&link);
            for (name, value) in [("host", host.as_str())].iter().chain(&fields) {
                request = request.header(*name, *value);
            }
            let mut sender = world.http1(&host).await;
            let sending = sender.send_request(request.body(empty()).unwrap());
            let got = Got::of(soon("an answer", sending).await.unwrap()).await;
            assert_eq!(got.status.as_u16(), 200, "{fields:?}");
            assert!(
                got.body.starts_with(&format!("{method} /x?a=1 ")),
                "{}",
                got.body
            );
            let hidden = !got.body.contains("secret") && !got.body.contains("once");
            assert!(hidden, "{fields:?}: {}", got.body);
        }
    }
}
