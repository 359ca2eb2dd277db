//! The access log: what it tells of a request, what it must not, and how much of it there is.

use std::io::Write;
use std::sync::{Arc, Mutex};

use tracing_subscriber::fmt::MakeWriter;

use crate::support::World;

/// Lines of this thread, on which the world of a test runs.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn of_requests(&self) -> Vec<String> {
        let all = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let of_requests = all.lines().filter(|line| line.contains("request peer="));
        of_requests.map(str::to_owned).collect()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

fn lines() -> (Lines, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    (lines, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_line_names_the_vm_and_the_path_and_none_of_the_secrets() {
    let (lines, _guard) = lines();
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    world.token(&vm, "secret");
    let host = vm.host();
    let link = world.link(&vm, "secret");
    for request in [
        "GET /a/b?key=hidden HTTP/1.1\r\nX-Supvm-Token: secret",
        &format!("GET /c?{link} HTTP/1.1"),
        "DELETE /d HTTP/1.1\r\nX-Supvm-Token: wrong",
        "GET /\u{1b}[31m HTTP/1.1",
    ] {
        let whole = format!("{request}\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        world.raw(&host, whole.as_bytes()).await;
    }
    let lines = lines.of_requests();
    let [entered, traded, refused, malformed] = lines.try_into().unwrap();
    let own = format!("peer=127.0.0.1 vm=\"{}\" port=3000", world.id(&vm));
    for (line, parts) in [
        (
            &entered,
            [&*own, "method=\"GET\" path=\"/a/b\" ", "status=200 "],
        ),
        (
            &traded,
            ["vm=\"-\"", "method=\"GET\" path=\"/c\" ", "status=303 "],
        ),
        (
            &refused,
            ["vm=\"-\"", "method=\"DELETE\" path=\"/d\" ", "status=403 "],
        ),
        (
            &malformed,
            ["vm=\"-\"", "method=\"-\" path=\"-\" ", "status=400 "],
        ),
    ] {
        for part in parts {
            assert!(line.contains(part), "{part} in {line}");
        }
        for text in [
            "peer=127.0.0.1 ",
            "version=HTTP/1.1",
            "milliseconds=",
            "left_out=0",
        ] {
            assert!(line.contains(text), "{text} in {line}");
        }
        let (subdomain, _) = host.split_once('.').unwrap();
        for secret in [
            subdomain,
            "secret",
            "hidden",
            "wrong",
            "supvm_link",
            "once-",
            "\u{1b}",
        ] {
            assert!(!line.contains(secret), "{secret} in {line}");
        }
    }
}

#[tokio::test]
async fn of_many_requests_few_are_written_and_the_rest_is_counted() {
    let (lines, _guard) = lines();
    let world = World::start().await;
    let vm = world.vm_that_tells().await;
    let host = vm.host();
    let began = std::time::Instant::now();
    for _ in 0..120 {
        world.get(&host, &[]).await;
    }
    // Fifty in each ten seconds.
    let periods = began.elapsed().as_secs() / 10 + 1;
    let written = lines.of_requests().len();
    assert!(written >= 50, "{written}");
    assert!(written as u64 <= 50 * periods, "{written} in {periods}");
    tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    world.get(&host, &[]).await;
    let after = lines.of_requests();
    assert_eq!(after.len(), written + 1);
    let left_out = after.iter().map(|line| {
        let (_, count) = line.split_once("left_out=").unwrap();
        count.parse::<usize>().unwrap()
    });
    assert_eq!(left_out.sum::<usize>(), 120 - written);
}
