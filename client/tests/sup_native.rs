//! The `sup` program against the whole appliance but for the machine: a VM's life from its making to
//! its removal, as a person types it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/native.rs"]
mod native;

use std::path::Path;
use std::process::Command;

use native::{Appliance, TOKEN};

/// Runs `sup`; gives its exit code and what it said.
fn sup(appliance: &Appliance, home: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sup"))
        .env_clear()
        .env("HOME", home)
        .env("SUP_ENDPOINT", appliance.unix())
        .env("SUP_TOKEN", TOKEN)
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (code, text(output.stdout), text(output.stderr))
}

#[test]
fn a_vm_from_its_making_to_its_removal() {
    let appliance = Appliance::shared();
    let home = tempfile::tempdir().unwrap();
    let good = |arguments: &[&str]| {
        let (code, out, said) = sup(&appliance, home.path(), arguments);
        assert_eq!(code, 0, "{arguments:?}: {said}");
        out
    };
    let id = good(&["create", "--name", "one", "--label", "stage=test"]);
    let id = id.trim_end();
    let about =
        || -> serde_json::Value { serde_json::from_str(&good(&["inspect", "one"])).unwrap() };
    assert_eq!(about()["id"], id);
    assert_eq!(about()["state"], "running");
    assert!(good(&["ls"]).contains("one"));
    assert!(good(&["ls", "-q"]).contains(id));
    assert!(good(&["url", "one"]).starts_with("https://"));
    let (code, _, said) = sup(&appliance, home.path(), &["url", "--link", "one"]);
    assert_eq!(code, 1);
    assert!(said.contains("no token"), "{said}");
    good(&["exec", "one", "--", "sh", "-c", "echo kept >file"]);

    good(&["stop", "one"]);
    assert_eq!(about()["state"], "stopped");
    good(&["start", "one"]);
    assert_eq!(about()["state"], "running");
    assert_eq!(good(&["exec", "one", "--", "cat", "file"]), "kept\n");
    // Here a console has what the agent says, of both runs.
    let console = good(&["logs", "one"]);
    let runs = console.matches("event=configured").count();
    assert_eq!(runs, 2, "{console}");

    good(&["rm", "one"]);
    assert!(!good(&["ls", "-q"]).contains(id));
    let (code, _, said) = sup(&appliance, home.path(), &["inspect", "one"]);
    assert_eq!(code, 1);
    assert!(said.contains("one"), "{said}");
}

/// The status of an answer at a VM's address, and what of its header can be shown again.
fn visit(appliance: &Appliance, ca: &Path, url: &str, cookie: &str) -> (String, String) {
    let host = url.split('/').nth(2).unwrap().split(':').next().unwrap();
    let edge = appliance.edge();
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "30", "--include"])
        .arg("--cacert")
        .arg(ca)
        .args(["--connect-to", &format!("{host}::{edge}")])
        .args(["--cookie", cookie, url])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let answer = String::from_utf8(output.stdout).unwrap();
    let status = answer.split(' ').nth(1).unwrap().to_owned();
    let mut lines = answer.lines();
    let cookie = lines.find_map(|line| line.strip_prefix("set-cookie: "));
    let cookie = cookie.and_then(|cookie| cookie.split(';').next());
    (status, cookie.unwrap_or_default().to_owned())
}

#[test]
fn a_link_lets_one_visitor_in_once() {
    let appliance = Appliance::start();
    let home = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ca = runtime.block_on(appliance.ca());
    let good = |arguments: &[&str]| {
        let (code, out, said) = sup(&appliance, home.path(), arguments);
        assert_eq!(code, 0, "{arguments:?}: {said}");
        out.trim_end().to_owned()
    };
    let status = |url: &str, cookie: &str| visit(&appliance, &ca, url, cookie).0;
    good(&["create", "--name", "two", "--url-token", "secret"]);
    let (url, link) = (good(&["url", "two"]), good(&["url", "two", "--link"]));
    assert!(!link.contains("secret"), "{link}");
    assert_eq!(status(&url, ""), "401");
    let (first, cookie) = visit(&appliance, &ca, &link, "");
    assert_eq!(first, "303");
    assert_eq!(status(&link, ""), "403", "a link opens once");
    // Here a VM has no network, which only who was let in is told.
    assert_eq!(status(&url, &cookie), "504");
    // One that was not opened is worth nothing to the proxy that comes after a crash.
    let link = good(&["url", "two", "--link"]);
    let edge = appliance.edge();
    appliance.crash("supvm-proxy");
    // A request of its own waits until the new one serves.
    good(&["url", "two"]);
    assert_ne!(appliance.edge(), edge);
    let (first, _) = visit(&appliance, &ca, &link, "");
    assert_eq!(first, "403");
}
