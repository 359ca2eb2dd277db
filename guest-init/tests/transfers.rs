//! The bytes of a file on their way into the VM, and both ways.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use common::files::{
    ask, begin, data, end, noise, read, read_request, refusal, upload_id, write, write_request,
};
use common::{Agent, eventually, shell};
use protocol::file::FileDone;
use protocol::file::transfer::{
    DropUpload, FileHole, FileWritten, QueryUpload, UploadState, WriteEnd, WriteMode,
};
use protocol::{ErrorCode, Kind, message};

/// Names in a directory, hidden ones too.
fn names(agent: &Agent) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(agent.workspace())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn query(path: &str, number: u8) -> QueryUpload {
    QueryUpload {
        path: path.as_bytes().to_vec(),
        upload: upload_id(number),
    }
}

#[test]
fn a_written_file_appears_whole_or_not_at_all() {
    let agent = Agent::start();
    let bytes = noise(700_000);
    let path = agent.workspace().join("new");
    let mut client = begin(&agent, &write_request("new"));
    data(&mut client, &bytes);
    assert!(!path.exists(), "it is there before its end was said");
    let written = end(client).unwrap();
    assert_eq!(written.size, 700_000);
    assert!(fs::read(&path).unwrap() == bytes);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
    // Interrupted between two frames, and inside one.
    for cut in [0, 3] {
        let mut client = begin(&agent, &write_request("new"));
        data(&mut client, b"something else");
        client.socket.write_all(&[9, 0, 0][..cut]).unwrap();
        eventually("the agent has begun", || names(&agent).len() == 2);
        drop(client);
        eventually("nothing is left", || names(&agent) == ["new"]);
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn who_has_the_old_file_open_keeps_it_whole() {
    let agent = Agent::start();
    let path = agent.workspace().join("file");
    fs::write(&path, b"old").unwrap();
    let old = File::open(&path).unwrap();
    write(&agent, &write_request("file"), b"new content").unwrap();
    let mut buffer = [0; 10];
    assert_eq!(old.read_at(&mut buffer, 0).unwrap(), 3);
    assert_eq!(fs::read(&path).unwrap(), b"new content");
}

#[test]
fn the_old_files_mode_and_owner_stay_unless_others_are_asked_for() {
    let agent = Agent::start();
    let path = agent.workspace().join("file");
    fs::write(&path, b"old").unwrap();
    std::os::unix::fs::chown(&path, Some(4711), Some(4712)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
    write(&agent, &write_request("file"), b"new").unwrap();
    let about = fs::metadata(&path).unwrap();
    assert_eq!(
        (about.mode() & 0o7777, about.uid(), about.gid()),
        (0o4750, 4711, 4712)
    );
    let mut request = write_request("file");
    request.permissions = Some(0o600);
    write(&agent, &request, b"new").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    request.permissions = Some(0o20_000);
    assert_eq!(refusal(&agent, &request).code, ErrorCode::InvalidArgument);
}

#[test]
fn parents_are_made_and_directories_are_refused() {
    let agent = Agent::start();
    write(&agent, &write_request("a/b/c"), b"deep").unwrap();
    assert_eq!(fs::read(agent.workspace().join("a/b/c")).unwrap(), b"deep");
    for (path, code) in [
        ("a", ErrorCode::IsADirectory),
        ("new/", ErrorCode::IsADirectory),
        ("", ErrorCode::IsADirectory),
        ("a/b/c/d", ErrorCode::NotADirectory),
        ("..", ErrorCode::IsADirectory),
    ] {
        let error = refusal(&agent, &write_request(path));
        assert_eq!(error.code, code, "{path}: {}", error.message);
    }
    assert_eq!(names(&agent), ["a"]);
}

#[test]
fn a_write_to_a_link_goes_to_what_it_points_to() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    fs::create_dir(at("real")).unwrap();
    symlink("real/file", at("link")).unwrap();
    symlink("link", at("link-to-link")).unwrap();
    symlink("loop", at("loop")).unwrap();
    for words in ["made", "replaced"] {
        write(&agent, &write_request("link-to-link"), words.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(at("real/file")).unwrap(), words);
    }
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    let error = refusal(&agent, &write_request("loop"));
    assert_eq!(error.code, ErrorCode::TooManyLinks);
}

#[test]
fn create_refuses_a_file_that_exists_also_one_that_came_meanwhile() {
    let agent = Agent::start();
    let mut request = write_request("file");
    request.mode = WriteMode::Create;
    let mut client = begin(&agent, &request);
    data(&mut client, b"late");
    fs::write(agent.workspace().join("file"), b"early").unwrap();
    assert_eq!(end(client).unwrap_err().code, ErrorCode::FileExists);
    assert_eq!(refusal(&agent, &request).code, ErrorCode::FileExists);
    assert_eq!(names(&agent), ["file"]);
    assert_eq!(fs::read(agent.workspace().join("file")).unwrap(), b"early");
}

#[test]
fn an_append_adds_to_the_end_and_makes_what_is_missing() {
    let agent = Agent::start();
    let mut request = write_request("log");
    request.mode = WriteMode::Append;
    request.checksum = true;
    for words in ["one ", "two"] {
        let written = write(&agent, &request, words.as_bytes()).unwrap();
        let sum = blake3::hash(words.as_bytes());
        assert_eq!(written.blake3, Some(*sum.as_bytes()), "of what was sent");
    }
    assert_eq!(fs::read(agent.workspace().join("log")).unwrap(), b"one two");
    request.upload = Some(upload_id(1));
    assert_eq!(refusal(&agent, &request).code, ErrorCode::InvalidArgument);
}

#[test]
fn a_wrong_length_or_checksum_is_refused_and_the_old_file_stays() {
    let agent = Agent::start();
    let path = agent.workspace().join("file");
    fs::write(&path, b"old").unwrap();
    let mut request = write_request("file");
    request.size = Some(5);
    let short = write(&agent, &request, b"1234").unwrap_err();
    assert_eq!(short.code, ErrorCode::ContentMismatch);
    let mut client = begin(&agent, &request);
    data(&mut client, b"123456");
    assert_eq!(client.error().code, ErrorCode::ContentMismatch);
    for checksum in [false, true] {
        request.checksum = checksum;
        for (sum, good) in [(blake3::hash(b"12345"), true), (blake3::hash(b"x"), false)] {
            fs::write(&path, b"old").unwrap();
            let mut client = begin(&agent, &request);
            data(&mut client, b"12345");
            client.send(&WriteEnd {
                blake3: Some(*sum.as_bytes()),
            });
            if good {
                let written: FileWritten = message::decode(&client.frame().unwrap()).unwrap();
                assert_eq!(written.blake3, Some(*sum.as_bytes()));
                assert_eq!(fs::read(&path).unwrap(), b"12345");
            } else {
                assert_eq!(client.error().code, ErrorCode::ContentMismatch);
                assert_eq!(fs::read(&path).unwrap(), b"old");
            }
        }
    }
    assert_eq!(names(&agent), ["file"]);
}

#[test]
fn a_broken_upload_goes_on_where_it_stopped() {
    let agent = Agent::start();
    let bytes = noise(2_000_000);
    let mut request = write_request("deep/file");
    request.upload = Some(upload_id(7));
    request.checksum = true;
    request.size = Some(2_000_000);
    assert_eq!(
        refusal(&agent, &query("deep/file", 7)).code,
        ErrorCode::NoSuchFile
    );
    let mut client = begin(&agent, &request);
    data(&mut client, &bytes[..1_300_000]);
    let busy = refusal(&agent, &query("deep/file", 7));
    assert_eq!(busy.code, ErrorCode::FileBusy);
    drop(client);
    let mut state = None;
    eventually("the agent lets it go", || {
        let mut client = agent.connect();
        client.send(&query("deep/file", 7));
        state = message::decode::<UploadState>(&client.frame().unwrap()).ok();
        state.is_some()
    });
    let state = state.unwrap();
    let there = usize::try_from(state.offset).unwrap();
    assert!(there > 1_000_000, "{there} bytes");
    assert_eq!(state.blake3, *blake3::hash(&bytes[..there]).as_bytes());
    assert!(!agent.workspace().join("deep/file").exists());
    // A little of it again, as a client does that is not sure.
    request.offset = state.offset - 1000;
    let written = write(&agent, &request, &bytes[there - 1000..]).unwrap();
    assert_eq!(written.size, 2_000_000);
    assert_eq!(written.blake3, Some(*blake3::hash(&bytes).as_bytes()));
    assert!(fs::read(agent.workspace().join("deep/file")).unwrap() == bytes);
    assert_eq!(
        fs::read_dir(agent.workspace().join("deep"))
            .unwrap()
            .count(),
        1
    );
    assert_eq!(
        refusal(&agent, &query("deep/file", 7)).code,
        ErrorCode::NoSuchUpload
    );
}

#[test]
fn what_is_kept_of_an_upload_outlives_a_request_that_cannot_open_it() {
    let agent = Agent::start();
    let program = fs::read("/bin/sleep").unwrap();
    let mut request = write_request("file");
    request.upload = Some(upload_id(5));
    let mut client = begin(&agent, &request);
    data(&mut client, &program);
    drop(client);
    let kept = || {
        let mut client = agent.connect();
        client.send(&query("file", 5));
        let answer = message::decode::<UploadState>(&client.frame().unwrap());
        answer.ok().map(|state| state.offset)
    };
    let length = program.len() as u64;
    eventually("all of it is there", || kept() == Some(length));
    // A program that runs cannot be opened for writing.
    let hidden = agent.workspace().join(&names(&agent)[0]);
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o755)).unwrap();
    let mut running = Command::new(&hidden).arg("600").spawn().unwrap();
    let refused = refusal(&agent, &query("file", 5));
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(refused.code, ErrorCode::FileBusy);
    assert!(refused.detail.starts_with("ETXTBSY\n"), "{refused:?}");
    eventually("it is there still", || kept() == Some(length));
}

