//! Requests and answers on their way through.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Got, World, channel, empty, full, raw_server, read_head, soon, tell};

#[tokio::test]
async fn a_request_reaches_its_port_with_its_host_and_where_it_came_from() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.listens(&vm, 8080, crate::support::hyper_server(tell).await);
    for (host, number) in [
        (vm.host(), 1),
        (vm.at(8080), 2),
        (vm.host().to_uppercase(), 3),
    ] {
        let mut sender = world.http1(&host).await;
        let request = Request::post("/a%20b?c=d&e")
            .header("host", format!("{host}:8443"))
            .header("x-forwarded-for", "203.0.113.9")
            .header("forwarded", "for=203.0.113.9")
            .header("via", "1.0 elsewhere")
            .header("connection", "x-mine")
            .header("x-mine", "1")
            .header("upgrade", "h2c")
            .header("http2-settings", "AAMAAABkAAQAAP__");
        let request = request.body(full("hello")).unwrap();
        let got = Got::of(
            soon("an answer", sender.send_request(request))
                .await
                .unwrap(),
        )
        .await;
        assert_eq!(got.status, StatusCode::OK);
        let expected = format!(
            "POST /a%20b?c=d&e HTTP/1.1\nhost: {host}:8443\ncontent-length: 5\n\
             x-forwarded-for: 127.0.0.1\nx-forwarded-proto: https\n\
             x-forwarded-host: {host}:8443\nvia: 1.1 supvm\n\nhello"
        );
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&got.body), sorted(&expected));
        assert_eq!(world.requests(&vm), number);
    }
}

#[tokio::test]
async fn http2_in_front_is_http1_behind() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let mut sender = world.http2(&vm.host()).await;
    let uri = format!("https://{}/x?y", vm.host());
    let request = Request::put(&uri)
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(full("hello"))
        .unwrap();
    let response = soon("an answer", sender.send_request(request))
        .await
        .unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
    let body = Got::of(response).await.body;
    assert!(body.starts_with("PUT /x?y HTTP/1.1\n"), "{body}");
    for line in [
        format!("host: {}", vm.host()),
        "cookie: a=1; b=2".into(),
        "via: 2.0 supvm".into(),
        "content-length: 5".into(),
    ] {
        assert_eq!(
            body.lines().filter(|found| **found == line).count(),
            1,
            "{line}\n{body}"
        );
    }
    assert!(body.ends_with("\n\nhello"), "{body}");
}

#[tokio::test]
async fn the_fields_of_one_connection_do_not_come_back_either() {
    let world = World::start().await;
    let vm = world.vm();
    let server = raw_server(|mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            let answer = "HTTP/1.1 299 Mine\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\n\
                 Keep-Alive: timeout=5\r\nUpgrade: h2c\r\nX-Kept: 2\r\nSet-Cookie: a=1\r\n\
                 Set-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok";
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    world.listens(&vm, 3000, server.await);
    for _ in 0..2 {
        let got = world.get(&vm.host(), &[]).await;
        assert_eq!((got.status.as_u16(), got.body.as_str()), (299, "ok"));
        for gone in ["connection", "x-mine", "keep-alive", "upgrade"] {
            assert!(!got.headers.contains_key(gone), "{gone}");
        }
        assert_eq!(got.headers["x-kept"], "2");
        assert_eq!(got.headers.get_all("set-cookie").iter().count(), 2);
    }
}

#[tokio::test]
async fn head_has_the_length_and_no_body_and_the_connection_goes_on() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let mut sender = world.http1(&vm.host()).await;
    for method in [Method::HEAD, Method::GET, Method::HEAD, Method::OPTIONS] {
        let request = Request::builder().method(&method).header("host", vm.host());
        let request = request.body(empty()).unwrap();
        let response = soon("an answer", sender.send_request(request))
            .await
            .unwrap();
        let length: usize = response.headers()["content-length"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        let got = Got::of(response).await;
        assert!(length > 0);
        let expected = if method == Method::HEAD { 0 } else { length };
        assert_eq!(got.body.len(), expected);
    }
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let world = World::start().await;
    let vm = world
        .vm_with(|request| async {
            let told = tell(request).await;
            let (sender, body) = channel();
            tokio::spawn(async move {
                let mut body = told.into_body();
                while let Some(Ok(frame)) = http_body_util::BodyExt::frame(&mut body).await {
                    sender.send(frame).await.unwrap();
                }
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static("42"));
                sender.send(Frame::trailers(trailers)).await.unwrap();
            });
            let response = Response::builder().header("trailer", "x-sum");
            response.body(body).unwrap()
        })
        .await;
    for http2 in [false, true] {
        let (sender, body) = channel();
        let request = Request::post(format!("https://{}/", vm.host()))
            .header("te", "trailers")
            .header("trailer", "x-mine");
        let request = if http2 {
            request.body(body).unwrap()
        } else {
            let mut request = request.header("host", vm.host()).body(body).unwrap();
            *request.uri_mut() = "/".parse().unwrap();
            request
        };
        tokio::spawn(async move {
            sender.send(Frame::data(Bytes::from("data"))).await.unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("x-mine", HeaderValue::from_static("7"));
            sender.send(Frame::trailers(trailers)).await.unwrap();
        });
        let response = if http2 {
            world.http2(&vm.host()).await.send_request(request).await
        } else {
            world.http1(&vm.host()).await.send_request(request).await
        };
        let got = Got::of(response.unwrap()).await;
        assert!(
            got.body.ends_with("\n\ndata\ntrailer x-mine: 7"),
            "{}",
            got.body
        );
        assert!(got.body.contains("te: trailers\n"), "{}", got.body);
        assert_eq!(got.trailers.unwrap()["x-sum"], "42");
    }
}

