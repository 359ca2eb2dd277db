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
