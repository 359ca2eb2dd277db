//! The `sup` program as a user meets it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Stdio;

use client::protocol::vm::{CreateVm, EndReason, VmInfo, VmPage};
use client::protocol::{self, ErrorBody, ErrorCode, Kind, message};
use common::program::{bare, read_until, told};
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

fn sup(appliance: &Appliance, arguments: &[&str]) -> Command {
    let mut command = bare(appliance.dir.path());
    command
        .env("SUP_ENDPOINT", appliance.unix())
        .env("SUP_TOKEN", TOKEN)
        .args(arguments);
    command
}

async fn run(appliance: &Appliance, arguments: &[&str]) -> (i32, String, String) {
    told(sup(appliance, arguments).output().await.unwrap())
}

async fn scripted() -> Appliance {
    Appliance::start(8, |request| match Kind(request.kind) {
        Kind::OPEN_VM => Reply::Agent,
        Kind::GET_VM => Reply::message(&VmInfo {
            end_reason: EndReason::GuestPanic,
            end_message: "the kernel panicked".into(),
            ..info(VM)
        }),
        Kind::LIST_VMS => Reply::message(&VmPage {
            vms: vec![info(VM)],
            more: false,
        }),
        Kind::CREATE_VM => {
            let asked: CreateVm = message::decode_body(&request.body).unwrap();
            if asked.template.is_some_and(|name| name.as_str() == "nope") {
                return Reply::message(
                    &ErrorBody::caller(ErrorCode::TemplateNotFound, "no template `nope`")
                        .with_detail("there is: debian"),
                );
            }
            assert_eq!(asked.memory_mib, Some(2048));
            assert_eq!(asked.labels, [("a".to_owned(), "b=c".to_owned())]);
            if let [first, second] = &asked.egress.rules[..] {
                assert_eq!(first.to.to_string(), "192.0.2.0/24");
                assert_eq!((first.ports, second.to.to_string()), ((80, 80), "*".into()));
                assert!(asked.egress.offline && !asked.publication.autostart);
                assert_eq!(asked.egress.bytes_per_second, 1_000_000);
                let hash = client::url_token_hash("secret");
                assert_eq!(asked.publication.token, Some(hash));
            } else {
                assert_eq!(asked.egress, Default::default());
                assert_eq!(asked.publication, Default::default());
            }
            Reply::message(&info(VM))
        }
        Kind::DELETE_VM => Reply::error(ErrorCode::VmNotFound, "no VM `web`"),
        _ => Reply::message(&info(VM)),
    })
    .await
}

#[tokio::test]
async fn without_configuration_it_says_what_to_set() {
    let home = tempfile::tempdir().unwrap();
    let (code, _, said) = told(bare(home.path()).arg("ls").output().await.unwrap());
    assert_eq!(code, 1);
    assert!(said.contains("sup login"), "{said}");
    assert!(said.contains("SUP_ENDPOINT"), "{said}");
    let mut command = bare(home.path());
    command.env("SUP_ENDPOINT", "unix:/x").args(["ls"]);
    let (_, _, said) = told(command.output().await.unwrap());
    assert!(said.contains("SUP_TOKEN"), "{said}");
    let mut command = bare(home.path());
    command.args(["exec", VM, "--", "true"]);
    assert_eq!(told(command.output().await.unwrap()).0, 255);
}

#[tokio::test]
async fn the_config_file_is_used_and_flags_come_before_it() {
    let appliance = scripted().await;
    let directory = appliance.dir.path().join(".config/supvm");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("ca.pem"), &appliance.ca_pem).unwrap();
    let config = format!(
        "endpoint = \"{}\"\ntoken = \"{TOKEN}\"\nca = \"ca.pem\"\n",
        appliance.tls()
    );
    std::fs::write(directory.join("config.toml"), config).unwrap();
    let mut command = bare(appliance.dir.path());
    let (code, out, said) = told(command.args(["ls", "-q"]).output().await.unwrap());
    assert_eq!((code, out.as_str()), (0, "vm-0000abcd\n"), "{said}");
    let mut command = bare(appliance.dir.path());
    command.args(["ls", "--token", "wrong"]);
    let (code, _, said) = told(command.output().await.unwrap());
    assert_eq!(code, 1);
    assert!(said.contains("SUP_TOKEN"), "{said}");
    std::fs::write(directory.join("config.toml"), "token = 'hidden\n").unwrap();
    let (code, _, said) = told(bare(appliance.dir.path()).arg("ls").output().await.unwrap());
    assert_eq!(code, 1);
    assert!(
        said.contains("config.toml") && !said.contains("hidden"),
        "{said}"
    );
}

