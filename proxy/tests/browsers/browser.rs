//! Chromium, as visitors have it.

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::house::{House, world};
use crate::programs;

/// A page in Chromium.
pub(crate) struct Browser {
    lines: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Browser {
    /// Opens an address.
    pub(crate) async fn open(house: &House, url: &str) -> Self {
        let chromium = programs::tool("chromium");
        let words = ["browser.mjs", chromium.to_str().unwrap(), &house.key, url];
        let mut command = house.outside(&house.node(&words).words());
        let errors = std::fs::File::create(house.dir().join("browser.log")).unwrap();
        command.stdout(std::process::Stdio::piped()).stderr(errors);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut browser = Self {
            lines,
            _child: child,
        };
        browser.sees(house, "open").await;
        browser
    }

    /// Waits until the page has had a title.
    pub(crate) async fn sees(&mut self, house: &House, title: &str) {
        self.sees_all(house, &[title]).await;
    }

    /// Waits until the page has had all of these titles or has said them, in any order.
    pub(crate) async fn sees_all(&mut self, house: &House, wanted: &[&str]) {
        let mut missing = wanted.to_vec();
        let mut before = Vec::new();
        let found = tokio::time::timeout(programs::PATIENCE, async {
            while !missing.is_empty()
                && let Some(line) = self.lines.next_line().await.unwrap()
            {
                missing.retain(|wanted| *wanted != line);
                before.push(line);
            }
        });
        let _ = found.await;
        let log = std::fs::read(house.dir().join("browser.log")).unwrap();
        let log = String::from_utf8_lossy(&log);
        assert!(
            missing.is_empty(),
            "no title {missing:?} but {before:?}\n{log}"
        );
    }
}

#[test]
fn a_page_in_chromium_has_its_websocket_its_events_and_its_upload() {
    world(|house| async move {
        let server = house.inside(&house.node(&["page.mjs"]).words());
        let _server = house.serve(3000, server, "page").await;
        let mut browser = Browser::open(&house, &House::url("/")).await;
        for number in 1..=3 {
            browser.sees(&house, &format!("event {number}")).await;
        }
        for number in 1..=3 {
            // By HTTP/2's extended CONNECT, over the page's connection.
            let message = format!("message {number} 2.0 supvm");
            browser.sees(&house, &message).await;
        }
        browser.sees(&house, "closed 4003 seen true").await;
        browser.sees(&house, "uploaded 8388608 by h2").await;
    });
}

#[test]
fn a_page_in_chromium_gets_its_events_again_from_a_vm_that_was_started_anew() {
    world(|mut house| async move {
        let server = house.inside(&house.node(&["again.mjs", "first"]).words());
        let server = house.serve(3000, server, "first").await;
        let mut browser = Browser::open(&house, &House::url("/")).await;
        let begun = ["first events, first answer", "first socket"];
        browser.sees_all(&house, &begun).await;
        let channel = house.stop(server).await;
        browser.sees(&house, "socket closed 1006").await;
        let server = house.inside(&house.node(&["again.mjs", "second"]).words());
        let _server = house.serve(3000, server, "second").await;
        house.attach(channel).await;
        // Its requests have waited for the start, and go over no connection from before.
        browser.sees(&house, "second events, second answer").await;
    });
}
