//! The bytes of a file on their way to a client.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;

use common::files::{noise, read, read_request, refusal, upload_id, write_request};
use common::{Agent, eventually};
use protocol::file::FileType;
use protocol::file::transfer::FileHole;
use protocol::{ErrorCode, Kind, message};

#[test]
fn files_of_any_size_are_read_whole_with_their_size_and_checksum() {
    let agent = Agent::start();
    for size in [0, 1, 65_536, 65_537, 1_000_000] {
        let bytes = noise(size);
        fs::write(agent.workspace().join("file"), &bytes).unwrap();
        let mut request = read_request("file");
        request.checksum = true;
        let got = read(&agent, &request);
        assert!(got.bytes == bytes, "{size}");
        assert_eq!(got.started.total, Some(size as u64));
        assert_eq!(got.started.info.file_type, FileType::Regular);
        assert_eq!(got.ended.bytes, size as u64);
        assert_eq!(got.ended.blake3, Some(*blake3::hash(&bytes).as_bytes()));
    }
    assert_eq!(
        read(&agent, &read_request("file")).ended.blake3,
        None,
        "nobody asked"
    );
}

#[test]
fn a_read_goes_on_where_an_earlier_one_stopped() {
    let agent = Agent::start();
    let bytes = noise(300_000);
    fs::write(agent.workspace().join("file"), &bytes).unwrap();
    let mut request = read_request("file");
    request.offset = 100_000;
    let rest = read(&agent, &request);
    assert_eq!(rest.started.total, Some(200_000));
    assert!(rest.bytes == bytes[100_000..]);
    request.length = Some(70_000);
    assert!(read(&agent, &request).bytes == bytes[100_000..170_000]);
    // With a checksum of what came before, too.
    request.length = Some(70_000);
    request.checksum = true;
    request.before = 99_000;
    let whole = Some(*blake3::hash(&bytes[1000..170_000]).as_bytes());
    let ended = read(&agent, &request).ended;
    assert_eq!((ended.bytes, ended.blake3), (70_000, whole));
    request.before = 100_001;
    assert_eq!(refusal(&agent, &request).code, ErrorCode::InvalidArgument);
    request.before = 0;
    request.length = Some(u64::MAX);
    assert_eq!(refusal(&agent, &request).code, ErrorCode::FileTooLarge);
    request.offset = 300_000;
    request.length = None;
    assert_eq!(read(&agent, &request).started.total, Some(0));
    request.offset = 300_001;
    assert_eq!(refusal(&agent, &request).code, ErrorCode::InvalidArgument);
}

#[test]
fn files_of_the_kernel_are_read_whole_though_they_say_they_are_empty() {
    let agent = Agent::start();
    let got = read(&agent, &read_request("/proc/self/status"));
    assert_eq!(got.started.total, None);
    assert!(got.bytes.starts_with(b"Name:\tguest-init"));
    let got = read(
        &agent,
        &read_request("/sys/kernel/mm/transparent_hugepage/enabled"),
    );
    assert!(got.bytes.ends_with(b"\n") && got.bytes.len() < 100);
}

#[test]
fn pipes_devices_and_directories_are_refused_and_hang_nobody() {
    let agent = Agent::start();
    let fifo = agent.workspace().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(agent.workspace().join("socket")).unwrap();
    for (path, code) in [
        ("fifo", ErrorCode::NotARegularFile),
        ("socket", ErrorCode::NotARegularFile),
        ("/dev/zero", ErrorCode::NotARegularFile),
        ("", ErrorCode::IsADirectory),
        ("missing", ErrorCode::NoSuchFile),
    ] {
        assert_eq!(refusal(&agent, &read_request(path)).code, code, "{path}");
    }
    for path in ["fifo", "socket", "/dev/null", "/tmp"] {
        let mut client = agent.connect();
        client.send(&write_request(path));
        let code = client.error().code;
        assert!(
            [ErrorCode::NotARegularFile, ErrorCode::IsADirectory].contains(&code),
            "{path}: {code:?}"
        );
    }
}

#[test]
fn a_pipe_is_read_when_asked_for_from_its_first_writer_to_its_last() {
    let agent = Agent::start();
    let fifo = agent.workspace().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let before = agent.descriptors();
    let mut request = read_request("fifo");
    request.special = true;
    let mut client = agent.connect();
    client.send(&request);
    assert_eq!(client.frame().unwrap().kind, Kind::READ_STARTED);
    let mut writer = File::options().write(true).open(&fifo).unwrap();
    for word in [&b"one"[..], b"two"] {
        writer.write_all(word).unwrap();
        // It comes before there is more, or an end.
        assert_eq!(client.frame().unwrap().body, word);
    }
    drop(writer);
    assert_eq!(client.frame().unwrap().kind, Kind::READ_ENDED);
    // A client that leaves while nothing comes takes its stream with it.
    let mut waiting = agent.connect();
    waiting.send(&request);
    waiting.frame().unwrap();
    drop((client, waiting));
    eventually("the stream has ended", || agent.descriptors() <= before);
    request.path = b"/dev/zero".to_vec();
    request.length = Some(200_000);
    assert!(read(&agent, &request).bytes == vec![0; 200_000]);
}