#[tokio::test]
async fn create_prints_the_id_and_a_refusal_its_detail() {
    let appliance = scripted().await;
    let good = ["create", "--memory", "2G", "--label", "a=b=c"];
    assert_eq!(
        run(&appliance, &good).await,
        (0, "vm-0000abcd\n".into(), String::new())
    );
    let (code, out, said) = run(&appliance, &["create", "--template", "nope"]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        said,
        "sup: creating a VM: no template `nope`\n  there is: debian\n"
    );
}

#[tokio::test]
async fn lists_come_as_a_table_as_ids_and_as_json() {
    let appliance = scripted().await;
    let (_, table, _) = run(&appliance, &["ls"]).await;
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("ID "), "{table}");
    assert!(lines[1].contains("debian@13.1"), "{table}");
    assert!(lines[1].ends_with("  team=a"), "{table}");
    assert!(!table.contains('\x1b'), "{table:?}");
    let (_, json, _) = run(&appliance, &["ls", "--json"]).await;
    let list: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(list[0]["id"], VM);
    assert_eq!(list[0]["state"], "running");
    let (_, json, _) = run(&appliance, &["inspect", "web"]).await;
    let vm: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(vm["labels"]["team"], "a");
    assert_eq!(vm["endReason"], "guest-panic");
}

#[tokio::test]
async fn rm_tries_every_vm_and_fails_if_one_failed() {
    let appliance = scripted().await;
    let (code, _, said) = run(&appliance, &["rm", "web", "db"]).await;
    assert_eq!(code, 1);
    assert_eq!(said.lines().count(), 2, "{said}");
}

#[tokio::test]
async fn the_commands_exit_code_and_both_outputs_come_through() {
    let appliance = scripted().await;
    let (code, out, said) = run(&appliance, &["exec", VM, "--", "echo", "hi"]).await;
    assert_eq!((code, out.as_str(), said.as_str()), (0, "hi", "to stderr"));
    assert_eq!(
        run(&appliance, &["exec", VM, "--", "exit", "42"]).await.0,
        42
    );
    let (code, _, said) = run(&appliance, &["exec", VM, "--", "missing"]).await;
    assert_eq!((code, said.as_str()), (127, "sup: not found: missing\n"));
    let (code, _, said) = run(&appliance, &["exec", VM, "--", "segfault"]).await;
    assert_eq!(code, 139);
    assert!(said.contains("SIGSEGV"), "{said}");
}

#[tokio::test]
async fn variables_and_the_directory_reach_the_command() {
    let appliance = scripted().await;
    let arguments = ["exec", VM, "--env", "K=v", "--cwd", "/d", "--", "env", "K"];
    assert_eq!(run(&appliance, &arguments).await.1, "v/d");
}

#[tokio::test]
async fn faults_of_appliance_or_vm_exit_255_and_say_why() {
    let appliance = scripted().await;
    let (code, out, said) = run(&appliance, &["exec", VM, "--", "vanish"]).await;
    assert_eq!((code, out.as_str()), (255, "half"));
    assert!(said.contains("guest-panic: the kernel panicked"), "{said}");
    for script in ["giant-frame", "garbage-end", "output-before-start"] {
        let (code, _, said) = run(&appliance, &["exec", VM, "--", script]).await;
        assert_eq!(code, 255, "{script}: {said}");
        assert!(said.starts_with("sup: running a command in"), "{said}");
    }
    let (code, _, said) = run(&appliance, &["exec", VM, "--", "refuse"]).await;
    assert_eq!(code, 255);
    assert!(!said.contains('\x1b'), "{said:?}");
    assert!(said.contains("\n  line one\n  line two\n"), "{said:?}");
    let mut command = sup(&appliance, &["exec", VM, "--", "exit", "0"]);
    command.env("SUP_TOKEN", "wrong");
    assert_eq!(told(command.output().await.unwrap()).0, 255);
}

