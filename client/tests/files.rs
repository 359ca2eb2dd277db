//! Files in a VM, against a real agent behind the real proxy.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use client::file::{FileRead, FileWrite, Piece};
use client::protocol::ErrorCode;
use client::protocol::file::FileType;
use client::protocol::file::transfer::UploadId;
use client::protocol::file::watch::FileChange;
use client::{ClientError, Side};
use common::real::{Machine, soon};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeek, AsyncWriteExt, ReadBuf};

/// Bytes that do not repeat soon.
fn noise(length: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(next).collect()
}

fn names(machine: &Machine) -> Vec<String> {
    let entries = fs::read_dir(machine.workspace()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(common::real::PATIENCE, waiting).await;
    assert!(waited.is_ok(), "never: {what}");
}

#[tokio::test]
async fn small_operations_do_what_they_say() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let at = |name: &str| machine.workspace().join(name);
    vm.mkdir_all("a/b").await.unwrap();
    vm.mkdir("a/c", 0o701).await.unwrap();
    assert_eq!(fs::metadata(at("a/c")).unwrap().mode() & 0o7777, 0o701);
    vm.upload("a/file", &b"hello"[..]).await.unwrap();
    vm.symlink("file", "a/link").await.unwrap();
    assert_eq!(vm.read_link("a/link").await.unwrap(), b"file");
    assert_eq!(vm.stat("a/link").await.unwrap().size, 5);
    let link = vm.stat_link("a/link").await.unwrap();
    assert_eq!(
        (link.file_type, link.target),
        (FileType::Symlink, Some(b"file".to_vec()))
    );
    vm.chmod("a/link", 0o640).await.unwrap();
    vm.chown("a/link", "4711", "").await.unwrap();
    vm.chown_link("a/link", "", "4712").await.unwrap();
    let about = fs::metadata(at("a/file")).unwrap();
    assert_eq!(
        (about.mode() & 0o7777, about.uid(), about.gid()),
        (0o640, 4711, 0)
    );
    assert_eq!(fs::symlink_metadata(at("a/link")).unwrap().gid(), 4712);
    vm.truncate("a/file", 3).await.unwrap();
    vm.rename("a/file", "a/moved").await.unwrap();
    let taken = vm.rename_new("a/moved", "a/link").await.unwrap_err();
    assert_eq!(taken.file().unwrap().errno(), Some("EEXIST"));
    assert_eq!(vm.read_to_vec("a/moved", 3).await.unwrap(), b"hel");
    vm.remove("a/link").await.unwrap();
    let full = vm.remove("a").await.unwrap_err();
    assert_eq!(full.code(), Some(ErrorCode::DirectoryNotEmpty));
    assert_eq!(vm.remove_all("a").await.unwrap(), 4);
    assert!(!at("a").exists());
    assert!(vm.health().await.unwrap().memory_bytes > 0);
}

#[tokio::test]
async fn errors_of_files_name_the_errno_and_the_path() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let error = vm.stat("nowhere/file").await.unwrap_err();
    let file = error.file().unwrap();
    assert_eq!(file.errno(), Some("ENOENT"));
    assert!(file.path().unwrap().ends_with("/nowhere/file"), "{file:?}");
    assert_eq!(error.side(), Side::Caller);
    let error = vm.download("missing").await.unwrap_err();
    assert_eq!(error.file().unwrap().code(), ErrorCode::NoSuchFile);
    let error = vm.download("").await.unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("EISDIR"));
    let error = vm.upload("directory/", &b""[..]).await.unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("EISDIR"));
    let error = vm
        .pack("missing")
        .await
        .unwrap()
        .read_u8()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    let error = ClientError::from(error);
    assert_eq!(error.file().unwrap().errno(), Some("ENOENT"));
    let error = vm.watch("missing", true).await.unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("ENOENT"));
    let error = vm.mkdir("a\0b", 0o755).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument));
}

