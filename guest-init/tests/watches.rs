//! Changes as they happen.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::files::refusal;
use common::{Agent, Client, eventually};
use protocol::file::watch::{FileChange, FileEvent, FileEvents, WatchFiles, WatchStarted};
use protocol::{ErrorCode, message};

fn watch(agent: &Agent, path: &str, recursive: bool) -> (Client, u32) {
    let mut client = agent.connect();
    client.send(&WatchFiles {
        path: path.as_bytes().to_vec(),
        recursive,
    });
    let started: WatchStarted = message::decode(&client.frame().unwrap()).unwrap();
    (client, started.watched)
}

/// All changes up to the one that is asked for.
fn until(client: &mut Client, last: impl Fn(&FileEvent) -> bool) -> Vec<FileEvent> {
    let mut seen = Vec::new();
    loop {
        let frame = client.frame().expect("more changes");
        let FileEvents { events } = message::decode(&frame).unwrap();
        seen.extend(events);
        if seen.iter().any(&last) {
            return seen;
        }
    }
}

fn is(change: FileChange, path: &str) -> impl Fn(&FileEvent) -> bool {
    move |event| event.change == change && event.path == path.as_bytes()
}

#[test]
fn every_kind_of_change_is_told_in_order() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    let (mut client, watched) = watch(&agent, "", false);
    assert_eq!(watched, 1);
    fs::write(at("a"), b"x").unwrap();
    fs::rename(at("a"), at("b")).unwrap();
    fs::remove_file(at("b")).unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/unseen"), b"").unwrap();
    fs::write(at("end"), b"").unwrap();
    let seen = until(&mut client, is(FileChange::Created, "end"));
    let told: Vec<_> = seen
        .iter()
        .map(|event| (event.change, std::str::from_utf8(&event.path).unwrap()))
        .collect();
    assert_eq!(
        told[..7],
        [
            (FileChange::Created, "a"),
            (FileChange::Modified, "a"),
            (FileChange::Closed, "a"),
            (FileChange::MovedFrom, "a"),
            (FileChange::MovedTo, "b"),
            (FileChange::Removed, "b"),
            (FileChange::Created, "d"),
        ]
    );
    assert_eq!(seen[3].cookie, seen[4].cookie);
    assert_ne!(seen[3].cookie, 0);
    assert!(seen[6].directory && !seen[0].directory);
    assert!(!told.iter().any(|(_, path)| path.contains("unseen")));
}

#[test]
fn a_recursive_watch_sees_directories_that_come_go_and_move() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    fs::create_dir_all(at("tree/old/deep")).unwrap();
    let (mut client, watched) = watch(&agent, "tree", true);
    assert_eq!(watched, 3);
    fs::write(at("tree/old/deep/file"), b"").unwrap();
    until(&mut client, is(FileChange::Created, "old/deep/file"));
    // What is in a new directory before it can be watched is told as well.
    fs::create_dir_all(at("tree/new/a/b")).unwrap();
    fs::write(at("tree/new/a/b/file"), b"").unwrap();
    until(&mut client, is(FileChange::Created, "new/a/b/file"));
    // Under its new name.
    fs::rename(at("tree/new"), at("tree/moved")).unwrap();
    until(&mut client, is(FileChange::MovedTo, "moved"));
    fs::write(at("tree/moved/a/b/again"), b"").unwrap();
    until(&mut client, is(FileChange::Created, "moved/a/b/again"));
    // What has left the tree is nobody's business.
    fs::rename(at("tree/moved"), at("outside")).unwrap();
    until(&mut client, is(FileChange::MovedFrom, "moved"));
    fs::write(at("outside/a/b/secret"), b"").unwrap();
    fs::write(at("tree/end"), b"").unwrap();
    let seen = until(&mut client, is(FileChange::Created, "end"));
    assert!(!seen.iter().any(|event| event.path.ends_with(b"secret")));
    fs::remove_dir_all(at("tree")).unwrap();
    until(&mut client, is(FileChange::Gone, ""));
}

#[test]
fn a_tree_of_any_size_that_is_moved_in_is_watched_whole() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    fs::create_dir(at("watched")).unwrap();
    let (mut client, _) = watch(&agent, "watched", true);
    for directory in 0..30 {
        let directory = at(&format!("big/{directory}/below"));
        fs::create_dir_all(&directory).unwrap();
        for file in 0..400 {
            fs::write(directory.join(file.to_string()), b"").unwrap();
        }
    }
    fs::rename(at("big"), at("watched/big")).unwrap();
    // More than can be told.
    until(&mut client, is(FileChange::Overflow, ""));
    for directory in 0..30 {
        let mark = format!("big/{directory}/below/mark");
        fs::write(at("watched").join(&mark), b"").unwrap();
        until(&mut client, is(FileChange::Created, &mark));
    }
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}

#[test]
fn a_client_that_does_not_listen_is_told_that_it_missed_something() {
    let agent = Agent::start();
    let (mut client, _) = watch(&agent, "", false);
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    // The kernel's queue, what waits in the agent, and what is on its way.
    for number in 0..limit + 30_000 {
        let path = agent.workspace().join(format!("file-{}", number % 2));
        fs::write(&path, b"").unwrap();
        fs::remove_file(&path).unwrap();
    }
    until(&mut client, is(FileChange::Overflow, ""));
    // It goes on.
    let mark = agent.workspace().join("mark");
    fs::write(&mark, b"").unwrap();
    until(&mut client, is(FileChange::Created, "mark"));
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}

#[test]
fn a_watch_ends_with_its_client_and_a_missing_path_is_named() {
    let agent = Agent::start();
    let before = agent.descriptors();
    let watches: Vec<_> = (0..5).map(|_| watch(&agent, "", true)).collect();
    assert!(agent.descriptors() >= before + 5);
    drop(watches);
    eventually("the watches have ended", || agent.descriptors() <= before);
    let missing = WatchFiles {
        path: b"missing".to_vec(),
        recursive: true,
    };
    assert_eq!(refusal(&agent, &missing).code, ErrorCode::NoSuchFile);
    assert!(Path::new("/proc/sys/fs/inotify").exists());
}

#[test]
fn one_file_can_be_watched() {
    let agent = Agent::start();
    let file = agent.workspace().join("file");
    fs::write(&file, b"x").unwrap();
    let (mut client, watched) = watch(&agent, "file", true);
    assert_eq!(watched, 1);
    fs::write(&file, b"y").unwrap();
    until(&mut client, is(FileChange::Modified, ""));
    fs::remove_file(&file).unwrap();
    until(&mut client, is(FileChange::Gone, ""));
}
