//! `sup` against a real agent: what a person does with processes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use common::program::{interrupt, read_until, run, sup, told};
use common::real::{Machine, soon};
use common::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

#[tokio::test]
async fn a_commands_options_reach_it_and_its_exit_code_comes_back() {
    let machine = Machine::start().await;
    std::fs::create_dir(machine.workspace().join("sub")).unwrap();
    let script = "pwd; echo $K; exit 7";
    let (code, out, said) = run(
        &machine,
        &[
            "exec", "--cwd", "sub", "--env", "K=v w", VM, "--", "sh", "-c", script,
        ],
    )
    .await;
    assert_eq!((code, said.as_str()), (7, ""));
    assert!(out.ends_with("/sub\nv w\n"), "{out}");
    // Without `--`, options after the command are the command's.
    let (code, out, said) = run(&machine, &["exec", VM, "echo", "-u", "x"]).await;
    assert_eq!((code, out.as_str()), (0, "-u x\n"), "{said}");
    let (code, _, said) = run(&machine, &["exec", "-u", "no-such-user", VM, "true"]).await;
    assert!(code == 126 || code == 255, "{code} {said}");
    assert!(said.contains("no-such-user"), "{said}");
}

#[tokio::test]
async fn standard_input_passes_through_unchanged() {
    let machine = Machine::start().await;
    let mut child = sup(&machine, &["exec", VM, "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let copy = sent.clone();
    let writing = tokio::spawn(async move { stdin.write_all(&copy).await.unwrap() });
    let output = soon(child.wait_with_output()).await.unwrap();
    writing.await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == sent);
}

#[tokio::test]
async fn standard_input_that_somebody_made_non_blocking_is_waited_for() {
    let machine = Machine::start().await;
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let child = sup(&machine, &["exec", VM, "cat"])
        .stdin(Stdio::from(OwnedFd::from(ours)))
        .spawn()
        .unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    theirs.write_all(b"late").unwrap();
    drop(theirs);
    let (code, out, err) = told(soon(child.wait_with_output()).await.unwrap());
    assert_eq!((code, out.as_str(), err.as_str()), (0, "late", ""));
}

#[tokio::test]
async fn ctrl_c_reaches_the_command_which_may_answer_it() {
    let machine = Machine::start().await;
    let script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = sup(&machine, &["exec", "--shell", VM, script])
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    soon(out.read_line(&mut line)).await.unwrap();
    interrupt(&child);
    line.clear();
    soon(out.read_to_string(&mut line)).await.unwrap();
    assert_eq!(line, "caught\n");
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(3));
}

#[tokio::test]
async fn a_detached_command_prints_its_id_at_once_and_one_that_cannot_run_says_so() {
    let machine = Machine::start().await;
    let (code, out, said) = run(&machine, &["exec", "-d", VM, "sleep", "1000"]).await;
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(out.trim_end().len(), 32, "{out}");
    let (code, out, said) = run(&machine, &["exec", "-d", VM, "no-such-program"]).await;
    assert_eq!((code, out.as_str()), (127, ""));
    assert!(said.contains("no-such-program"), "{said}");
}

#[tokio::test]
async fn a_terminal_is_the_commands_for_its_time_and_then_as_it_was() {
    let machine = Machine::start().await;
    let size = nix::pty::Winsize {
        ws_row: 33,
        ws_col: 99,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(Some(&size), None).unwrap();
    let before = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let script = "stty size; echo ready; read line; echo got $line; exit 4";
    let mut child = sup(&machine, &["exec", "-t", "--shell", VM, script])
        .stdin(end())
        .stdout(end())
        .spawn()
        .unwrap();
    let mut master = tokio::fs::File::from_std(std::fs::File::from(pty.master));
    let mut seen = read_until(&mut master, "ready").await;
    assert!(seen.contains("33 99"), "{seen}");
    let during = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    assert!(
        !during
            .local_flags
            .contains(nix::sys::termios::LocalFlags::ICANON)
    );
    master.write_all(b"word\r").await.unwrap();
    master.flush().await.unwrap();
    seen = read_until(&mut master, "got word").await;
    assert!(seen.contains("got word"), "{seen}");
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(4));
    let after = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    assert_eq!(after.local_flags, before.local_flags);
    // A signal that ends `sup` gives the terminal back, too.
    let mut child = sup(
        &machine,
        &["exec", "-t", "--shell", VM, "echo up; sleep 1000"],
    )
    .stdin(end())
    .stdout(end())
    .spawn()
    .unwrap();
    read_until(&mut master, "up").await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(143));
    let after = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    assert_eq!(after.local_flags, before.local_flags);
}

