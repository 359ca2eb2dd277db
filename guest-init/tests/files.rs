//! Files by single requests: looking, listing, making, renaming, removing.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use common::files::{ask, refusal};
use common::{Agent, eventually};
use protocol::file::manage::{
    ChangeMode, ChangeOwner, DirectoryEntry, DirectoryPage, FilesRemoved, LinkTarget,
    MakeDirectory, MakeSymlink, ReadLink, RemoveFile, RenameFile, ResizeFile, StatFile,
    WalkDirectory,
};
use protocol::file::{FileDone, FileInfo, FileType};
use protocol::{ErrorCode, Kind, message};

fn stat(path: &str) -> StatFile {
    StatFile {
        path: path.as_bytes().to_vec(),
        follow: false,
    }
}

fn remove(path: &str, recursive: bool) -> RemoveFile {
    RemoveFile {
        path: path.as_bytes().to_vec(),
        recursive,
    }
}

fn rename(from: &str, to: &str, no_replace: bool) -> RenameFile {
    RenameFile {
        from: from.as_bytes().to_vec(),
        to: to.as_bytes().to_vec(),
        no_replace,
    }
}

/// All entries of a walk, and how many pages they came on.
fn walk(agent: &Agent, path: &str) -> (Vec<DirectoryEntry>, usize) {
    let mut client = agent.connect();
    client.send(&WalkDirectory {
        path: path.as_bytes().to_vec(),
        targets: true,
    });
    let (mut entries, mut pages) = (Vec::new(), 0);
    loop {
        let frame = client.frame().expect("an answer");
        if frame.kind == Kind::FILE_DONE {
            assert_eq!(client.frame(), None);
            return (entries, pages);
        }
        let page: DirectoryPage = message::decode(&frame).unwrap();
        assert!(!page.entries.is_empty());
        entries.extend(page.entries);
        pages += 1;
    }
}

#[test]
fn a_large_directory_is_listed_whole_on_one_stream() {
    let agent = Agent::start();
    let large = agent.workspace().join("large");
    fs::create_dir(&large).unwrap();
    assert_eq!(walk(&agent, "large"), (Vec::new(), 0));
    for number in 0..5000 {
        fs::write(large.join(format!("{number:05}")), b"12").unwrap();
    }
    symlink("00001", large.join("link")).unwrap();
    let (mut entries, pages) = walk(&agent, "large");
    assert!(pages > 3, "{pages} pages");
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    assert_eq!(entries.len(), 5001);
    for (number, entry) in entries[..5000].iter().enumerate() {
        assert_eq!(entry.name, format!("{number:05}").as_bytes());
        assert_eq!(entry.info.size, 2);
    }
    assert_eq!(entries[5000].info.target.as_deref(), Some(&b"00001"[..]));
    let missing = WalkDirectory {
        path: b"missing".to_vec(),
        targets: false,
    };
    assert_eq!(refusal(&agent, &missing).code, ErrorCode::NoSuchFile);
}

#[test]
fn a_walk_that_nobody_reads_waits_and_costs_no_memory() {
    let agent = Agent::start();
    let large = agent.workspace().join("large");
    fs::create_dir(&large).unwrap();
    for number in 0..20_000 {
        fs::write(large.join(format!("{number:0>150}")), b"").unwrap();
    }
    let mut stuck: Vec<_> = (0..20)
        .map(|_| {
            let mut client = agent.connect();
            client.send(&WalkDirectory {
                path: b"large".to_vec(),
                targets: false,
            });
            assert_eq!(client.frame().unwrap().kind, Kind::DIRECTORY_PAGE);
            client
        })
        .collect();
    // Whole, they would be more than 60 MiB.
    let used = agent.own_kib();
    assert!(used < 16 << 10, "{used} KiB");
    let mut first = stuck.remove(0);
    while first.frame().unwrap().kind == Kind::DIRECTORY_PAGE {}
}

