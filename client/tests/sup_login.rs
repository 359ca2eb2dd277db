//! `sup login`: what it asks, what it believes and what it keeps.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use client::protocol::Kind;
use client::protocol::vm::VmPage;
use common::program::{bare, read_until, told};
use common::real::soon;
use common::*;
use tokio::io::AsyncWriteExt;

async fn appliance() -> Appliance {
    Appliance::start(8, |request| match Kind(request.kind) {
        Kind::LIST_VMS => Reply::message(&VmPage {
            vms: vec![info(VM)],
            more: false,
        }),
        _ => Reply::message(&info(VM)),
    })
    .await
}

/// What `sup ca-fetch` prints; the console shows the same.
async fn fingerprint(appliance: &Appliance) -> String {
    let mut command = bare(appliance.dir.path());
    command.args(["ca-fetch", "--endpoint", &appliance.tls()]);
    let (_, _, said) = told(command.output().await.unwrap());
    said.strip_prefix("SHA-256 ").unwrap().trim().to_owned()
}

async fn login(home: &Path, arguments: &[&str], input: &str) -> (i32, String, String) {
    let mut command = bare(home);
    command.arg("login").args(arguments).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It may not wait for any.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    told(soon(child.wait_with_output()).await.unwrap())
}

fn kept(home: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(home.join(".config/supvm")) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_script_logs_in_with_the_fingerprint_and_commands_need_nothing_more() {
    let appliance = appliance().await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let hash = fingerprint(&appliance).await.to_uppercase();
    let (endpoint, line) = (appliance.tls(), format!("{TOKEN}\n"));
    let (code, out, said) = login(home, &[&endpoint, "--fingerprint", &hash], &line).await;
    assert_eq!((code, out.as_str()), (0, ""), "{said}");
    assert!(
        said.contains("config.toml") && !said.contains(TOKEN),
        "{said}"
    );
    let mode = |path: &str| fs::metadata(home.join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(".config/supvm/config.toml"), 0o600);
    assert_eq!(mode(".config/supvm"), 0o700);
    let (code, out, said) = told(bare(home).args(["ls", "-q"]).output().await.unwrap());
    assert_eq!((code, out.as_str()), (0, "vm-0000abcd\n"), "{said}");
    // Another one takes its place, and nothing of the first is left but the file.
    let (code, _, said) = login(home, &[&appliance.unix()], &line).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(kept(home), ["config.toml"]);
    let (code, _, said) = told(bare(home).args(["ls", "-q"]).output().await.unwrap());
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn a_token_that_was_kept_is_told_to_no_other_appliance() {
    let appliance = appliance().await;
    let home = tempfile::tempdir().unwrap();
    let (code, _, said) = login(home.path(), &[&appliance.unix()], TOKEN).await;
    assert_eq!(code, 0, "{said}");
    let listener = tokio::net::UnixListener::bind(home.path().join("other")).unwrap();
    let other = format!("unix:{}", home.path().join("other").display());
    let mut command = bare(home.path());
    let (code, _, said) = told(
        command
            .args(["ls", "--endpoint", &other])
            .output()
            .await
            .unwrap(),
    );
    assert_eq!(code, 1);
    assert!(said.contains("no token is configured for"), "{said}");
    drop(listener);
}

#[tokio::test]
async fn a_config_file_that_is_a_link_stays_one_and_is_written_behind_it() {
    let appliance = appliance().await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let directory = home.join(".config/supvm");
    fs::create_dir_all(&directory).unwrap();
    fs::create_dir(home.join("dotfiles")).unwrap();
    let link = directory.join("config.toml");
    std::os::unix::fs::symlink("../../dotfiles/sup.toml", &link).unwrap();
    // Where it leads there is nothing at first, and a file the second time.
    for _ in 0..2 {
        let (code, _, said) = login(home, &[&appliance.unix()], TOKEN).await;
        assert_eq!(code, 0, "{said}");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let text = fs::read_to_string(home.join("dotfiles/sup.toml")).unwrap();
        assert!(text.contains(TOKEN), "{text}");
        assert_eq!(fs::read_dir(home.join("dotfiles")).unwrap().count(), 1);
    }
    let (code, _, said) = told(bare(home).args(["ls", "-q"]).output().await.unwrap());
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn what_cannot_be_believed_or_does_not_work_is_not_kept() {
    let appliance = appliance().await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (endpoint, hash) = (appliance.tls(), fingerprint(&appliance).await);
    let other = "0".repeat(64);
    for (arguments, input, words) in [
        (&[&endpoint as &str][..], TOKEN, "--fingerprint"),
        (&[&endpoint, "--fingerprint", &other], TOKEN, "in between"),
        (
            &[&endpoint, "--fingerprint", &hash],
            "wrong\n",
            "nothing was kept",
        ),
        (&[&endpoint, "--fingerprint", &hash], "", "there is none"),
        (&["unix:/no/such/socket"], TOKEN, "nothing was kept"),
    ] {
        let (code, _, said) = login(home, arguments, input).await;
        assert_eq!(code, 1, "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
        assert_eq!(kept(home), [""; 0]);
    }
    assert_eq!(login(home, &["http://x"], TOKEN).await.0, 2);
    assert_eq!(
        login(home, &[&endpoint, "--fingerprint", "00"], TOKEN)
            .await
            .0,
        2
    );
}

#[tokio::test]
async fn at_a_terminal_it_asks_and_shows_no_token() {
    let appliance = appliance().await;
    let hash = fingerprint(&appliance).await;
    for answer in ["y", "n"] {
        let home = tempfile::tempdir().unwrap();
        let pty = nix::pty::openpty(None, None).unwrap();
        let before = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = bare(home.path());
        command.args(["login", &appliance.tls()]);
        let mut child = command.stdin(end()).stderr(end()).spawn().unwrap();
        let mut master = tokio::fs::File::from_std(pty.master.into());
        let seen = read_until(&mut master, "[y/N]").await;
        assert!(seen.contains(&hash), "{seen}");
        master
            .write_all(format!("{answer}\r").as_bytes())
            .await
            .unwrap();
        master.flush().await.unwrap();
        if answer == "n" {
            read_until(&mut master, "nothing was kept").await;
            assert_eq!(soon(child.wait()).await.unwrap().code(), Some(1));
            assert_eq!(kept(home.path()), [""; 0]);
            continue;
        }
        read_until(&mut master, "Token: ").await;
        master
            .write_all(format!("{TOKEN}\r").as_bytes())
            .await
            .unwrap();
        master.flush().await.unwrap();
        let seen = read_until(&mut master, "config.toml").await;
        assert!(!seen.contains(TOKEN), "{seen}");
        assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
        let after = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        assert_eq!(after.local_flags, before.local_flags);
        assert_eq!(kept(home.path()).len(), 2);
    }
}