#[test]
fn an_upload_that_goes_on_earlier_drops_what_was_kept_beyond() {
    let agent = Agent::start();
    let mut request = write_request("file");
    request.upload = Some(upload_id(9));
    let mut client = begin(&agent, &request);
    data(&mut client, &noise(5000));
    drop(client);
    request.offset = 100;
    request.checksum = true;
    let mut written = None;
    eventually("the agent lets it go", || {
        let mut client = agent.connect();
        client.send(&request);
        data(&mut client, b"end");
        client.send(&WriteEnd { blake3: None });
        if client.frame().unwrap().kind == Kind::WRITE_STARTED {
            written = message::decode::<FileWritten>(&client.frame().unwrap()).ok();
        }
        written.is_some()
    });
    let content = fs::read(agent.workspace().join("file")).unwrap();
    assert!(content == [&noise(5000)[..100], b"end"].concat());
    let sum = blake3::hash(&content);
    assert_eq!(written.unwrap().blake3, Some(*sum.as_bytes()));
}

#[test]
fn an_upload_cannot_go_on_beyond_what_is_kept_and_can_be_dropped() {
    let agent = Agent::start();
    let mut request = write_request("file");
    request.upload = Some(upload_id(8));
    request.offset = 10;
    assert_eq!(refusal(&agent, &request).code, ErrorCode::NoSuchUpload);
    request.offset = 0;
    let mut client = begin(&agent, &request);
    data(&mut client, b"12345");
    drop(client);
    request.offset = 10;
    eventually("the agent lets it go", || {
        refusal(&agent, &request).code == ErrorCode::NoSuchUpload
    });
    assert_eq!(names(&agent).len(), 1, "what was kept is still kept");
    let other = refusal(&agent, &query("elsewhere/file", 8));
    assert_eq!(other.code, ErrorCode::InvalidArgument);
    let dropped = DropUpload {
        path: b"file".to_vec(),
        upload: upload_id(8),
    };
    ask::<_, FileDone>(&agent, &dropped);
    assert!(names(&agent).is_empty());
    assert_eq!(refusal(&agent, &dropped).code, ErrorCode::NoSuchUpload);
    request.upload = None;
    assert_eq!(refusal(&agent, &request).code, ErrorCode::InvalidArgument);
}