#[test]
fn a_file_is_looked_at_and_so_is_a_link_or_what_it_points_to() {
    let agent = Agent::start();
    let file = agent.workspace().join("file");
    fs::write(&file, b"12345").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("file", agent.workspace().join("link")).unwrap();
    let real = fs::metadata(&file).unwrap();
    let info: FileInfo = ask(&agent, &stat("file"));
    assert_eq!(info.file_type, FileType::Regular);
    assert_eq!((info.size, info.mode), (5, 0o640));
    assert_eq!((info.mtime_s, info.inode), (real.mtime(), real.ino()));
    assert_eq!(i64::from(info.mtime_ns), real.mtime_nsec());
    let link: FileInfo = ask(&agent, &stat("link"));
    assert_eq!(link.file_type, FileType::Symlink);
    assert_eq!(link.target.as_deref(), Some(&b"file"[..]));
    let mut followed = stat("link");
    followed.follow = true;
    assert_eq!(ask::<_, FileInfo>(&agent, &followed), info);
}

#[test]
fn an_error_has_a_code_the_errno_and_the_path() {
    let agent = Agent::start();
    fs::write(agent.workspace().join("file"), b"").unwrap();
    symlink("loop", agent.workspace().join("loop")).unwrap();
    let long = "x".repeat(300);
    let shown = |name: &str| agent.workspace().join(name).display().to_string();
    for (path, code, errno) in [
        ("missing", ErrorCode::NoSuchFile, "ENOENT"),
        ("file/below", ErrorCode::NotADirectory, "ENOTDIR"),
        (&long, ErrorCode::NameTooLong, "ENAMETOOLONG"),
        ("loop/x", ErrorCode::TooManyLinks, "ELOOP"),
    ] {
        let error = refusal(&agent, &stat(path));
        assert_eq!(error.code, code);
        assert_eq!(error.detail, format!("{errno}\n{}", shown(path)));
        assert!(error.message.contains(&shown(path)), "{}", error.message);
    }
    let zero = refusal(&agent, &stat("a\0b"));
    assert_eq!(zero.code, ErrorCode::InvalidArgument);
}

#[test]
fn names_are_bytes() {
    let agent = Agent::start();
    let name = vec![b'a', 0xff, b'\n'];
    let path = agent
        .workspace()
        .join(PathBuf::from(std::ffi::OsString::from_vec(name.clone())));
    fs::write(path, b"x").unwrap();
    let (entries, _) = walk(&agent, "");
    assert!(entries.len() == 1 && entries[0].name == name);
    let request = StatFile {
        path: name,
        follow: false,
    };
    assert_eq!(ask::<_, FileInfo>(&agent, &request).size, 1);
}

#[test]
fn a_listing_says_what_everything_is_and_where_links_point() {
    let agent = Agent::start();
    fs::create_dir(agent.workspace().join("directory")).unwrap();
    symlink("nowhere", agent.workspace().join("link")).unwrap();
    let (mut entries, _) = walk(&agent, "");
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    let [directory, link] = &entries[..] else {
        panic!("{entries:?}");
    };
    assert_eq!(directory.info.file_type, FileType::Directory);
    assert_eq!(link.info.file_type, FileType::Symlink);
    assert_eq!(link.info.target.as_deref(), Some(&b"nowhere"[..]));
    fs::write(agent.workspace().join("file"), b"").unwrap();
    let file = WalkDirectory {
        path: b"file".to_vec(),
        targets: true,
    };
    assert_eq!(refusal(&agent, &file).code, ErrorCode::NotADirectory);
}

#[test]
fn directories_are_made_with_their_parents_and_exactly_this_mode() {
    let agent = Agent::start();
    let make = |path: &str, mode, parents| MakeDirectory {
        path: path.as_bytes().to_vec(),
        mode,
        parents,
    };
    let one = refusal(&agent, &make("a/b/c", 0o1777, false));
    assert_eq!(one.code, ErrorCode::NoSuchFile);
    ask::<_, FileDone>(&agent, &make("a/b/c", 0o1777, true));
    ask::<_, FileDone>(&agent, &make("a/b/c", 0o700, true));
    let mode = |path: &str| {
        let about = fs::metadata(agent.workspace().join(path)).unwrap();
        about.permissions().mode() & 0o7777
    };
    assert_eq!((mode("a"), mode("a/b/c")), (0o755, 0o1777));
    let again = refusal(&agent, &make("a/b/c", 0o755, false));
    assert_eq!(again.code, ErrorCode::FileExists);
    fs::write(agent.workspace().join("file"), b"").unwrap();
    assert_eq!(
        refusal(&agent, &make("file/x", 0o755, true)).code,
        ErrorCode::NotADirectory
    );
    assert_eq!(
        refusal(&agent, &make("file", 0o755, true)).code,
        ErrorCode::FileExists
    );
    assert_eq!(
        refusal(&agent, &make("x", 0o10755, true)).code,
        ErrorCode::InvalidArgument
    );
}