#[test]
fn holes_are_sent_as_holes_when_asked_for_and_as_zeros_when_not() {
    let agent = Agent::start();
    let file = File::create(agent.workspace().join("sparse")).unwrap();
    file.set_len(50 << 20).unwrap();
    file.write_all_at(b"middle", 20 << 20).unwrap();
    let mut request = read_request("sparse");
    request.checksum = true;
    request.length = Some(30 << 20);
    let plain = read(&agent, &request);
    request.sparse = true;
    let sparse = read(&agent, &request);
    assert_eq!(plain.holes, 0);
    assert!(sparse.holes > 29 << 20, "{} bytes of holes", sparse.holes);
    assert!(plain.bytes == sparse.bytes && plain.bytes.len() == 30 << 20);
    assert_eq!(plain.ended, sparse.ended);
    assert_eq!(
        plain.ended.blake3,
        Some(*blake3::hash(&plain.bytes).as_bytes())
    );
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_read_ends_early_and_says_so() {
    let agent = Agent::start();
    let path = agent.workspace().join("file");
    File::create(&path).unwrap().set_len(100 << 20).unwrap();
    let mut client = agent.connect();
    client.send(&read_request("file"));
    assert_eq!(client.frame().unwrap().kind, Kind::READ_STARTED);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1000)
        .unwrap();
    let mut seen = 0;
    let ended = loop {
        let frame = client.frame().unwrap();
        if frame.kind != Kind::FILE_DATA {
            break message::decode::<protocol::file::transfer::ReadEnded>(&frame).unwrap();
        }
        seen += frame.body.len() as u64;
    };
    assert!(seen < 100 << 20);
    assert_eq!(ended.bytes, seen);
}

#[test]
fn a_sparse_read_invents_no_zeros_where_the_file_became_shorter() {
    let agent = Agent::start();
    let path = agent.workspace().join("file");
    fs::write(&path, noise(8 << 20)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(100 << 20).unwrap();
    let mut request = read_request("file");
    request.sparse = true;
    let mut client = agent.connect();
    client.send(&request);
    assert_eq!(client.frame().unwrap().kind, Kind::READ_STARTED);
    // The agent is in the middle of the content, which the connection does not hold.
    file.set_len(1000).unwrap();
    let mut seen = 0;
    let ended = loop {
        let frame = client.frame().unwrap();
        match frame.kind {
            Kind::FILE_DATA => seen += frame.body.len() as u64,
            Kind::FILE_HOLE => panic!("{:?}", message::decode::<FileHole>(&frame)),
            _ => break message::decode::<protocol::file::transfer::ReadEnded>(&frame).unwrap(),
        }
    };
    assert!(seen < 8 << 20);
    assert_eq!(ended.bytes, seen);
}

#[test]
fn a_read_that_nobody_takes_costs_one_buffer_and_holds_up_nobody() {
    let agent = Agent::start();
    File::create(agent.workspace().join("big"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let stuck: Vec<_> = (0..20)
        .map(|_| {
            let mut client = agent.connect();
            client.send(&read_request("big"));
            client
        })
        .collect();
    assert_eq!(agent.shell("echo on").text(), "on\n");
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 24 << 10, "{peak} KiB");
    drop(stuck);
}

#[test]
fn every_stream_there_is_and_none_of_them_read_leaves_memory_bounded() {
    let agent = Agent::start();
    File::create(agent.workspace().join("big"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    // All places but a few.
    let stuck: Vec<_> = (0..500)
        .map(|number| {
            let mut client = agent.connect();
            if number % 2 == 0 {
                client.send(&read_request("big"));
            } else {
                let mut request = write_request(&format!("half-{number}"));
                request.upload = Some(upload_id(0));
                request.upload.as_mut().unwrap().0[..8].copy_from_slice(&[number as u8; 8]);
                request.upload.as_mut().unwrap().0[8] = (number >> 8) as u8;
                client.send(&request);
                client.send_raw(Kind::FILE_DATA, &[1; 65_536]);
            }
            client
        })
        .collect();
    assert_eq!(agent.shell("echo on").text(), "on\n");
    eventually("all of them are stuck", || {
        fs::read_dir(agent.workspace()).unwrap().count() > 250
    });
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 80 << 10, "{peak} KiB");
    drop(stuck);
}