#[tokio::test]
async fn a_directory_of_many_pages_is_listed_once() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let long = "x".repeat(200);
    for number in 0..6000 {
        fs::write(machine.workspace().join(format!("{number:05}{long}")), b"").unwrap();
    }
    let mut listing = vm.read_dir("");
    let mut names = Vec::new();
    while let Some(entry) = soon(listing.next()).await.unwrap() {
        names.push(entry.name);
    }
    assert!(soon(listing.next()).await.unwrap().is_none());
    names.sort();
    let all: Vec<_> = (0..6000)
        .map(|number| format!("{number:05}{long}").into_bytes())
        .collect();
    assert!(names == all);
    let listed = vm.list_dir("", 6000).await.unwrap();
    let listed: Vec<_> = listed.into_iter().map(|entry| entry.name).collect();
    assert!(listed == all, "in order");
    let error = vm.list_dir("", 5999).await.unwrap_err();
    assert!(
        matches!(error, ClientError::TooLong { limit: 5999, .. }),
        "{error:?}"
    );
    let error = vm.list_dir("missing", 1).await.unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("ENOENT"));
}

#[tokio::test]
async fn what_is_uploaded_is_downloaded_again_whatever_its_size() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    for size in [0, 1, 65_535, 65_536, 65_537, 3_000_000] {
        let bytes = noise(size);
        let to = FileWrite::new("deep/file").checked().size(size as u64);
        let written = soon(vm.upload(to, &bytes[..])).await.unwrap();
        assert_eq!(written.size, size as u64);
        assert_eq!(written.blake3, Some(*blake3::hash(&bytes).as_bytes()));
        assert!(fs::read(machine.workspace().join("deep/file")).unwrap() == bytes);
        let mut file = vm
            .download(FileRead::new("deep/file").checked())
            .await
            .unwrap();
        assert_eq!(file.total(), Some(size as u64));
        let mut back = Vec::new();
        soon(file.read_to_end(&mut back)).await.unwrap();
        assert!(back == bytes, "{size}");
        assert_eq!(file.offset(), size as u64);
    }
    let part = FileRead::new("deep/file").offset(2_000_000).length(5);
    assert_eq!(
        vm.read_to_vec(part, 5).await.unwrap(),
        noise(3_000_000)[2_000_000..2_000_005]
    );
    assert!(
        vm.read_to_vec("/proc/self/status", 1 << 20)
            .await
            .unwrap()
            .starts_with(b"Name:")
    );
    for path in ["deep/file", "/proc/self/status"] {
        let error = vm.read_to_vec(path, 4).await.unwrap_err();
        assert!(
            matches!(error, ClientError::TooLong { limit: 4, .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn modes_of_writing_are_kept() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    vm.upload(FileWrite::new("run").permissions(0o750), &b"one "[..])
        .await
        .unwrap();
    vm.upload(FileWrite::new("run").append().checked(), &b"two"[..])
        .await
        .unwrap();
    let path = machine.workspace().join("run");
    assert_eq!(fs::read(&path).unwrap(), b"one two");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o750);
    let error = vm
        .upload(FileWrite::new("run").create_new(), &b"x"[..])
        .await
        .unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("EEXIST"));
    let error = vm
        .upload(FileWrite::new("new").size(7), &b"short"[..])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::ContentMismatch));
    // Refused long before everything could be sent.
    let endless = tokio::io::repeat(7);
    let error = soon(vm.upload(FileWrite::new("new").size(7), endless))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::ContentMismatch));
    let broken = failing_after(&[1; 100_000]);
    let error = soon(vm.upload("new", broken)).await.unwrap_err();
    assert!(matches!(error, ClientError::Source(_)), "{error:?}");
    eventually("nothing is left", || names(&machine) == ["run"]).await;
}