#[tokio::test]
async fn a_body_is_sent_when_the_guest_says_continue_and_not_when_it_refuses() {
    let world = World::with(|limits| limits.expect = crate::support::PATIENCE).await;
    let vm = world.vm();
    let server = raw_server(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            assert!(
                head.to_lowercase().contains("expect: 100-continue\r\n"),
                "{head}"
            );
            if head.starts_with("POST /refused ") {
                let answer = b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno";
                stream.write_all(answer).await.unwrap();
                // Not one byte of the body comes.
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                assert!(rest.is_empty(), "{rest:?}");
                return;
            }
            stream
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                .await
                .unwrap();
            let mut body = [0; 5];
            stream.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"hello");
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
            stream.write_all(answer).await.unwrap();
        }
    });
    world.listens(&vm, 3000, server.await);
    let host = vm.host();
    let head = |path: &str| {
        format!(
            "POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    let mut stream = world.tls(&host, "http/1.1").await;
    stream.write_all(head("taken").as_bytes()).await.unwrap();
    assert_eq!(
        read_head(&mut stream).await.unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    stream.write_all(b"hello").await.unwrap();
    let answer = read_head(&mut stream).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let answer = world.raw(&host, head("refused").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nno"), "{answer}");
}

#[tokio::test]
async fn a_guest_that_knows_no_continue_gets_the_body_after_a_while() {
    let world = World::with(|limits| limits.expect = std::time::Duration::from_millis(10)).await;
    let vm = world.vm();
    let server = raw_server(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let mut body = [0; 5];
        stream.read_exact(&mut body).await.unwrap();
        stream
            .write_all(b"HTTP/1.0 200 OK\r\n\r\nok")
            .await
            .unwrap();
    });
    world.listens(&vm, 3000, server.await);
    let mut stream = world.tls(&vm.host(), "http/1.1").await;
    let head = format!(
        "POST / HTTP/1.1\r\nHost: {}\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
        vm.host()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(
        read_head(&mut stream).await.unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    stream.write_all(b"hello").await.unwrap();
    let answer = read_head(&mut stream).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn grpc_goes_by_http2_to_the_guest_with_its_trailers() {
    let world = World::start().await;
    let vm = world.vm();
    let connections = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&connections);
    let server = raw_server(move |stream| {
        counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        async move {
            let service =
                hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async {
                    assert_eq!(request.version(), Version::HTTP_2);
                    assert_eq!(request.headers()["te"], "trailers");
                    let told = tell(request).await;
                    let (sender, body) = channel();
                    tokio::spawn(async move {
                        let mut body = told.into_body();
                        while let Some(Ok(frame)) = http_body_util::BodyExt::frame(&mut body).await
                        {
                            sender.send(frame).await.unwrap();
                        }
                        let mut trailers = HeaderMap::new();
                        trailers.insert("grpc-status", HeaderValue::from_static("0"));
                        sender.send(Frame::trailers(trailers)).await.unwrap();
                    });
                    Ok::<_, std::convert::Infallible>(Response::new(body))
                });
            let executor = hyper_util::rt::TokioExecutor::new();
            let _ = hyper::server::conn::http2::Builder::new(executor)
                .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                .await;
        }
    });
    world.listens(&vm, 50051, server.await);
    let host = vm.at(50051);
    let mut sender = world.http2(&host).await;
    for _ in 0..3 {
        let request = Request::post(format!("https://{host}/pkg.Service/Call"))
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers")
            .body(full("message"))
            .unwrap();
        let got = Got::of(
            soon("an answer", sender.send_request(request))
                .await
                .unwrap(),
        )
        .await;
        assert!(
            got.body
                .starts_with(&format!("POST http://{host}/pkg.Service/Call "))
        );
        assert!(got.body.ends_with("message"), "{}", got.body);
        assert_eq!(got.trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn curl_and_pythons_server_understand_each_other_through_the_edge() {
    let world = World::start().await;
    let vm = world.vm();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "x".repeat(300_000)).unwrap();
    let mut python = tokio::process::Command::new("python3")
        .args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0"])
        .current_dir(directory.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut output = tokio::io::BufReader::new(python.stdout.take().unwrap());
    let mut line = String::new();
    soon(
        "python",
        tokio::io::AsyncBufReadExt::read_line(&mut output, &mut line),
    )
    .await
    .unwrap();
    let port: u16 = line
        .split_whitespace()
        .nth(5)
        .and_then(|port| port.parse().ok())
        .unwrap_or_else(|| panic!("{line}"));
    world.listens(&vm, 3000, ([127, 0, 0, 1], port).into());
    for version in ["--http1.1", "--http2"] {
        let output = tokio::process::Command::new("curl")
            .args([
                "--insecure",
                "--silent",
                "--show-error",
                version,
                "--connect-to",
            ])
            .arg(format!("::{}", world.https))
            .args([
                "--write-out",
                "%{http_version} %{http_code} %{size_download} ",
            ])
            .args(["--output", "/dev/null"])
            .arg(format!("https://{}/file", vm.host()))
            .args(["--output", "/dev/null"])
            .arg(format!("https://{}/missing", vm.host()))
            .kill_on_drop(true)
            .output();
        let output = soon("curl", output).await.unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let number = if version == "--http2" { "2" } else { "1.1" };
        assert!(
            told.starts_with(&format!("{number} 200 300000 {number} 404 ")),
            "{told}"
        );
    }
}

#[tokio::test]
async fn a_body_of_unknown_length_is_not_lost_by_any_method() {
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    for method in ["GET", "DELETE", "POST"] {
        let message = format!(
            "{method} / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\
             Connection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        );
        let answer = world.raw(&host, message.as_bytes()).await;
        assert!(answer.contains("\nhello"), "{method}: {answer}");
    }
}