#[tokio::test]
async fn a_detached_command_is_listed_read_and_ended_by_the_beginning_of_its_id() {
    let machine = Machine::start().await;
    let script = "echo one; echo two; exec sleep 1000";
    let (_, id, _) = run(&machine, &["exec", "-d", "--shell", VM, script]).await;
    let id = id.trim_end();
    let short = &id[..12];
    assert_eq!(run(&machine, &["ps", "-q", VM]).await.1.trim_end(), id);
    // The output is there soon; nothing says when.
    let mut text = String::new();
    while text != "two\n" {
        text = run(&machine, &["logs", "-n", "1", VM, short]).await.1;
    }
    let (_, all, _) = run(&machine, &["logs", VM, short]).await;
    assert_eq!(all, "one\ntwo\n");
    let (code, _, said) = run(&machine, &["kill", "--grace", "1", VM, short]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(run(&machine, &["ps", "-q", VM]).await.1, "");
    let (_, json, _) = run(&machine, &["ps", "--all", "--json", VM]).await;
    let list: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(list[0]["id"], id);
    assert!(list[0]["exitCode"].is_number(), "{json}");
    let (code, _, said) = run(&machine, &["kill", VM, "ffff"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("sup ps --all"), "{said}");
}

#[tokio::test]
async fn a_forwarded_port_leads_into_the_vm_and_ctrl_c_ends_it() {
    let machine = Machine::start().await;
    // The agent dials loopback, and here that is ours.
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ports = format!("0:{}", server.local_addr().unwrap().port());
    let mut child = sup(&machine, &["forward", VM, &ports]).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut address = String::new();
    soon(out.read_line(&mut address)).await.unwrap();
    let mut near = tokio::net::TcpStream::connect(address.trim_end())
        .await
        .unwrap();
    let (mut far, _) = soon(server.accept()).await.unwrap();
    near.write_all(b"ask").await.unwrap();
    near.shutdown().await.unwrap();
    let mut text = String::new();
    soon(far.read_to_string(&mut text)).await.unwrap();
    far.write_all(b"answer").await.unwrap();
    drop(far);
    soon(near.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "askanswer");
    interrupt(&child);
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn an_attached_process_takes_our_input_and_its_exit_code_is_ours() {
    let machine = Machine::start().await;
    let script = "echo up; while read word; do echo got $word; done; exit 5";
    let mut first = sup(&machine, &["exec", "--shell", VM, script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let held = first.stdin.take();
    let mut out = first.stdout.take().unwrap();
    read_until(&mut out, "up\n").await;
    let (_, id, _) = run(&machine, &["ps", "-q", VM]).await;
    let mut second = sup(&machine, &["attach", VM, &id.trim_end()[..10]])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = second.stdin.take().unwrap();
    let mut seen = second.stdout.take().unwrap();
    input.write_all(b"word\n").await.unwrap();
    // Both see it; only what came before is the first one's alone.
    read_until(&mut out, "got word\n").await;
    assert_eq!(read_until(&mut seen, "got word\n").await, "got word\n");
    drop(input);
    assert_eq!(soon(second.wait()).await.unwrap().code(), Some(5));
    assert_eq!(soon(first.wait()).await.unwrap().code(), Some(5));
    drop(held);
    let (code, _, said) = run(&machine, &["attach", VM, "ffff"]).await;
    assert_eq!(code, 255);
    assert!(said.contains("sup ps --all"), "{said}");
}

#[tokio::test]
async fn a_terminal_that_was_lost_is_joined_again_and_left_with_ctrl_bracket() {
    let machine = Machine::start().await;
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut master = tokio::fs::File::from_std(pty.master.into());
    let script = "echo up; while read word; do echo got $word; done";
    let mut child = sup(&machine, &["exec", "-t", "--shell", VM, script])
        .stdin(end())
        .stdout(end())
        .spawn()
        .unwrap();
    read_until(&mut master, "up").await;
    child.kill().await.unwrap();
    let (_, id, _) = run(&machine, &["ps", "-q", VM]).await;
    let mut child = sup(&machine, &["attach", VM, id.trim_end()])
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    master.write_all(b"again\r").await.unwrap();
    master.flush().await.unwrap();
    read_until(&mut master, "got again").await;
    master.write_all(b"\x1d").await.unwrap();
    master.flush().await.unwrap();
    read_until(&mut master, "the process goes on").await;
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
    assert_eq!(run(&machine, &["ps", "-q", VM]).await.1, id);
}

#[tokio::test]
async fn a_process_that_takes_no_keys_can_be_left_all_the_same() {
    let machine = Machine::start().await;
    let script = "stty raw -echo; echo up; exec sleep 1000";
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut typist = std::fs::File::from(pty.master.try_clone().unwrap());
    let mut master = tokio::fs::File::from_std(pty.master.into());
    let mut child = sup(&machine, &["exec", "-t", "--shell", VM, script])
        .stdin(end())
        .stdout(end())
        .spawn()
        .unwrap();
    read_until(&mut master, "up").await;
    child.kill().await.unwrap();
    let (_, id, _) = run(&machine, &["ps", "-q", VM]).await;
    let mut child = sup(&machine, &["attach", VM, id.trim_end()])
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    soon(async {
        use nix::sys::termios::{LocalFlags, tcgetattr};
        let is_raw = || {
            !tcgetattr(&pty.slave)
                .unwrap()
                .local_flags
                .contains(LocalFlags::ICANON)
        };
        while !is_raw() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // More than everybody on the way holds. If it is not taken, the thread is left behind.
    let (typed, all) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        for _ in 0..1024 {
            typist.write_all(&[b'x'; 1024]).unwrap();
        }
        typist.write_all(b"\x1d").unwrap();
        let _ = typed.send(());
    });
    soon(all).await.unwrap();
    read_until(&mut master, "the process goes on").await;
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_shell_is_at_a_terminal_and_its_exit_code_comes_back() {
    let machine = Machine::start().await;
    std::fs::create_dir(machine.workspace().join("sub")).unwrap();
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut master = tokio::fs::File::from_std(pty.master.into());
    let mut child = sup(&machine, &["shell", "--cwd", "sub", "--env", "K=value", VM])
        .stdin(end())
        .stdout(end())
        .spawn()
        .unwrap();
    // The echo of the line has none of these.
    let line = "echo $K-$((6*7)); pwd; test -t 0 && echo at-a-\"\"terminal; exit 3\r";
    master.write_all(line.as_bytes()).await.unwrap();
    master.flush().await.unwrap();
    let seen = read_until(&mut master, "at-a-terminal").await;
    assert!(seen.contains("value-42"), "{seen}");
    assert!(seen.contains("/sub\r\n"), "{seen}");
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(3));
}

#[tokio::test]
async fn logs_that_are_followed_come_as_they_are_written_and_end_with_the_process() {
    let machine = Machine::start().await;
    let script = "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two >&2; exit 7";
    let (_, id, _) = run(&machine, &["exec", "-d", "--shell", VM, script]).await;
    let mut child = sup(&machine, &["logs", "-f", VM, id.trim_end()])
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    read_until(&mut out, "one\n").await;
    assert!(child.try_wait().unwrap().is_none());
    std::fs::write(machine.workspace().join("go"), "").unwrap();
    let output = soon(child.wait_with_output()).await.unwrap();
    // Its end is not an error of ours.
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stderr, b"two\n");
    let (_, _, last) = run(&machine, &["logs", "-n", "1", VM, id.trim_end()]).await;
    assert_eq!(last, "two\n");
}

#[tokio::test]
async fn a_signal_is_sent_and_nothing_more() {
    let machine = Machine::start().await;
    let script =
        "trap 'echo caught' USR1; trap 'exit 9' USR2; echo up; while :; do sleep 0.05; done";
    let (_, id, _) = run(&machine, &["exec", "-d", "--shell", VM, script]).await;
    let id = id.trim_end();
    let mut child = sup(&machine, &["logs", "-f", VM, id]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    read_until(&mut out, "up\n").await;
    for signal in ["USR1", "sigusr1", "10"] {
        let (code, _, said) = run(&machine, &["kill", "--signal", signal, VM, id]).await;
        assert_eq!((code, said.as_str()), (0, ""));
        read_until(&mut out, "caught\n").await;
    }
    assert_eq!(run(&machine, &["ps", "-q", VM]).await.1.trim_end(), id);
    run(&machine, &["kill", "-s", "USR2", VM, id]).await;
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
    let (_, json, _) = run(&machine, &["ps", "-a", "--json", VM]).await;
    let list: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(list[0]["exitCode"], 9, "{json}");
    let (code, _, said) = run(&machine, &["kill", "-s", "NONSENSE", VM, id]).await;
    assert_eq!(code, 2);
    assert!(said.contains("SIGTERM"), "{said}");
}

#[tokio::test]
async fn the_address_is_printed_alone_on_its_line() {
    let machine = Machine::start().await;
    let (code, out, said) = run(&machine, &["url", VM]).await;
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(out, format!("{}\n", info(VM).url));
}

#[tokio::test]
async fn a_forwarded_port_where_nobody_listens_is_told_and_the_next_one_is_served() {
    let machine = Machine::start().await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut child = sup(&machine, &["forward", VM, &format!("0:{port}")])
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = child.stderr.take().unwrap();
    let mut address = String::new();
    soon(out.read_line(&mut address)).await.unwrap();
    let connect = async || {
        tokio::net::TcpStream::connect(address.trim_end())
            .await
            .unwrap()
    };
    let mut near = connect().await;
    let words = format!("connecting to port {port}");
    read_until(&mut said, &words).await;
    let _ = soon(near.read_u8()).await.unwrap_err();
    let server = tokio::net::TcpListener::bind(("127.0.0.1", port))
        .await
        .unwrap();
    let _near = connect().await;
    soon(server.accept()).await.unwrap();
    interrupt(&child);
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn a_network_is_shown_after_the_changes_that_were_asked_for() {
    let machine = Machine::start().await;
    let (code, out, said) = run(&machine, &["network", VM]).await;
    assert_eq!((code, said.as_str()), (0, ""));
    for line in ["online       yes\n", "url token    no\n", " 4711 bytes"] {
        assert!(out.contains(line), "{out}");
    }
    let first = ["network", VM, "--deny", "10.0.0.0/8", "--offline"];
    let (code, out, said) = run(&machine, &first).await;
    assert_eq!((code, said.as_str()), (0, ""));
    assert!(out.contains("online       no\n"), "{out}");
    // What is not said stays; what is new comes first.
    let second = [
        "network",
        "--json",
        VM,
        "--allow",
        "10.1.0.0/16:443/tcp",
        "--url-token",
        "secret",
        "--no-autostart",
    ];
    let (_, json, said) = run(&machine, &second).await;
    let shown: serde_json::Value = serde_json::from_str(&json).expect(&said);
    assert_eq!(shown["offline"], true, "{json}");
    assert_eq!(shown["autostart"], false, "{json}");
    assert_eq!(shown["urlToken"], true, "{json}");
    assert_eq!(shown["rules"][0]["rule"], "10.1.0.0/16:443/tcp", "{json}");
    assert_eq!(shown["rules"][0]["action"], "allow", "{json}");
    assert_eq!(shown["rules"][1]["rule"], "10.0.0.0/8", "{json}");
    assert_eq!(shown["counters"]["bytesOut"], 4711, "{json}");
    assert!(!json.contains("secret"), "{json}");
    let (code, _, said) = run(&machine, &["network", VM, "--allow", "10.0.0.1/8"]).await;
    assert_eq!(code, 2);
    assert!(said.contains("the network is 10.0.0.0/8"), "{said}");
}

/// The lines of docs/sup.md that are marked to be run.
fn examples() -> String {
    let page = include_str!("../../docs/sup.md");
    let blocks = page.split("```sh\n").skip(1);
    blocks
        .filter_map(|block| block.split("```").next())
        .collect()
}

#[tokio::test]
async fn the_examples_of_the_documentation_do_what_they_say() {
    let machine = Machine::start().await;
    let here = tempfile::tempdir().unwrap();
    let bin = std::path::Path::new(env!("CARGO_BIN_EXE_sup"))
        .parent()
        .unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut shell = tokio::process::Command::new("sh");
    shell
        .args(["-e", "-c", &examples()])
        .current_dir(here.path())
        .env("HOME", here.path())
        .env("PATH", path)
        .env("SUP_ENDPOINT", machine.endpoint().to_string())
        .env("SUP_TOKEN", TOKEN)
        .stdin(Stdio::null());
    let (code, out, said) = told(soon(shell.output()).await.unwrap());
    assert_eq!((code, said.as_str()), (0, ""), "{out}");
    for text in [
        "hello\n/etc\n",
        "42\n",
        "1\n2\n3\n",
        "sleep 99",
        "\"exitCode\"",
        "\n5\n",
        "allow 192.0.2.0/24:5432/tcp\nrule         allow *.example.org\nrule         deny *\n",
        "bytes/s      10000000\n",
        "\"urlToken\": true",
    ] {
        assert!(out.contains(text), "no {text:?} in {out}");
    }
    let read = |path: &str| std::fs::read_to_string(here.path().join(path)).unwrap();
    assert_eq!(read("back/index.html"), "hello\n");
    assert_eq!(read("back/copy/index.html"), "hello\n");
}