/// Gives this, then fails.
fn failing_after(bytes: &[u8]) -> impl AsyncRead + Unpin {
    struct Fails;
    impl AsyncRead for Fails {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            Poll::Ready(Err(std::io::Error::other("the disk is broken")))
        }
    }
    Cursor::new(bytes.to_vec()).chain(Fails)
}

#[tokio::test]
async fn holes_travel_both_ways_as_holes() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let mut bytes = vec![0; 20 << 20];
    bytes[10 << 20..(10 << 20) + 6].copy_from_slice(b"middle");
    let to = FileWrite::new("sparse").sparse().checked();
    soon(vm.upload(to, &bytes[..])).await.unwrap();
    let path = machine.workspace().join("sparse");
    assert!(fs::read(&path).unwrap() == bytes);
    let about = fs::metadata(&path).unwrap();
    assert!(about.blocks() * 512 < 1 << 20, "{} blocks", about.blocks());
    let mut file = vm
        .download(FileRead::new("sparse").sparse().checked())
        .await
        .unwrap();
    let (mut holes, mut data) = (0, Vec::new());
    while let Some(piece) = soon(file.next_piece()).await.unwrap() {
        match piece {
            Piece::Hole(length) => holes += length,
            Piece::Data(bytes) => data.extend(bytes),
        }
    }
    assert!(holes > 19 << 20 && holes + data.len() as u64 == 20 << 20);
    assert_eq!(data.iter().filter(|byte| **byte != 0).count(), 6);
    let read = FileRead::new("sparse").sparse();
    assert!(soon(vm.read_to_vec(read, 20 << 20)).await.unwrap() == bytes);
}