#[tokio::test]
async fn every_command_that_runs_something_fails_with_255_and_every_other_with_1() {
    let home = tempfile::tempdir().unwrap();
    let commands: [(&[&str], i32); 15] = [
        (&["exec", VM, "true"], 255),
        (&["exec", "-d", VM, "true"], 255),
        (&["shell", VM], 255),
        (&["attach", VM, "ab"], 255),
        (&["create"], 1),
        (&["ls"], 1),
        (&["inspect", VM], 1),
        (&["ps", VM], 1),
        (&["logs", VM, "ab"], 1),
        (&["kill", VM, "ab"], 1),
        (&["url", VM], 1),
        (&["forward", VM, "80"], 1),
        (&["stop", VM], 1),
        (&["start", VM], 1),
        (&["rm", VM], 1),
    ];
    for (arguments, expected) in commands {
        let mut command = bare(home.path());
        command
            .env("SUP_ENDPOINT", "unix:/no/such/socket")
            .env("SUP_TOKEN", TOKEN)
            .args(arguments);
        let (code, _, said) = told(command.output().await.unwrap());
        assert_eq!(code, expected, "{arguments:?}: {said}");
        assert!(said.contains("/no/such/socket"), "{arguments:?}: {said}");
    }
    // A script finds out by itself whether there is an appliance.
    let mut command = bare(home.path());
    let (code, _, said) = told(command.args(["run", "-"]).output().await.unwrap());
    assert_eq!(code, 255, "{said}");
    for arguments in [
        &["exec", VM][..],
        &["exec", "--shell", VM, "two", "words"],
        &["attach", VM, "no-hex"],
        &["kill", VM, "no-hex"],
        &["forward", VM, "0"],
        &["nonsense"],
    ] {
        let appliance = scripted().await;
        let (code, _, said) = run(&appliance, arguments).await;
        assert_eq!(code, 2, "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn standard_input_is_forwarded_to_its_end() {
    let appliance = scripted().await;
    let mut child = sup(&appliance, &["exec", VM, "--", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = vec![b'x'; 200_000];
    let copy = sent.clone();
    let writing = tokio::spawn(async move { stdin.write_all(&copy).await.unwrap() });
    let output = child.wait_with_output().await.unwrap();
    writing.await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == sent);
}

#[tokio::test]
async fn an_open_standard_input_is_not_waited_for() {
    let appliance = scripted().await;
    let mut child = sup(&appliance, &["exec", VM, "--", "exit", "5"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let held = child.stdin.take();
    assert_eq!(child.wait().await.unwrap().code(), Some(5));
    drop(held);
}

#[tokio::test]
async fn ctrl_c_goes_to_the_command() {
    let appliance = scripted().await;
    let mut child = sup(&appliance, &["exec", VM, "--", "until-signal"])
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).await.unwrap();
    assert_eq!(line, "ready\n");
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn the_ca_is_fetched_with_its_hash_apart() {
    let appliance = scripted().await;
    let mut command = bare(appliance.dir.path());
    command.args(["ca-fetch", "--endpoint", &appliance.tls()]);
    let (code, out, said) = told(command.output().await.unwrap());
    assert_eq!(code, 0, "{said}");
    assert!(out.starts_with("-----BEGIN CERTIFICATE-----\n"), "{out}");
    let hash = said.strip_prefix("SHA-256 ").unwrap().trim();
    assert_eq!(hash.len(), 64);
}

#[tokio::test]
async fn a_connection_ends_with_a_goodbye_that_tls_knows() {
    let appliance = scripted().await;
    let (_, pem, chain, key) = certificates();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            chain.into_iter().map(Into::into).collect(),
            rustls::pki_types::PrivateKeyDer::Pkcs8(key.into()),
        )
        .unwrap();
    config.alpn_protocols = vec![protocol::hello::ALPN.to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let ca = appliance.dir.path().join("other-ca.pem");
    std::fs::write(&ca, pem).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!(
        "https://supvm.localhost:{}",
        listener.local_addr().unwrap().port()
    );
    for (arguments, expected) in [
        (&["ls"][..], 0),
        (&["exec", VM, "--", "exit", "5"], 5),
        (&["rm", "vm-00000000"], 1),
    ] {
        let mut command = sup(&appliance, arguments);
        command.env("SUP_ENDPOINT", &endpoint).env("SUP_CA", &ca);
        let child = command.spawn().unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let (mut from, mut to) = tokio::io::split(acceptor.accept(socket).await.unwrap());
        let path = appliance.dir.path().join("api");
        let (mut back, mut forth) = tokio::net::UnixStream::connect(path)
            .await
            .unwrap()
            .into_split();
        let answers = tokio::spawn(async move { tokio::io::copy(&mut back, &mut to).await });
        // Without the goodbye this read fails: the end could be an attacker's.
        tokio::io::copy(&mut from, &mut forth).await.unwrap();
        answers.abort();
        let (code, _, said) = told(child.wait_with_output().await.unwrap());
        assert_eq!(code, expected, "{said}");
    }
}

#[tokio::test]
async fn colours_are_for_terminals_that_are_not_told_otherwise() {
    let appliance = scripted().await;
    for (variable, expected) in [("X", true), ("NO_COLOR", false)] {
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut command = sup(&appliance, &["ls"]);
        command
            .env(variable, "1")
            .env("TERM", "xterm")
            .stdout(Stdio::from(pty.slave.try_clone().unwrap()));
        let mut child = command.spawn().unwrap();
        assert!(child.wait().await.unwrap().success());
        let mut end = std::fs::File::from(pty.slave);
        std::io::Write::write_all(&mut end, b"THE END").unwrap();
        let mut master = tokio::fs::File::from_std(pty.master.into());
        let seen = read_until(&mut master, "THE END").await;
        assert_eq!(seen.contains("\x1b[32mrunning"), expected, "{seen:?}");
    }
}

#[tokio::test]
async fn completions_know_the_commands_of_every_shell() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let mut command = bare(home.path());
        let output = command.args(["completions", shell]).output().await.unwrap();
        let (code, out, said) = told(output);
        assert_eq!((code, said.as_str()), (0, ""));
        assert!(out.contains("forward") && out.contains("cwd"), "{shell}");
    }
}

#[tokio::test]
async fn open_gives_the_address_to_the_browser_and_prints_it_where_there_is_none() {
    let appliance = scripted().await;
    let address = info(VM).url.to_string();
    assert!(address.starts_with("https://"), "{address}");
    let bin = appliance.dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let seen = appliance.dir.path().join("seen");
    let write = |script: &str| {
        let path = bin.join("xdg-open");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
    };
    let open = async |display: &str| {
        let mut command = sup(&appliance, &["open", VM]);
        command.env("DISPLAY", display).env("PATH", &bin);
        told(command.output().await.unwrap())
    };
    write(&format!("echo \"$@\" > {}", seen.display()));
    assert_eq!(open(":0").await, (0, String::new(), String::new()));
    assert_eq!(
        std::fs::read_to_string(&seen).unwrap(),
        format!("{address}\n")
    );
    // Nobody sees it, the opener fails, there is none.
    let printed = (0, format!("{address}\n"), String::new());
    assert_eq!(open("").await, printed);
    write("exit 3");
    assert_eq!(open(":0").await, printed);
    std::fs::remove_file(bin.join("xdg-open")).unwrap();
    assert_eq!(open(":0").await, printed);
}

#[tokio::test]
async fn a_create_says_what_the_vm_may_reach_and_who_may_reach_it() {
    let appliance = scripted().await;
    let line = [
        "create",
        "--memory=2G",
        "--label=a=b=c",
        "--allow=192.0.2.0/24:80/tcp",
        "--deny=*",
        "--offline",
        "--no-autostart",
        "--url-token=secret",
        "--bandwidth=1M",
    ];
    let (code, out, said) = run(&appliance, &line).await;
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(out, format!("{VM}\n"));
    let (code, _, said) = run(&appliance, &["create", "--allow=example.org:0x1"]).await;
    assert_eq!(code, 2);
    assert!(said.contains("`0x1` are no ports"), "{said}");
}