#[test]
fn a_rename_replaces_unless_told_not_to() {
    let agent = Agent::start();
    fs::write(agent.workspace().join("a"), b"a").unwrap();
    fs::write(agent.workspace().join("b"), b"b").unwrap();
    let taken = refusal(&agent, &rename("a", "b", true));
    assert_eq!(taken.code, ErrorCode::FileExists);
    assert!(taken.detail.ends_with("/b"), "{}", taken.detail);
    ask::<_, FileDone>(&agent, &rename("a", "b", false));
    assert_eq!(fs::read(agent.workspace().join("b")).unwrap(), b"a");
    ask::<_, FileDone>(&agent, &rename("b", "c", true));
    assert!(agent.workspace().join("c").exists());
    assert_eq!(
        refusal(&agent, &rename("b", "c", false)).code,
        ErrorCode::NoSuchFile
    );
}

#[test]
fn links_are_made_and_read() {
    let agent = Agent::start();
    let make = MakeSymlink {
        target: b"../any where".to_vec(),
        path: b"link".to_vec(),
    };
    ask::<_, FileDone>(&agent, &make);
    assert_eq!(refusal(&agent, &make).code, ErrorCode::FileExists);
    let read = |path: &[u8]| ReadLink {
        path: path.to_vec(),
    };
    let link: LinkTarget = ask(&agent, &read(b"link"));
    assert_eq!(link.target, make.target);
    fs::write(agent.workspace().join("file"), b"").unwrap();
    assert_eq!(
        refusal(&agent, &read(b"file")).code,
        ErrorCode::InvalidArgument
    );
}

#[test]
fn modes_owners_and_lengths_are_changed() {
    let agent = Agent::start();
    let file = agent.workspace().join("file");
    fs::write(&file, b"12345").unwrap();
    symlink("file", agent.workspace().join("link")).unwrap();
    let change = ChangeMode {
        path: b"link".to_vec(),
        mode: 0o4711,
    };
    ask::<_, FileDone>(&agent, &change);
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o4711);
    let owner = |user: &str, group: &str, follow| ChangeOwner {
        path: b"link".to_vec(),
        user: user.as_bytes().to_vec(),
        group: group.as_bytes().to_vec(),
        follow,
    };
    ask::<_, FileDone>(&agent, &owner("4711", "", false));
    let link = fs::symlink_metadata(agent.workspace().join("link")).unwrap();
    assert_eq!(
        (link.uid(), link.gid()),
        (4711, fs::metadata(&file).unwrap().gid())
    );
    assert_ne!(fs::metadata(&file).unwrap().uid(), 4711);
    ask::<_, FileDone>(&agent, &owner("daemon", "4712", true));
    let about = fs::metadata(&file).unwrap();
    assert_eq!((about.uid(), about.gid()), (1, 4712));
    let nobody = refusal(&agent, &owner("no-such-user", "", true));
    assert_eq!(nobody.code, ErrorCode::InvalidArgument);
    let resize = |path: &str, length| ResizeFile {
        path: path.as_bytes().to_vec(),
        length,
    };
    ask::<_, FileDone>(&agent, &resize("file", 3));
    assert_eq!(fs::read(&file).unwrap(), b"123");
    ask::<_, FileDone>(&agent, &resize("file", 1 << 40));
    assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 40);
    for (path, length, code) in [
        ("file", u64::MAX, ErrorCode::FileTooLarge),
        ("", 0, ErrorCode::IsADirectory),
        ("missing", 0, ErrorCode::NoSuchFile),
    ] {
        assert_eq!(refusal(&agent, &resize(path, length)).code, code, "{path}");
    }
}