#[tokio::test]
async fn a_download_goes_on_after_a_cut_and_notices_another_file() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let bytes = noise(3_000_000);
    let path = machine.workspace().join("file");
    fs::write(&path, &bytes).unwrap();
    let what = FileRead::new("file")
        .offset(1000)
        .length(2_900_000)
        .checked();
    let mut file = vm.download(what).await.unwrap();
    let mut back = vec![0; 100_001];
    let mut cuts = 0;
    soon(file.read_exact(&mut back)).await.unwrap();
    machine.cut();
    loop {
        let mut buffer = vec![0; 100_000];
        match soon(file.read(&mut buffer)).await {
            Ok(0) => break,
            Ok(count) => back.extend_from_slice(&buffer[..count]),
            Err(error) => {
                let error = ClientError::from(error);
                assert!(
                    matches!(error, ClientError::Lost { safe: true, .. }),
                    "{error:?}"
                );
                soon(file.resume()).await.unwrap();
                cuts += 1;
                if cuts < 3 {
                    let mut buffer = vec![0; 300_000];
                    soon(file.read_exact(&mut buffer)).await.unwrap();
                    back.extend(buffer);
                    machine.cut();
                }
            }
        }
    }
    assert!(cuts > 0 && back == bytes[1000..2_901_000], "{cuts} cuts");
    let mut file = vm.download("file").await.unwrap();
    soon(file.read_exact(&mut [0; 100_000])).await.unwrap();
    machine.cut();
    while soon(file.next_piece()).await.is_ok() {}
    let old = fs::OpenOptions::new().write(true).open(&path).unwrap();
    old.write_all_at(b"other", 0).unwrap();
    let error = soon(file.resume()).await.unwrap_err();
    assert!(matches!(error, ClientError::Changed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_checked_download_is_checked_whole_though_it_was_resumed() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let path = machine.workspace().join("file");
    fs::write(&path, vec![1; 3_000_000]).unwrap();
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    for is_damaged in [false, true] {
        let read = FileRead::new("file").offset(1000).sparse().checked();
        let mut file = vm.download(read).await.unwrap();
        soon(file.next_piece()).await.unwrap().unwrap();
        machine.cut();
        while soon(file.next_piece()).await.is_ok() {}
        let there = fs::OpenOptions::new().write(true).open(&path).unwrap();
        if is_damaged {
            // What we have of it is not what is there, and it cannot be seen from outside.
            there.write_all_at(b"other", 2000).unwrap();
            there.set_modified(before).unwrap();
        }
        soon(file.resume()).await.unwrap();
        let end = loop {
            match soon(file.next_piece()).await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        match end {
            Ok(None) => assert!(!is_damaged, "nobody noticed"),
            Err(ClientError::Damaged { .. }) => assert!(is_damaged),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_file_that_becomes_shorter_is_no_whole_file() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let path = machine.workspace().join("file");
    fs::File::create(&path).unwrap().set_len(100 << 20).unwrap();
    let mut file = vm.download("file").await.unwrap();
    let file_there = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file_there.set_len(1000).unwrap();
    let error = loop {
        match soon(file.next_piece()).await {
            Ok(piece) => assert!(piece.is_some(), "it ended well"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::Changed { .. }), "{error:?}");
}

/// A source that cuts the wire a few times while it is read.
struct Cutting<'m> {
    bytes: Cursor<Vec<u8>>,
    machine: &'m Machine,
    cuts: Vec<u64>,
    seeks: Vec<u64>,
}

impl AsyncRead for Cutting<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let at = self.bytes.position();
        if self.cuts.last().is_some_and(|cut| at >= *cut) {
            self.cuts.pop();
            self.machine.cut();
        }
        Pin::new(&mut self.bytes).poll_read(cx, buffer)
    }
}

impl AsyncSeek for Cutting<'_> {
    fn start_seek(mut self: Pin<&mut Self>, to: std::io::SeekFrom) -> std::io::Result<()> {
        if let std::io::SeekFrom::Start(to) = to {
            self.seeks.push(to);
        }
        Pin::new(&mut self.bytes).start_seek(to)
    }

    fn poll_complete(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<u64>> {
        Pin::new(&mut self.bytes).poll_complete(cx)
    }
}

#[tokio::test]
async fn an_upload_survives_cuts_and_sends_nothing_twice_that_arrived() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let bytes = noise(8_000_000);
    let source = |cuts: &[u64]| Cutting {
        bytes: Cursor::new(bytes.clone()),
        machine: &machine,
        cuts: cuts.to_vec(),
        seeks: Vec::new(),
    };
    let mut cut = source(&[6_000_000, 3_000_000]);
    let written = soon(vm.upload_resumable("file", &mut cut)).await.unwrap();
    assert_eq!(written.size, 8_000_000);
    assert!(fs::read(machine.workspace().join("file")).unwrap() == bytes);
    assert!(cut.cuts.is_empty());
    let farthest = *cut.seeks.iter().max().unwrap();
    assert!(
        farthest > 3_000_000,
        "it went on from {farthest}: {:?}",
        cut.seeks
    );
    assert_eq!(names(&machine), ["file"]);
    // What another program left is gone on from if it is the same, and else begun anew.
    for (first, seeks_far) in [(&bytes[..], true), (&vec![1; 8_000_000][..], false)] {
        let upload = UploadId([9; 16]);
        let to = || FileWrite::new("other").upload_id(upload);
        let half = failing_after(&first[..5_000_000]);
        soon(vm.upload(to(), half)).await.unwrap_err();
        soon(async {
            while vm.query_upload("other", upload).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let mut again = source(&[]);
        soon(vm.upload_resumable(to(), &mut again)).await.unwrap();
        assert!(fs::read(machine.workspace().join("other")).unwrap() == bytes);
        assert_eq!(
            again.seeks.iter().any(|at| *at > 1_000_000),
            seeks_far,
            "{:?}",
            again.seeks
        );
        let error = vm.query_upload("other", upload).await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::NoSuchUpload));
    }
}

#[tokio::test]
async fn what_an_upload_left_is_dropped_when_asked() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let upload = UploadId([3; 16]);
    let half = failing_after(&[1; 1_000_000]);
    let to = FileWrite::new("file").upload_id(upload);
    soon(vm.upload(to, half)).await.unwrap_err();
    let dropping = async {
        while vm.drop_upload("file", upload).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(dropping).await;
    assert_eq!(names(&machine), [""; 0]);
}

fn tree(machine: &Machine) -> PathBuf {
    let tree = machine.workspace().join("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("deep/file"), noise(500_000)).unwrap();
    fs::write(tree.join("empty"), b"").unwrap();
    std::os::unix::fs::symlink("deep/file", tree.join("link")).unwrap();
    tree
}

#[tokio::test]
async fn a_tree_goes_out_and_in_again_without_being_held() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let old = tree(&machine);
    let archive = vm
        .pack(client::file::TreeRead::new("tree").checked())
        .await
        .unwrap();
    // Straight from one stream into the other.
    let unpacked = soon(vm.unpack("copy", archive)).await.unwrap();
    assert_eq!((unpacked.entries, unpacked.bytes), (6, 500_000));
    let copy = machine.workspace().join("copy");
    assert!(fs::read(copy.join("deep/file")).unwrap() == fs::read(old.join("deep/file")).unwrap());
    assert_eq!(
        fs::read_link(copy.join("link")).unwrap().to_str(),
        Some("deep/file")
    );
    assert!(copy.join("deep/er").is_dir() && copy.join("empty").exists());
    let bad = soon(vm.unpack("bad", &vec![7; 100_000][..]))
        .await
        .unwrap_err();
    assert_eq!(bad.code(), Some(ErrorCode::BadArchive));
    // An error of the source is the error of the whole.
    let missing = vm.pack("missing").await.unwrap();
    let error = soon(vm.unpack("nothing", missing)).await.unwrap_err();
    assert_eq!(error.file().unwrap().errno(), Some("ENOENT"));
}

#[tokio::test]
async fn a_copy_between_vms_ends_with_the_one_that_is_lost() {
    let (from, to) = (Machine::start().await, Machine::start().await);
    let (near, far) = (from.vm().await, to.vm().await);
    let large = fs::File::create(from.workspace().join("large")).unwrap();
    large.set_len(4 << 30).unwrap();
    let archive = near.pack("large").await.unwrap();
    let copying = tokio::spawn(async move { far.unpack("copy", archive).await });
    let begun = to.workspace().join("copy/large");
    eventually("it has begun", || begun.exists()).await;
    from.cut();
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error:?}");
}

