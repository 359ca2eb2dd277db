//! What the edge answers itself.

use http::{Method, Request, StatusCode};
use proxy::edge::guests::{ConnectError, Refusal};
use tokio::io::AsyncWriteExt;

use protocol::host::proxy::{CustomDomain, ServeEdge};

use crate::support::{
    DOMAIN, Got, World, certificate_for, empty, hyper_server, raw_server, read_head, serve, soon,
    tell,
};

#[tokio::test]
async fn every_refusal_has_its_page_for_browsers_and_for_programs() {
    let world = World::start().await;
    for (refusal, status, code) in [
        (Refusal::Unknown, 404, "not_found"),
        (Refusal::Stopped, 503, "stopped"),
        (Refusal::StartFailed, 503, "start_failed"),
        (Refusal::StartTimeout, 504, "start_timeout"),
        (Refusal::Busy, 503, "too_many"),
        (Refusal::Unavailable, 503, "unavailable"),
    ] {
        let vm = world.vm();
        world.refuse(&vm, refusal.clone());
        let got = world.get(&vm.host(), &[]).await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]),
            (status, &code.into())
        );
        assert_eq!(got.headers["content-type"], "application/json");
        assert_eq!(got.headers["cache-control"], "no-store");
        let accept = [("accept", "text/html,application/xhtml+xml,*/*;q=0.8")];
        let got = world.get(&vm.host(), &accept).await;
        assert_eq!(got.status.as_u16(), status);
        assert_eq!(got.headers["content-type"], "text/html; charset=utf-8");
        assert_eq!(got.headers["cache-control"], "no-store");
        assert!(got.body.starts_with("<!doctype html>"), "{}", got.body);
        assert!(!got.body.contains("http:") && !got.body.contains("https:"));
        if refusal == Refusal::Busy {
            assert!(got.headers.contains_key("retry-after"));
        }
    }
}

#[tokio::test]
async fn a_port_that_does_not_answer_has_a_page_that_says_what_to_do() {
    let world = World::start().await;
    let vm = world.vm();
    for (port, error, status, code) in [
        (1, ConnectError::Refused, 502, "nothing_listens"),
        (2, ConnectError::TimedOut, 504, "no_answer"),
        (3, ConnectError::TooMany, 503, "too_many"),
        (4, ConnectError::Gone, 502, "closed_early"),
    ] {
        world.closed(&vm, port, error);
        let got = world.get(&vm.at(port), &[]).await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]),
            (status, &code.into())
        );
    }
    let got = world.get(&vm.at(8123), &[]).await;
    assert!(
        got.body.contains("python3 -m http.server 8123"),
        "{}",
        got.body
    );
}

#[tokio::test]
async fn a_guest_that_closes_early_or_speaks_no_http_is_a_502() {
    let world = World::start().await;
    let vm = world.vm();
    let silent = raw_server(|mut stream| async move {
        read_head(&mut stream).await;
    });
    world.listens(&vm, 1, silent.await);
    let half = raw_server(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nX").await.unwrap();
    });
    world.listens(&vm, 2, half.await);
    let other = raw_server(|mut stream| async move {
        stream
            .write_all(b"220 mail.example ESMTP\r\n")
            .await
            .unwrap();
        read_head(&mut stream).await;
    });
    world.listens(&vm, 3, other.await);
    let switches = raw_server(|mut stream| async move {
        read_head(&mut stream).await;
        let answer =
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
        stream.write_all(answer).await.unwrap();
    });
    world.listens(&vm, 4, switches.await);
    for (port, lengths) in [
        (5, "Content-Length: +1\r\n"),
        (6, "Content-Length: 99999999999999999999\r\n"),
        (7, "Content-Length: 1\r\nContent-Length: 1\r\n"),
    ] {
        let unsure = raw_server(move |mut stream| async move {
            read_head(&mut stream).await;
            // Without a body, where the length says nothing to hyper.
            let answer = format!("HTTP/1.1 304 Not Modified\r\n{lengths}\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        world.listens(&vm, port, unsure.await);
    }
    for (port, code) in [
        (1, "closed_early"),
        (2, "closed_early"),
        (3, "bad_answer"),
        (4, "bad_answer"),
        (5, "bad_answer"),
        (6, "bad_answer"),
        (7, "bad_answer"),
    ] {
        let got = world.get(&vm.at(port), &[]).await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]),
            (502, &code.into()),
            "{port}"
        );
    }
}