#[test]
fn a_tree_is_removed_only_when_asked_and_never_through_links() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    fs::create_dir_all(at("tree/a/b")).unwrap();
    fs::create_dir(at("outside")).unwrap();
    fs::write(at("outside/precious"), b"").unwrap();
    symlink(at("outside"), at("tree/a/link")).unwrap();
    let full = refusal(&agent, &remove("tree", false));
    assert_eq!(full.code, ErrorCode::DirectoryNotEmpty);
    let removed: FilesRemoved = ask(&agent, &remove("tree", true));
    assert_eq!(removed.count, 4);
    assert!(at("outside/precious").exists() && !at("tree").exists());
    let gone = refusal(&agent, &remove("tree", true));
    assert_eq!(gone.code, ErrorCode::NoSuchFile);
    fs::write(at("file"), b"").unwrap();
    let slash = refusal(&agent, &remove("file/", false));
    assert_eq!(slash.code, ErrorCode::NotADirectory);
    for everything in ["/", "..", "/.", "a/.."] {
        let error = refusal(&agent, &remove(everything, true));
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{everything}");
    }
}

#[test]
fn a_tree_that_changes_while_it_is_removed_leads_nowhere_else() {
    let agent = Agent::start();
    let at = |path: &str| agent.workspace().join(path);
    fs::create_dir(at("outside")).unwrap();
    for number in 0..50 {
        fs::write(at(&format!("outside/precious-{number}")), b"").unwrap();
    }
    let (tree, spare, outside) = (at("tree"), at("spare"), at("outside"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ended = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Directories become links to what is outside, and directories again.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for number in 0..50 {
                    let place = tree.join(format!("d{number}"));
                    let _ = fs::create_dir_all(place.join("x"));
                    let _ = fs::rename(&place, &spare);
                    let _ = symlink(&outside, &place);
                    let _ = fs::remove_file(&place);
                    let _ = fs::rename(&spare, &place);
                }
            }
        });
        for _ in 0..40 {
            let mut client = agent.connect();
            client.send(&remove("tree", true));
            // It may be refused, because it fills again and again.
            let answer = client.frame().expect("an answer");
            assert!([Kind::FILES_REMOVED, Kind::ERROR].contains(&answer.kind));
            ended.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 50);
}

#[test]
fn a_wide_and_deep_tree_is_removed_with_few_descriptors_and_little_memory() {
    let agent = Agent::start();
    let mut place = agent.workspace().join("tree");
    for depth in 0..150 {
        place = place.join(format!("level-{depth}"));
        fs::create_dir_all(&place).unwrap();
        for number in 0..100 {
            fs::write(place.join(format!("file-{number}")), b"").unwrap();
            if number % 10 == 0 {
                fs::create_dir_all(place.join(format!("dir-{number}/x"))).unwrap();
            }
        }
    }
    let before = agent.descriptors();
    let mut client = agent.connect();
    client.send(&remove("tree", true));
    let mut most = 0;
    eventually("the tree is gone", || {
        most = most.max(agent.descriptors());
        !agent.workspace().join("tree").exists()
    });
    let answer: FilesRemoved = message::decode(&client.frame().unwrap()).unwrap();
    assert_eq!(answer.count, 150 * (1 + 100 + 20) + 1);
    assert!(most <= before + 40, "{most} descriptors, {before} before");
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}

#[test]
fn the_end_of_an_operation_waits_for_no_goodbye() {
    let agent = Agent::start();
    let before = agent.descriptors();
    // These clients never end their half, and the agent does not mind.
    let mut clients: Vec<_> = (0..20).map(|_| agent.connect()).collect();
    for client in &mut clients {
        client.send(&stat(""));
        assert_eq!(client.frame().unwrap().kind, Kind::FILE_INFO);
        assert_eq!(client.frame(), None);
    }
    eventually("all streams are free", || agent.descriptors() <= before);
    drop(clients);
}

#[test]
fn nothing_is_done_to_files_before_the_configuration() {
    let agent = Agent::start_unconfigured(&[], None);
    let error = refusal(&agent, &stat(""));
    assert_eq!(error.code, ErrorCode::NotConfigured);
}

#[test]
fn a_malformed_request_is_refused_by_name() {
    let agent = Agent::start();
    for kind in [
        Kind::STAT_FILE,
        Kind::WALK_DIRECTORY,
        Kind::READ_FILE,
        Kind::WRITE_FILE,
        Kind::REMOVE_FILE,
    ] {
        let mut client = agent.connect();
        client.send_raw(kind, &[0xff; 20]);
        assert_eq!(client.error().code, ErrorCode::Malformed);
        assert_eq!(client.frame(), None);
    }
}