#[tokio::test]
async fn changes_are_told_as_they_happen() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let mut watch = vm.watch("", true).await.unwrap();
    assert_eq!(watch.watched(), 1);
    vm.upload("file", &b"x"[..]).await.unwrap();
    vm.rename("file", "moved").await.unwrap();
    let mut cookie = 0;
    loop {
        let event = soon(watch.next()).await.unwrap();
        if event.change == FileChange::MovedFrom && event.path == b"file" {
            cookie = event.cookie;
        }
        if event.change == FileChange::MovedTo && event.path == b"moved" {
            assert_eq!(event.cookie, cookie);
            break;
        }
    }
    machine.cut();
    let error = soon(watch.next()).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Lost { safe: true, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_port_in_the_vm_is_connected_to_both_ways() {
    let machine = Machine::start().await;
    let vm = machine.vm().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        let (mut peer, _) = listener.accept().await.unwrap();
        peer.write_all(b"first").await.unwrap();
        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.unwrap();
        peer.write_all(&said).await.unwrap();
    });
    let mut stream = vm.dial(port).await.unwrap();
    let bytes = noise(100_000);
    soon(stream.write_all(&bytes)).await.unwrap();
    soon(stream.shutdown()).await.unwrap();
    let mut back = Vec::new();
    soon(stream.read_to_end(&mut back)).await.unwrap();
    assert!(back.starts_with(b"first") && back[5..] == bytes);
    serving.await.unwrap();
    let error = vm.dial(port).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::ConnectionRefused));
}