#[test]
fn holes_arrive_as_holes() {
    let agent = Agent::start();
    let mut request = write_request("sparse");
    request.checksum = true;
    let mut client = begin(&agent, &request);
    data(&mut client, b"begin");
    client.send(&FileHole { length: 40 << 20 });
    data(&mut client, b"end");
    client.send(&FileHole { length: 1 << 20 });
    let written = end(client).unwrap();
    let size = 8 + (41 << 20);
    assert_eq!(written.size, size);
    let path = agent.workspace().join("sparse");
    let about = fs::metadata(&path).unwrap();
    assert_eq!(about.len(), size);
    assert!(about.blocks() * 512 < 1 << 20, "{} blocks", about.blocks());
    let content = fs::read(&path).unwrap();
    assert_eq!(written.blake3, Some(*blake3::hash(&content).as_bytes()));
    assert_eq!(&content[5 + (40 << 20)..][..3], b"end");
    for length in [u64::MAX, 1 << 63, i64::MAX as u64] {
        let mut client = begin(&agent, &write_request("huge"));
        client.send(&FileHole { length });
        client.send(&FileHole { length });
        assert_eq!(client.error().code, ErrorCode::FileTooLarge, "{length}");
    }
    assert_eq!(names(&agent), ["sparse"]);
}