#[tokio::test]
async fn names_that_are_nobodys_are_told_apart_by_nothing() {
    let world = World::start().await;
    let vm = world.vm();
    world.refuse(&vm, Refusal::Unknown);
    let body = world.get(&vm.host(), &[]).await.body;
    for host in [
        "nobody",
        "aaaaaaaaaaaaaaaaaaaa",
        "0-aaaaaaaaaaaaaaaaaaaa",
        "99999-x",
    ] {
        let got = world.get(&format!("{host}.{DOMAIN}"), &[]).await;
        assert_eq!((got.status, &got.body), (StatusCode::NOT_FOUND, &body));
    }
    let mut sender = world.http1(DOMAIN).await;
    for (path, status) in [("/", 200), ("/x", 404)] {
        let request = Request::get(path).header("host", DOMAIN).body(empty());
        let got = Got::of(sender.send_request(request.unwrap()).await.unwrap()).await;
        assert_eq!(got.status.as_u16(), status);
    }
}

#[tokio::test]
async fn a_request_whose_name_is_not_its_connections_is_misdirected() {
    let world = World::start().await;
    let (one, other) = (world.vm_that_tells().await, world.vm_that_tells().await);
    let mut sender = world.http2(&one.host()).await;
    for (host, status) in [(&one, 200), (&other, 421), (&one, 200)] {
        let uri = format!("https://{}/", host.host());
        let request = Request::get(uri).body(empty()).unwrap();
        let got = Got::of(
            soon("an answer", sender.send_request(request))
                .await
                .unwrap(),
        )
        .await;
        assert_eq!(got.status.as_u16(), status);
    }
    assert_eq!(world.requests(&other), 0);
}

