//! The blocking face, against a real agent behind the real proxy.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Cursor, Read, Write};
use std::time::Duration;

use client::blocking::{Client, Vm};
use client::file::FileWrite;
use client::protocol::file::watch::FileChange;
use client::{ClientError, Command, Output, ReadFrom, Trust};
use common::real::{Machine, PATIENCE};
use common::{TOKEN, VM};

/// Runs `test` on a thread that blocks, while the machine runs on others.
fn with_machine(test: impl FnOnce(&Machine, &Client, Vm) + Send + 'static) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let machine = runtime.block_on(Machine::start());
    let (done, end) = std::sync::mpsc::channel();
    let testing = std::thread::spawn(move || {
        let client = Client::connect(machine.endpoint(), TOKEN.into(), Trust::none()).unwrap();
        let vm = client.vm(VM.parse().unwrap());
        test(&machine, &client, vm);
        let _ = done.send(machine);
    });
    let machine = end.recv_timeout(PATIENCE);
    assert!(machine.is_ok() || testing.is_finished(), "a hang");
    if let Err(panic) = testing.join() {
        std::panic::resume_unwind(panic);
    }
    let _inside = runtime.enter();
    drop(machine);
}

#[test]
fn commands_and_processes_are_iterators() {
    with_machine(|_, client, vm| {
        assert_eq!(client.get(VM.parse().unwrap()).unwrap(), common::info(VM));
        let mut run = vm.exec(Command::argv(["cat"]).stdin_pipe()).unwrap();
        run.input().write(b"hello").unwrap();
        run.input().end().unwrap();
        let said: Vec<_> = run.by_ref().map(Result::unwrap).skip(1).collect();
        assert_eq!(said, [Output::Stdout(b"hello".to_vec())]);
        assert_eq!(run.ended().unwrap().exit_code, 0);
        let process = vm
            .start(Command::shell("echo one; read x").stdin_pipe())
            .unwrap();
        let mut reader = process.follow(ReadFrom::Oldest).unwrap();
        let first = reader.next().unwrap().unwrap();
        assert_eq!(first.output, Output::Stdout(b"one\n".to_vec()));
        assert!(reader.next_within(Duration::from_millis(20)).is_none());
        assert_eq!(process.tail(1).unwrap(), ["one"]);
        process.stdin(b"\n").unwrap();
        assert!(matches!(reader.next_within(PATIENCE), Some(None)));
        assert_eq!(reader.ended().unwrap().exit_code, 0);
        assert_eq!(vm.processes().unwrap().len(), 2);
    });
}

#[test]
fn a_blocking_reader_goes_on_after_a_cut() {
    with_machine(|machine, _, vm| {
        let process = vm
            .start(Command::shell("echo one; read x; echo two").stdin_pipe())
            .unwrap();
        let mut reader = process.follow(ReadFrom::Oldest).unwrap();
        reader.next().unwrap().unwrap();
        machine.cut();
        let error = reader.next().unwrap().unwrap_err();
        assert!(
            matches!(error, ClientError::Lost { safe: true, .. }),
            "{error:?}"
        );
        assert!(reader.next().is_none());
        reader.resume().unwrap();
        process.stdin(b"\n").unwrap();
        let second = reader.next().unwrap().unwrap();
        assert_eq!(
            (second.offset, second.output),
            (4, Output::Stdout(b"two\n".to_vec()))
        );
        assert!(reader.next().is_none());
    });
}

#[test]
fn files_are_readers_and_writers() {
    with_machine(|_, _, vm| {
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        vm.upload(FileWrite::new("a/file").checked(), &bytes[..])
            .unwrap();
        vm.upload_resumable("a/other", Cursor::new(&bytes)).unwrap();
        for path in ["a/file", "a/other"] {
            let mut back = Vec::new();
            let mut file = vm.download(path).unwrap();
            assert_eq!(file.total(), Some(1_000_000));
            file.read_to_end(&mut back).unwrap();
            assert!(back == bytes, "{path}");
        }
        let mut watch = vm.watch("", false).unwrap();
        let mut archive = Vec::new();
        vm.pack("a").unwrap().read_to_end(&mut archive).unwrap();
        assert_eq!(vm.unpack("b", &archive[..]).unwrap().bytes, 2_000_000);
        let change = watch.next().unwrap().unwrap();
        assert_eq!(
            (change.change, &change.path[..]),
            (FileChange::Created, &b"b"[..])
        );
        let mut names: Vec<_> = vm.read_dir("b").map(|entry| entry.unwrap().name).collect();
        names.sort();
        assert_eq!(names, [&b"file"[..], b"other"]);
        // What fails says so through `std::io`, too.
        let mut gone = vm.pack("missing").unwrap();
        let error = ClientError::from(gone.read(&mut [0]).unwrap_err());
        assert_eq!(error.file().unwrap().errno(), Some("ENOENT"));
        let broken = std::fs::File::open("/").unwrap();
        let error = vm.upload("c", broken).unwrap_err();
        assert!(matches!(error, ClientError::Source(_)), "{error:?}");
        let missing = vm.read_dir("missing").next().unwrap().unwrap_err();
        assert_eq!(missing.file().unwrap().errno(), Some("ENOENT"));
    });
}

#[test]
fn a_network_is_seen_and_changed() {
    with_machine(|_, client, vm| {
        let mut egress = vm.network().unwrap().egress;
        assert!(!egress.offline);
        egress.offline = true;
        let changed = vm.set_network(Some(egress.clone()), None).unwrap();
        assert_eq!(changed.egress, egress);
        let seen = client.network(VM.parse().unwrap()).unwrap();
        assert_eq!(seen, changed);
    });
}

#[test]
fn a_port_is_read_and_written() {
    with_machine(|_, _, vm| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut said = Vec::new();
            peer.read_to_end(&mut said).unwrap();
            peer.write_all(&said).unwrap();
        });
        let mut stream = vm.dial(port).unwrap();
        stream.write_all(b"echo").unwrap();
        stream.shutdown().unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).unwrap();
        assert_eq!(back, "echo");
        serving.join().unwrap();
    });
}

#[test]
fn in_async_code_it_is_an_error_and_no_panic() {
    with_machine(|_, client, vm| {
        let client = client.clone();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async move {
            let error = vm.health().unwrap_err();
            assert!(matches!(error, ClientError::Blocking(_)), "{error:?}");
            let error = client.clone().close().unwrap_err();
            assert!(matches!(error, ClientError::Blocking(_)), "{error:?}");
            drop((client, vm));
        });
    });
}
