//! Files, uploads, many requests and events: Python's and nginx's servers, curl and h2load.

use std::fmt::Write as _;

use tokio::io::{AsyncBufReadExt, BufReader};

use crate::house::{House, world};

const MIB: usize = 1 << 20;

/// Bytes that are never the same at two places near each other.
fn pattern(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// What `curl -w` is to say of each transfer.
const ABOUT: &str = "%{http_code} %{http_version} %{num_connects}\\n";

async fn nginx(house: &House) -> crate::programs::Program {
    let dir = house.dir().to_str().unwrap();
    std::fs::create_dir_all(house.dir().join("files")).unwrap();
    let mut temporary = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(temporary, "{kind}_temp_path {dir}/tmp-{kind};").unwrap();
    }
    let settings = format!(
        "user root; daemon off; worker_processes 2; pid {dir}/nginx.pid; error_log stderr;\n\
         events {{ worker_connections 1000; }}\n\
         http {{\n{temporary}\
         access_log off; keepalive_requests 100000; client_max_body_size 100m;\n\
         server {{ listen 3000; root {dir}/files; dav_methods PUT; }}\n}}\n"
    );
    let file = house.dir().join("nginx.conf");
    std::fs::write(&file, settings).unwrap();
    let file = file.to_str().unwrap();
    let command = house.inside(&["nginx", "-e", "stderr", "-p", dir, "-c", file]);
    house.serve(3000, command, "nginx").await
}

#[test]
fn pythons_server_hands_out_its_files_and_64_mib_come_whole() {
    world(|house| async move {
        let files = house.dir().join("files");
        std::fs::create_dir(&files).unwrap();
        let big = pattern(64 * MIB);
        std::fs::write(files.join("big"), &big).unwrap();
        std::fs::write(files.join("page.html"), "<p>hello</p>").unwrap();
        let mut command = house.inside(&["python3", "-u", "-m", "http.server", "3000"]);
        command.current_dir(&files);
        let _server = house.serve(3000, command, "python").await;

        let page = House::url("/page.html");
        assert_eq!(house.curl(&[&page]).await, "<p>hello</p>");
        let old = ["--http1.0", "-w", " %{http_code}", &page];
        assert_eq!(house.curl(&old).await, "<p>hello</p> 200");
        let head = house.curl(&["--head", &page]).await;
        assert!(head.starts_with("HTTP/2 200"), "{head}");
        assert!(head.contains("content-length: 12\r\n"), "{head}");
        assert!(head.contains("content-type: text/html\r\n"), "{head}");
        let missing = ["-o", "/dev/null", "-w", "%{http_code}"];
        let status = house
            .curl(&[&missing[..], &[&House::url("/no")]].concat())
            .await;
        assert_eq!(status, "404");
        let listing = house.curl(&["--http1.1", &House::url("/")]).await;
        assert!(listing.contains("page.html"), "{listing}");

        for version in ["--http2", "--http1.1"] {
            house
                .curl(&[version, "-o", "got", &House::url("/big")])
                .await;
            let got = std::fs::read(house.dir().join("got")).unwrap();
            assert!(got == big, "{version}: {} bytes, others", got.len());
        }
        let plain = "http://".to_owned() + &House::name() + "/page.html";
        let redirect = house
            .curl(&[
                "-o",
                "/dev/null",
                "-w",
                "%{http_code} %{redirect_url}",
                &plain,
            ])
            .await;
        assert_eq!(redirect, format!("308 {page}"));
    });
}