#[test]
fn a_hole_without_end_is_not_hashed_for_a_client_that_has_gone() {
    let agent = Agent::start();
    let mut request = write_request("huge");
    request.checksum = true;
    let mut client = begin(&agent, &request);
    client.send(&FileHole { length: 1 << 43 });
    drop(client);
    eventually("nothing is left", || names(&agent).is_empty());
}

#[test]
fn a_frame_that_means_nothing_in_a_write_is_refused() {
    let agent = Agent::start();
    let mut client = begin(&agent, &write_request("file"));
    client.send_raw(Kind::STDIN, b"x");
    assert_eq!(client.error().code, ErrorCode::Unsupported);
    let mut client = begin(&agent, &write_request("file"));
    client.send_raw(Kind::WRITE_END, &[9; 9]);
    assert_eq!(client.error().code, ErrorCode::Malformed);
    eventually("nothing is left", || names(&agent).is_empty());
}

#[test]
fn everything_may_be_sent_without_waiting_for_an_answer() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.send(&write_request("file"));
    data(&mut client, &noise(400_000));
    client.send(&WriteEnd { blake3: None });
    assert_eq!(client.frame().unwrap().kind, Kind::WRITE_STARTED);
    assert_eq!(client.frame().unwrap().kind, Kind::FILE_WRITTEN);
    // And so that a refusal is read by a client that sends it all before it reads.
    let mut client = agent.connect();
    client.send(&write_request("/dev/null"));
    data(&mut client, &noise(3_000_000));
    client.send(&WriteEnd { blake3: None });
    assert_eq!(client.error().code, ErrorCode::NotARegularFile);
}

/// A small file system of its own in the agent's mount namespace.
fn agent_with_small_disk() -> Agent {
    let agent = Agent::start_unconfigured(&["unshare", "--mount"], None);
    agent.configure();
    let mounted = agent.shell(
        "mkdir small && mount -t tmpfs -o size=1m tmpfs small && \
         mkdir sealed && mount -t tmpfs -o size=1m tmpfs sealed && echo 1 > sealed/file && \
         mount -o remount,ro sealed && echo done",
    );
    assert_eq!(mounted.text(), "done\n", "{mounted:?}");
    agent
}

#[test]
fn a_full_disk_is_said_at_once_and_the_old_file_stays() {
    let agent = agent_with_small_disk();
    write(&agent, &write_request("small/file"), b"old").unwrap();
    let mut client = begin(&agent, &write_request("small/file"));
    // Sends on and on: the refusal does not wait for the end.
    let mut writer = common::Client::new(client.socket.try_clone().unwrap());
    let sender = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        protocol::frame::append(&mut bytes, Kind::FILE_DATA, &[1; 65_536]).unwrap();
        while writer.socket.write_all(&bytes).is_ok() {}
    });
    let error = client.error();
    drop(client);
    assert_eq!(error.code, ErrorCode::NoSpace);
    assert!(error.detail.starts_with("ENOSPC\n"), "{}", error.detail);
    assert!(error.message.contains("small/file"), "{}", error.message);
    sender.join().unwrap();
    assert_eq!(agent.shell("cat small/file").text(), "old");
    assert_eq!(
        agent.shell("ls -A small").text(),
        "file\n",
        "the partial is gone"
    );
    // A resumable one stays, to go on when there is room.
    let mut request = write_request("small/file");
    request.upload = Some(upload_id(3));
    let mut client = begin(&agent, &request);
    for _ in 0..64 {
        let mut bytes = Vec::new();
        protocol::frame::append(&mut bytes, Kind::FILE_DATA, &[1; 65_536]).unwrap();
        if client.socket.write_all(&bytes).is_err() {
            break;
        }
    }
    assert_eq!(client.error().code, ErrorCode::NoSpace);
    drop(client);
    eventually("it can be asked for", || {
        let mut client = agent.connect();
        client.send(&query("small/file", 3));
        message::decode::<UploadState>(&client.frame().unwrap())
            .is_ok_and(|state| state.offset > 500_000)
    });
}

