//! Directory trees as archives, both ways, with Debian's own tar on the other side.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use common::Agent;
use common::files::{data, noise};
use protocol::file::transfer::{ReadEnded, WriteEnd};
use protocol::file::tree::{PackTree, TreeUnpacked, UnpackTree};
use protocol::{ErrorBody, ErrorCode, Kind, message};

fn pack_request(path: &str) -> PackTree {
    PackTree {
        path: path.as_bytes().to_vec(),
        checksum: true,
        sparse: true,
        special: false,
    }
}

fn pack(agent: &Agent, request: &PackTree) -> Vec<u8> {
    let mut client = agent.connect();
    client.send(request);
    let mut bytes = Vec::new();
    loop {
        let frame = client.frame().expect("a frame before the end");
        if frame.kind == Kind::FILE_DATA {
            bytes.extend_from_slice(&frame.body);
            continue;
        }
        let ended: ReadEnded = message::decode(&frame).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ended.bytes, bytes.len() as u64);
        assert_eq!(ended.blake3, Some(*blake3::hash(&bytes).as_bytes()));
        return bytes;
    }
}

fn unpack_request(path: &str) -> UnpackTree {
    UnpackTree {
        path: path.as_bytes().to_vec(),
        owners: true,
        special: false,
    }
}

fn unpack(agent: &Agent, request: &UnpackTree, bytes: &[u8]) -> Result<TreeUnpacked, ErrorBody> {
    let mut client = agent.connect();
    client.send(request);
    data(&mut client, bytes);
    client.send(&WriteEnd { blake3: None });
    match message::decode(&client.frame().expect("an answer")) {
        Ok(done) => Ok(done),
        Err(message::MessageError::Refused(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// A tree with one of everything.
fn grow(root: &Path) {
    let long = "n".repeat(200);
    let deep = root.join(&long).join(&long);
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("deep"), b"down here").unwrap();
    fs::write(root.join("file"), noise(300_000)).unwrap();
    fs::set_permissions(root.join("file"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(root.join("file"), Some(4711), Some(3_000_000)).unwrap();
    fs::set_permissions(root.join("file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(root.join("file"), root.join("same")).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    symlink(&long, root.join("link")).unwrap();
    symlink(
        "/nowhere/at/all",
        root.join(format!("broken-{}", &long[..150])),
    )
    .unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(30 << 20).unwrap();
    sparse.write_all_at(b"middle", 10 << 20).unwrap();
    fs::create_dir(root.join("closed")).unwrap();
    fs::write(root.join("closed/inside"), b"x").unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    File::open(root.join("file"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o1500)).unwrap();
    File::open(root.join("closed"))
        .unwrap()
        .set_modified(time)
        .unwrap();
}

/// Everything that should survive, one line a name.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let about = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let content = if about.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if about.is_dir() {
                todo.push(path.clone());
                String::new()
            } else {
                blake3::hash(&fs::read(&path).unwrap()).to_string()
            };
            let links = if about.is_dir() { 0 } else { about.nlink() };
            lines.push(format!(
                "{name} {:o} {}:{} {}.{} {links} {content}",
                about.mode(),
                about.uid(),
                about.gid(),
                about.mtime(),
                about.mtime_nsec(),
            ));
        }
    }
    lines.sort();
    lines
}

fn tar(arguments: &[&str], at: &Path, input: Option<&[u8]>) -> Vec<u8> {
    use std::io::Write;
    let mut child = Command::new("tar")
        .args(arguments)
        .current_dir(at)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.unwrap_or_default().to_vec();
    let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(output.status.success(), "tar {arguments:?}");
    output.stdout
}

#[test]
fn a_tree_survives_the_way_out_and_in() {
    let agent = Agent::start();
    let tree = agent.workspace().join("tree");
    fs::create_dir(&tree).unwrap();
    grow(&tree);
    let bytes = pack(&agent, &pack_request("tree"));
    assert!(bytes.len() < 2 << 20, "holes were packed: {}", bytes.len());
    let done = unpack(&agent, &unpack_request("new/copy"), &bytes).unwrap();
    assert_eq!(done.entries, 12);
    let copy = agent.workspace().join("new/copy");
    assert_eq!(describe(&copy), describe(&tree));
    let about = fs::metadata(copy.join("sparse")).unwrap();
    assert!(about.blocks() * 512 < 1 << 20, "holes were filled");
    assert_eq!(
        fs::metadata(copy.join("same")).unwrap().ino(),
        fs::metadata(copy.join("file")).unwrap().ino()
    );
    // Over what is there already.
    unpack(&agent, &unpack_request("new/copy"), &bytes).unwrap();
    assert_eq!(describe(&copy), describe(&tree));
}

#[test]
fn what_is_packed_is_read_by_tar() {
    let agent = Agent::start();
    let tree = agent.workspace().join("tree");
    fs::create_dir(&tree).unwrap();
    grow(&tree);
    for sparse in [true, false] {
        let mut request = pack_request("tree");
        request.sparse = sparse;
        let bytes = pack(&agent, &request);
        let copy = tempfile::tempdir().unwrap();
        tar(&["-xpf", "-", "--numeric-owner"], copy.path(), Some(&bytes));
        assert_eq!(describe(copy.path()), describe(&tree), "sparse: {sparse}");
    }
}

#[test]
fn what_tar_packs_in_any_of_its_formats_is_unpacked() {
    let agent = Agent::start();
    let tree = agent.workspace().join("tree");
    fs::create_dir(&tree).unwrap();
    grow(&tree);
    for format in [
        &["--format=gnu"][..],
        &["--format=pax"],
        &["--format=pax", "-S"],
    ] {
        let mut arguments = vec!["-cf", "-", "--numeric-owner"];
        arguments.extend(format);
        arguments.push(".");
        let bytes = tar(&arguments, &tree, None);
        let name = format.join("");
        unpack(&agent, &unpack_request(&name), &bytes)
            .unwrap_or_else(|error| panic!("{format:?}: {error}"));
        let (mut got, mut wanted) = (describe(&agent.workspace().join(&name)), describe(&tree));
        if format == ["--format=gnu"] {
            // It keeps whole seconds only.
            let whole = |line: &mut String| {
                let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
                words[3] = words[3].split('.').next().unwrap().to_owned();
                *line = words.join(" ");
            };
            got.iter_mut().for_each(whole);
            wanted.iter_mut().for_each(whole);
        }
        assert_eq!(got, wanted, "{format:?}");
    }
}

#[test]
fn one_file_is_a_tree_and_a_missing_one_is_none() {
    let agent = Agent::start();
    fs::write(agent.workspace().join("file"), b"alone").unwrap();
    let bytes = pack(&agent, &pack_request("file"));
    unpack(&agent, &unpack_request("there"), &bytes).unwrap();
    assert_eq!(
        fs::read(agent.workspace().join("there/file")).unwrap(),
        b"alone"
    );
    for (path, code) in [
        ("missing", ErrorCode::NoSuchFile),
        ("/dev/null", ErrorCode::NotARegularFile),
    ] {
        let mut client = agent.connect();
        client.send(&pack_request(path));
        assert_eq!(client.error().code, code, "{path}");
    }
}

#[test]
fn pipes_are_packed_only_when_asked_for_and_never_waited_for() {
    let agent = Agent::start();
    let fifo = agent.workspace().join("tree/fifo");
    fs::create_dir(agent.workspace().join("tree")).unwrap();
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o640)).unwrap();
    let plain = pack(&agent, &pack_request("tree"));
    assert_eq!(
        unpack(&agent, &unpack_request("a"), &plain)
            .unwrap()
            .entries,
        1
    );
    let mut request = pack_request("tree");
    request.special = true;
    let special = pack(&agent, &request);
    let error = unpack(&agent, &unpack_request("b"), &special).unwrap_err();
    assert_eq!(error.code, ErrorCode::BadArchive);
    let mut request = unpack_request("b");
    request.special = true;
    unpack(&agent, &request, &special).unwrap();
    let about = fs::metadata(agent.workspace().join("b/fifo")).unwrap();
    assert_eq!(about.mode(), libc::S_IFIFO | 0o640);
}

#[test]
fn a_damaged_or_short_archive_is_refused_by_name() {
    let agent = Agent::start();
    fs::create_dir(agent.workspace().join("tree")).unwrap();
    fs::write(agent.workspace().join("tree/file"), noise(5000)).unwrap();
    let bytes = pack(&agent, &pack_request("tree"));
    for cut in [0, 100, 512, bytes.len() - 4000, bytes.len() - 1024] {
        let error = unpack(&agent, &unpack_request("x"), &bytes[..cut]).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadArchive, "cut at {cut}");
    }
    let error = unpack(&agent, &unpack_request("x"), &noise(10_000)).unwrap_err();
    assert_eq!(error.code, ErrorCode::BadArchive);
    let error = unpack(&agent, &unpack_request("tree/file"), &bytes).unwrap_err();
    assert_eq!(error.code, ErrorCode::FileExists);
}

#[test]
fn an_archive_of_any_size_costs_little_memory() {
    let agent = Agent::start();
    let tree = agent.workspace().join("tree");
    for number in 0..60 {
        let directory = tree.join(format!("d{number}"));
        fs::create_dir_all(&directory).unwrap();
        for file in 0..50 {
            fs::write(directory.join(format!("f{file}")), [7; 20_000]).unwrap();
        }
    }
    let bytes = pack(&agent, &pack_request("tree"));
    assert_eq!(
        unpack(&agent, &unpack_request("copy"), &bytes)
            .unwrap()
            .entries,
        3061
    );
    assert_eq!(describe(&agent.workspace().join("copy")), describe(&tree));
    let peak = agent.status_kib("VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}