#[test]
fn nginx_keeps_connections_gives_ranges_and_takes_32_mib() {
    world(|house| async move {
        let _server = nginx(&house).await;
        let big = pattern(32 * MIB);
        std::fs::write(house.dir().join("upload"), &big).unwrap();
        for (version, number) in [("--http2", "2"), ("--http1.1", "1.1")] {
            let url = House::url(&format!("/upload-{number}"));
            let put = [version, "-T", "upload", "-w", ABOUT, &url];
            assert_eq!(house.curl(&put).await, format!("201 {number} 1\n"));
            let stored = house.dir().join(format!("files/upload-{number}"));
            assert!(std::fs::read(stored).unwrap() == big, "{version}");

            let range = ["-r", "1000-1999", "-D", "head", "-o", "part", &url];
            house.curl(&[&[version], &range[..]].concat()).await;
            let part = std::fs::read(house.dir().join("part")).unwrap();
            assert!(part == big[1000..2000]);
            let head = std::fs::read_to_string(house.dir().join("head")).unwrap();
            assert!(head.contains(&format!("HTTP/{number} 206")), "{head}");
            assert!(head.to_lowercase().contains("bytes 1000-1999/"), "{head}");

            // The second goes over the connection of the first.
            let twice = ["-w", ABOUT, "-r", "0-0", "-o", "1", &url, "-o", "2", &url];
            let about = house.curl(&[&[version], &twice[..]].concat()).await;
            assert_eq!(about, format!("206 {number} 1\n206 {number} 0\n"));
        }
    });
}

#[test]
fn parallel_streams_of_one_connection_come_whole() {
    world(|house| async move {
        let _server = nginx(&house).await;
        let big = pattern(MIB);
        let mut transfers = String::new();
        for number in 0..64_usize {
            let name = format!("files/{number}");
            std::fs::write(house.dir().join(name), &big[number..]).unwrap();
            let url = House::url(&format!("/{number}"));
            writeln!(transfers, "url = {url}\noutput = got-{number}").unwrap();
        }
        std::fs::write(house.dir().join("transfers"), transfers).unwrap();
        let words = ["--http2", "-Z", "--parallel-max", "64", "-w", ABOUT];
        let about = house
            .curl(&[&words[..], &["-K", "transfers"]].concat())
            .await;
        assert_eq!(about.matches("200 2 ").count(), 64, "{about}");
        assert_eq!(about.matches("200 2 1\n").count(), 1, "{about}");
        for number in 0..64 {
            let got = std::fs::read(house.dir().join(format!("got-{number}"))).unwrap();
            assert!(got == big[number..], "{number}: {} bytes", got.len());
        }
    });
}

#[test]
fn thousands_of_requests_on_many_connections_are_all_answered_well() {
    world(|house| async move {
        let _server = nginx(&house).await;
        std::fs::write(house.dir().join("files/small"), pattern(1024)).unwrap();
        let url = House::url("/small");
        for more in [&["-m", "50"][..], &["--h1"]] {
            let mut words = vec!["h2load", "-n", "4000", "-c", "20"];
            words.extend(more);
            words.extend(["--connect-to=127.0.0.1:443", &url]);
            let output = crate::programs::run(house.outside(&words)).await;
            let said = String::from_utf8(output).unwrap();
            let wanted = "4000 total, 4000 started, 4000 done, 4000 succeeded, 0 failed";
            assert!(said.contains(wanted), "{said}");
            assert!(said.contains("4000 2xx, 0 3xx"), "{said}");
        }
    });
}

#[test]
fn an_event_arrives_before_the_next_is_sent() {
    world(|house| async move {
        let command = house.inside(&house.node(&["events.mjs"]).words());
        let _server = house.serve(3000, command, "events").await;
        for version in ["--http2", "--http1.1"] {
            let mut curl = house.curl_command(&["-N", version, &House::url("/events")]);
            let mut curl = curl.stdout(std::process::Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(curl.stdout.take().unwrap()).lines();
            for number in 1..=5 {
                let next = House::url(&format!("/next?{number}"));
                assert_eq!(house.curl(&[&next]).await, "sent");
                let line = lines.next_line().await.unwrap().unwrap();
                assert_eq!(line, format!("data: {number}"));
                assert_eq!(lines.next_line().await.unwrap().unwrap(), "");
            }
            assert_eq!(house.curl(&[&House::url("/end")]).await, "ended");
            assert_eq!(lines.next_line().await.unwrap(), None);
            assert!(curl.wait().await.unwrap().success());
        }
    });
}