#[test]
fn an_append_that_fails_takes_nothing_from_others_and_says_how_much_got_in() {
    let agent = agent_with_small_disk();
    let mut request = write_request("small/log");
    request.mode = WriteMode::Append;
    let mut client = begin(&agent, &request);
    let others = agent.shell("head -c 300000 /dev/zero | tr '\\0' o >> small/log; echo done");
    assert_eq!(others.text(), "done\n");
    let mut bytes = Vec::new();
    protocol::frame::append(&mut bytes, Kind::FILE_DATA, &[b'1'; 65_536]).unwrap();
    for _ in 0..64 {
        if client.socket.write_all(&bytes).is_err() {
            break;
        }
    }
    let error = client.error();
    assert_eq!(error.code, ErrorCode::NoSpace);
    let appended: usize = error
        .detail
        .lines()
        .last()
        .and_then(|line| line.strip_prefix("appended ")?.parse().ok())
        .expect("how much got in");
    assert!(appended > 500_000, "{appended}");
    let count = |byte: char| {
        let line = format!("tr -cd {byte} < small/log | wc -c");
        agent.shell(&line).text().trim().parse::<usize>().unwrap()
    };
    assert_eq!((count('o'), count('1')), (300_000, appended));
}

#[test]
fn a_hole_has_no_place_in_an_append_and_takes_nothing_from_others() {
    let agent = Agent::start();
    let mut request = write_request("log");
    request.mode = WriteMode::Append;
    let mut client = begin(&agent, &request);
    let file = agent.workspace().join("log");
    fs::write(&file, b"of others").unwrap();
    client.send(&FileHole { length: 4 });
    assert_eq!(client.error().code, ErrorCode::InvalidArgument);
    assert_eq!(fs::read(&file).unwrap(), b"of others");
}

#[test]
fn an_append_says_how_long_the_file_is_whoever_else_appended() {
    let agent = Agent::start();
    let mut request = write_request("log");
    request.mode = WriteMode::Append;
    let mut client = begin(&agent, &request);
    fs::write(agent.workspace().join("log"), b"of others").unwrap();
    data(&mut client, b"ours");
    assert_eq!(end(client).unwrap().size, 13);
}

#[test]
fn a_read_only_disk_is_told_from_a_missing_right() {
    let agent = agent_with_small_disk();
    let error = refusal(&agent, &write_request("sealed/file"));
    assert_eq!(error.code, ErrorCode::ReadOnly);
    assert!(error.detail.starts_with("EROFS\n"), "{}", error.detail);
    assert_eq!(read(&agent, &read_request("sealed/file")).bytes, b"1\n");
    let error = refusal(&agent, &write_request("/proc/new"));
    assert!(
        [ErrorCode::PermissionDenied, ErrorCode::NoSuchFile].contains(&error.code),
        "{error:?}"
    );
}

#[test]
fn half_a_gibibyte_goes_both_ways_in_constant_memory() {
    let agent = Agent::start();
    let piece = noise(64 << 10);
    let mut client = begin(&agent, &write_request("big"));
    let mut frame = Vec::new();
    protocol::frame::append(&mut frame, Kind::FILE_DATA, &piece).unwrap();
    for _ in 0..8192 {
        client.socket.write_all(&frame).unwrap();
    }
    assert_eq!(end(client).unwrap().size, 512 << 20);
    let mut client = agent.connect();
    client.send(&read_request("big"));
    assert_eq!(client.frame().unwrap().kind, Kind::READ_STARTED);
    let mut seen = 0;
    loop {
        let frame = client.frame().unwrap();
        if frame.kind != Kind::FILE_DATA {
            assert_eq!(frame.kind, Kind::READ_ENDED);
            break;
        }
        seen += frame.body.len();
    }
    assert_eq!(seen, 512 << 20);
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}

#[test]
fn a_command_and_a_transfer_share_nothing_but_the_agent() {
    let agent = Agent::start();
    let mut half = begin(&agent, &write_request("file"));
    data(&mut half, b"half");
    assert_eq!(agent.run(&shell("echo on")).text(), "on\n");
    let mut file = File::create(agent.workspace().join("other")).unwrap();
    file.seek(SeekFrom::Start(10)).unwrap();
    file.write_all(b"x").unwrap();
    assert_eq!(read(&agent, &read_request("other")).bytes.len(), 11);
    assert_eq!(end(half).unwrap().size, 4);
}