#[tokio::test]
async fn trace_and_connect_are_not_for_visitors() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    for line in [format!("TRACE / HTTP/1.1\r\nHost: {host}"), {
        format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443")
    }] {
        let answer = world.raw(&host, format!("{line}\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }
    let mut sender = world.http2(&host).await;
    let request = Request::builder().method(Method::CONNECT);
    let request = request.uri(format!("{host}:443")).body(empty()).unwrap();
    let got = Got::of(
        soon("an answer", sender.send_request(request))
            .await
            .unwrap(),
    )
    .await;
    assert_eq!(got.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(world.requests(&vm), 0);
}

#[tokio::test]
async fn plain_http_leads_to_https_and_answers_no_challenge() {
    let mut world = World::start().await;
    let vm = world.vm();
    let ask = async |http, host: String, path: &str| {
        let mut stream = tokio::net::TcpStream::connect(http).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let reading = tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer);
        soon("the end", reading).await.unwrap();
        answer
    };
    let host = vm.host();
    let answer = ask(world.http, format!("{host}:80"), "/a//b?c=d").await;
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
    assert!(
        answer.contains(&format!("location: https://{host}/a//b?c=d\r\n")),
        "{answer}"
    );
    for (host, path) in [
        (host.clone(), "/.well-known/acme-challenge/x"),
        ("elsewhere.example".into(), "/"),
        (format!("nobody.{DOMAIN}"), "/"),
    ] {
        let answer = ask(world.http, host, path).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }
    let mut serve = serve();
    serve.public_port = 8443;
    let applied = world.edge.apply(&serve).await;
    assert_eq!(
        applied.http_address,
        world.http.to_string(),
        "the same socket"
    );
    let answer = ask(world.http, host.clone(), "/").await;
    assert!(
        answer.contains(&format!("location: https://{host}:8443/\r\n")),
        "{answer}"
    );
    serve.http_address = "127.0.0.2:0".into();
    let applied = world.edge.apply(&serve).await;
    assert!(tokio::net::TcpStream::connect(world.http).await.is_err());
    world.http = applied.http_address.parse().unwrap();
    let answer = ask(world.http, host, "/").await;
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
}

#[tokio::test]
async fn an_address_in_use_or_a_bad_domain_is_reported_and_the_rest_is_served() {
    let world = World::start().await;
    let other = World::start().await;
    let mut serve = serve();
    serve.https_address = other.https.to_string();
    let applied = world.edge.apply(&serve).await;
    assert!(
        applied.message.contains(&other.https.to_string()),
        "{}",
        applied.message
    );
    assert_eq!(
        (applied.https_address.as_str(), applied.http_address),
        ("", world.http.to_string())
    );
    serve.domain = "not a domain".into();
    let applied = world.edge.apply(&serve).await;
    assert!(
        applied.message.contains("not a domain"),
        "{}",
        applied.message
    );
    assert_eq!(
        (applied.https_address, applied.http_address),
        (String::new(), String::new())
    );
}

#[tokio::test]
async fn the_root_certificate_can_be_downloaded_while_something_shown_comes_from_it() {
    let world = World::start().await;
    let ask = async |method: Method, path: &str| {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("host", DOMAIN).body(empty()).unwrap();
        let mut sender = world.http1(DOMAIN).await;
        Got::of(
            soon("an answer", sender.send_request(request))
                .await
                .unwrap(),
        )
        .await
    };
    assert_eq!(
        ask(Method::GET, "/ca.pem").await.status,
        StatusCode::NOT_FOUND
    );
    assert!(
        world
            .get(DOMAIN, &[])
            .await
            .json()
            .get("authority")
            .is_none()
    );
    let der: Vec<u8> = (0..200).collect();
    let with_root = ServeEdge {
        authority: der.clone(),
        ..serve()
    };
    world.edge.apply(&with_root).await;
    let got = ask(Method::GET, "/ca.pem").await;
    assert_eq!(got.headers["content-type"], "application/x-pem-file");
    assert_eq!(got.headers["content-length"], got.body.len().to_string());
    assert!(got.body.starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert!(got.body.lines().all(|line| line.len() <= 64));
    let base64: String = got
        .body
        .lines()
        .filter(|line| !line.starts_with('-'))
        .collect();
    assert_eq!(
        data_encoding::BASE64.decode(base64.as_bytes()).unwrap(),
        der
    );
    let head = ask(Method::HEAD, "/ca.pem").await;
    assert_eq!((head.status, head.body.as_str()), (StatusCode::OK, ""));
    let post = ask(Method::POST, "/ca.pem").await;
    assert_eq!(post.status, StatusCode::METHOD_NOT_ALLOWED);
    let digest = ring::digest::digest(&ring::digest::SHA256, &der);
    let digest = format!("sha256:{}", data_encoding::HEXLOWER.encode(digest.as_ref()));
    let landing = world.get(DOMAIN, &[]).await.json();
    assert_eq!(landing["authority"]["fingerprint"], digest);
    let html = world.get(DOMAIN, &[("accept", "text/html")]).await;
    assert!(html.body.contains(&digest) && html.body.contains("href=\"/ca.pem\""));
}

#[tokio::test]
async fn a_name_of_the_operators_own_leads_to_its_vm_and_port() {
    let mut world = World::start().await;
    let vm = world.vm();
    world.listens(&vm, 8080, hyper_server(tell).await);
    let label = vm.host().split_once('.').unwrap().0.to_owned();
    let (config, root) = certificate_for(&["app.example.com", "none.example.com"]);
    world.edge.set_tls(config);
    world.trust(root);
    let with_custom = ServeEdge {
        custom: vec![CustomDomain {
            name: "app.example.com".into(),
            subdomain: label.parse().unwrap(),
            port: 8080,
        }],
        ..serve()
    };
    world.edge.apply(&with_custom).await;
    let got = world.get("app.example.com", &[]).await;
    assert_eq!(got.status, StatusCode::OK);
    assert!(
        got.body.contains("app.example.com"),
        "Host is kept: {}",
        got.body
    );
    // The VM's token holds there, too.
    world.token(&vm, "secret");
    let got = world.get("app.example.com", &[]).await;
    assert_eq!(got.status, StatusCode::UNAUTHORIZED);
    let other = world.get("none.example.com", &[]).await;
    assert_eq!(other.status, StatusCode::NOT_FOUND);
    // Taken away again.
    world.edge.apply(&serve()).await;
    let got = world.get("app.example.com", &[]).await;
    assert_eq!(got.status, StatusCode::NOT_FOUND);
}
