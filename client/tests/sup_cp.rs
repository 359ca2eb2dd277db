//! `sup cp` against a real agent.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::program::{interrupt, read_until, run, sup};
use common::real::{Machine, PATIENCE, soon};
use common::*;
use tokio::io::AsyncWriteExt;

/// A directory of ours beside the machine.
fn here() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn there(name: &str) -> String {
    format!("{VM}:{name}")
}

async fn copy(machine: &Machine, arguments: &[&str]) {
    let arguments = [&["cp"], arguments].concat();
    let (code, _, said) = run(machine, &arguments).await;
    assert_eq!((code, said.as_str()), (0, ""), "{arguments:?}");
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_goes_there_and_back_with_its_mode_under_the_name_that_fits() {
    let machine = Machine::start().await;
    let here = here();
    let at = |name: &str| here.path().join(name);
    fs::write(at("run.sh"), "#!/bin/sh").unwrap();
    fs::set_permissions(at("run.sh"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::create_dir(machine.workspace().join("d")).unwrap();
    for to in ["new/run", "d", "d/", ""] {
        copy(&machine, &[&text(&at("run.sh")), &there(to)]).await;
    }
    for path in ["new/run", "d/run.sh", "run.sh"] {
        let path = machine.workspace().join(path);
        assert_eq!(fs::read(&path).unwrap(), b"#!/bin/sh", "{path:?}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o750);
    }
    fs::create_dir(at("into")).unwrap();
    fs::set_permissions(
        machine.workspace().join("run.sh"),
        fs::Permissions::from_mode(0o6711),
    )
    .unwrap();
    for (to, path) in [("into", "into/run.sh"), ("back", "back")] {
        copy(&machine, &[&there("run.sh"), &text(&at(to))]).await;
        assert_eq!(fs::read(at(path)).unwrap(), b"#!/bin/sh");
        // The rights of a VM's users are not ours.
        assert_eq!(fs::metadata(at(path)).unwrap().mode() & 0o7777, 0o711);
    }
    assert_eq!(names(here.path()), ["back", "into", "run.sh"]);
    assert_eq!(names(&machine.workspace()), ["d", "new", "run.sh"]);
}

#[tokio::test]
async fn several_go_into_a_directory_and_one_that_fails_does_not_keep_the_others() {
    let machine = Machine::start().await;
    let here = here();
    let at = |name: &str| text(&here.path().join(name));
    fs::write(at("a"), "a").unwrap();
    fs::write(at("b"), "b").unwrap();
    let (code, _, said) = run(&machine, &["cp", &at("a"), &at("b"), &there("none")]).await;
    assert_eq!(code, 1);
    assert!(said.contains("need a directory"), "{said}");
    let (code, _, said) = run(&machine, &["cp", &at("a"), &at("x"), &at("b"), &there("")]).await;
    assert_eq!(code, 1);
    assert!(said.contains("No such file"), "{said}");
    assert_eq!(names(&machine.workspace()), ["a", "b"]);
    fs::create_dir(at("to")).unwrap();
    copy(&machine, &[&there("a"), &there("b"), &at("to")]).await;
    assert_eq!(names(&here.path().join("to")), ["a", "b"]);
}

#[tokio::test]
async fn trees_go_there_back_and_across_and_links_stay_links() {
    let machine = Machine::start().await;
    let here = here();
    let at = |name: &str| here.path().join(name);
    fs::create_dir_all(at("tree/d")).unwrap();
    fs::write(at("tree/d/f"), "content").unwrap();
    symlink("d/f", at("tree/link")).unwrap();
    fs::set_permissions(at("tree/d"), fs::Permissions::from_mode(0o701)).unwrap();
    // A name that is free becomes the copy's, a directory takes it in.
    copy(&machine, &[&text(&at("tree")), &there("copy")]).await;
    copy(&machine, &["-r", &text(&at("tree")), &there("copy")]).await;
    copy(&machine, &[&there("copy/tree"), &there("other")]).await;
    copy(&machine, &[&there("other"), &text(&at("back"))]).await;
    for root in [
        machine.workspace().join("copy"),
        machine.workspace().join("copy/tree"),
        machine.workspace().join("other"),
        at("back"),
    ] {
        assert_eq!(fs::read(root.join("d/f")).unwrap(), b"content", "{root:?}");
        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("d/f"));
        let mode = fs::metadata(root.join("d")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o701, "{root:?}");
    }
    // Nor what others may do here: neither with what is new nor with what was here before.
    let open = fs::Permissions::from_mode(0o777);
    for path in ["other", "other/d", "other/d/f"] {
        fs::set_permissions(machine.workspace().join(path), open.clone()).unwrap();
    }
    fs::set_permissions(at("back/d"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir(at("around")).unwrap();
    fs::rename(at("back"), at("around/other")).unwrap();
    copy(&machine, &["-r", &there("other"), &text(&at("around"))]).await;
    copy(&machine, &[&there("other"), &text(&at("fresh"))]).await;
    for (path, wanted) in [
        ("around/other/d", 0o700),
        ("around/other/d/f", 0o755),
        ("fresh", 0o755),
        ("fresh/d", 0o755),
    ] {
        let mode = fs::metadata(at(path)).unwrap().mode();
        assert_eq!(mode & 0o7777, wanted, "{path}");
    }
    // What leads out is left out, and that is told.
    symlink("/etc/passwd", machine.workspace().join("other/out")).unwrap();
    let (code, _, said) = run(&machine, &["cp", &there("other"), &text(&at("second"))]).await;
    assert_eq!(code, 1);
    assert!(said.contains("left out out,"), "{said}");
    assert_eq!(fs::read(at("second/d/f")).unwrap(), b"content");
    assert!(!at("second/out").is_symlink());
    copy(
        &machine,
        &["--all-links", &there("other"), &text(&at("third"))],
    )
    .await;
    assert!(at("third/out").is_symlink());
}

#[tokio::test]
async fn standard_input_and_output_are_dashes() {
    let machine = Machine::start().await;
    let mut child = sup(&machine, &["cp", "-", &there("f")])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[b'x'; 300_000]).await.unwrap();
    drop(stdin);
    assert!(soon(child.wait()).await.unwrap().success());
    let (code, out, said) = run(&machine, &["cp", &there("f"), "-"]).await;
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(out, "x".repeat(300_000));
    let (code, _, said) = run(&machine, &["cp", &there(""), "-"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("directory"), "{said}");
}

#[tokio::test]
async fn a_reader_that_has_had_enough_is_no_error() {
    let machine = Machine::start().await;
    fs::write(machine.workspace().join("f"), vec![b'x'; 4 << 20]).unwrap();
    let mut child = sup(&machine, &["cp", &there("f"), "-"]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    tokio::io::AsyncReadExt::read_u8(&mut out).await.unwrap();
    drop(out);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(output.stderr, b"");
}

#[tokio::test]
async fn a_waiting_file_of_somebody_elses_is_not_gone_on_with() {
    let machine = Machine::start().await;
    let here = here();
    fs::write(machine.workspace().join("f"), vec![b'x'; LONG]).unwrap();
    let arguments = ["cp", &there("f"), &text(here.path())];
    let child = sup(&machine, &arguments).spawn().unwrap();
    let part = waiting(here.path()).await;
    interrupt(&child);
    soon(child.wait_with_output()).await.unwrap();
    fs::hard_link(&part, here.path().join("another")).unwrap();
    let (code, _, said) = run(&machine, &arguments).await;
    assert_eq!(code, 1);
    assert!(said.contains("somebody else's"), "{said}");
    assert!(!here.path().join("f").exists());
}

#[tokio::test]
async fn what_makes_no_sense_is_told_and_exits_with_2() {
    let machine = Machine::start().await;
    for arguments in [
        &["cp", "a"][..],
        &["cp", "a", "b"],
        &["cp", "-", "-"],
        &["cp", "a", "-", "vm-0000abcd:"],
        &["cp", "vm-0000abcd:a", "vm-0000abcd:b", "-"],
        &["cp", "no vm:a", "b"],
    ] {
        let (code, _, said) = run(&machine, arguments).await;
        assert_eq!(code, 2, "{arguments:?}: {said}");
    }
    let (code, _, said) = run(&machine, &["cp", &there("missing"), "/tmp/x/"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("no such directory"), "{said}");
    let (code, _, said) = run(&machine, &["cp", &there("missing"), "/tmp"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("missing"), "{said}");
    let (code, _, said) = run(&machine, &["cp", &there(".."), "/tmp"]).await;
    assert_eq!(code, 1);
    assert!(said.contains("no name of its own"), "{said}");
}

#[tokio::test]
async fn holes_are_kept_when_that_is_asked_for() {
    let machine = Machine::start().await;
    let here = here();
    let at = |name: &str| here.path().join(name);
    fs::create_dir(at("tree")).unwrap();
    let file = fs::File::create(at("tree/disk")).unwrap();
    file.write_all_at(b"data", 5 << 20).unwrap();
    file.set_len(20 << 20).unwrap();
    let (disk, tree) = (text(&at("tree/disk")), text(&at("tree")));
    copy(&machine, &["--sparse", &disk, &there("disk")]).await;
    copy(&machine, &["--sparse", &tree, &there("tree")]).await;
    copy(&machine, &["--sparse", &there("disk"), &text(&at("back"))]).await;
    copy(&machine, &["--sparse", &there("tree"), &text(&at("trees"))]).await;
    copy(&machine, &[&there("tree/disk"), &text(&at("full"))]).await;
    let expected = fs::read(at("tree/disk")).unwrap();
    for (path, sparse) in [
        (machine.workspace().join("disk"), true),
        (machine.workspace().join("tree/disk"), true),
        (at("back"), true),
        (at("trees/disk"), true),
        (at("full"), false),
    ] {
        assert!(fs::read(&path).unwrap() == expected, "{path:?}");
        let room = fs::metadata(&path).unwrap().blocks() * 512;
        assert_eq!(room < 2 << 20, sparse, "{path:?}: {room}");
    }
}

/// The file that waits for its name here, once some of it has arrived.
async fn waiting(directory: &Path) -> PathBuf {
    let found = async {
        loop {
            for name in names(directory) {
                let path = directory.join(&name);
                let some = fs::metadata(&path).is_ok_and(|about| about.len() > 1 << 20);
                if name.starts_with(".") && some {
                    return path;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .expect("no file")
}

const LONG: usize = 96 << 20;

#[tokio::test]
async fn a_download_goes_on_after_a_break_and_after_ctrl_c_where_it_was() {
    let machine = Machine::start().await;
    let here = here();
    fs::write(machine.workspace().join("f"), vec![b'x'; LONG]).unwrap();
    let to = here.path().join("f");
    let arguments = ["cp", &there("f"), &text(&to)];
    let child = sup(&machine, &arguments).spawn().unwrap();
    let part = waiting(here.path()).await;
    interrupt(&child);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!to.exists());
    let had = fs::metadata(&part).unwrap().len();
    let child = sup(&machine, &arguments).spawn().unwrap();
    let grown = async {
        // What is there already is not fetched again: it never becomes shorter.
        while let Ok(about) = fs::metadata(&part) {
            assert!(about.len() >= had);
            if about.len() > had {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    soon(grown).await;
    machine.cut();
    let output = soon(child.wait_with_output()).await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(fs::read(&to).unwrap() == vec![b'x'; LONG]);
    assert_eq!(names(here.path()), ["f"]);
}

#[tokio::test]
async fn what_an_earlier_copy_has_brought_is_compared_before_it_counts() {
    let machine = Machine::start().await;
    let here = here();
    fs::write(machine.workspace().join("f"), vec![b'x'; LONG]).unwrap();
    let to = here.path().join("f");
    let arguments = ["cp", &there("f"), &text(&to)];
    let child = sup(&machine, &arguments).spawn().unwrap();
    let part = waiting(here.path()).await;
    interrupt(&child);
    soon(child.wait_with_output()).await.unwrap();
    // As if it had been brought from another file under the same signs.
    let file = fs::OpenOptions::new().write(true).open(&part).unwrap();
    file.write_all_at(b"!", 0).unwrap();
    let (code, _, said) = run(&machine, &arguments).await;
    assert_eq!(code, 1);
    assert!(said.contains("checksum differs"), "{said}");
    assert_eq!(names(here.path()), [""; 0]);
    copy(&machine, &arguments[1..]).await;
    assert!(fs::read(&to).unwrap() == vec![b'x'; LONG]);
}

#[tokio::test]
async fn a_file_that_exists_keeps_its_rights_and_a_directory_in_the_way_is_told_at_once() {
    let machine = Machine::start().await;
    let here = here();
    let to = here.path().join("f");
    fs::write(machine.workspace().join("f"), "new").unwrap();
    fs::write(&to, "old").unwrap();
    // But nothing of a VM's gets the powers of what was here.
    fs::set_permissions(&to, fs::Permissions::from_mode(0o6600)).unwrap();
    copy(&machine, &[&there("f"), &text(&to)]).await;
    assert_eq!(fs::read(&to).unwrap(), b"new");
    assert_eq!(fs::metadata(&to).unwrap().mode() & 0o7777, 0o600);
    fs::create_dir_all(here.path().join("d/f")).unwrap();
    let into = text(&here.path().join("d"));
    let (code, _, said) = run(&machine, &["cp", &there("f"), &into]).await;
    assert_eq!(code, 1);
    assert!(said.contains("is a directory"), "{said}");
    assert_eq!(names(&here.path().join("d")), ["f"]);
}

#[tokio::test]
async fn what_is_left_of_a_file_that_has_changed_is_not_used() {
    let machine = Machine::start().await;
    let here = here();
    fs::write(machine.workspace().join("f"), vec![b'x'; LONG]).unwrap();
    let arguments = ["cp", &there("f"), &text(here.path())];
    let child = sup(&machine, &arguments).spawn().unwrap();
    waiting(here.path()).await;
    interrupt(&child);
    soon(child.wait_with_output()).await.unwrap();
    fs::write(machine.workspace().join("f"), "new").unwrap();
    copy(&machine, &arguments[1..]).await;
    assert_eq!(fs::read(here.path().join("f")).unwrap(), b"new");
    assert_eq!(names(here.path()), ["f"]);
}

#[tokio::test]
async fn an_upload_goes_on_where_an_interrupted_one_was() {
    let machine = Machine::start().await;
    let here = here();
    let from = here.path().join("f");
    fs::write(&from, vec![b'x'; LONG]).unwrap();
    let arguments = ["cp", &text(&from), &there("f")];
    let child = sup(&machine, &arguments).spawn().unwrap();
    waiting(&machine.workspace()).await;
    interrupt(&child);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!machine.workspace().join("f").exists());
    let part = waiting(&machine.workspace()).await;
    let inode = fs::metadata(&part).unwrap().ino();
    copy(&machine, &arguments[1..]).await;
    let copied = machine.workspace().join("f");
    assert!(fs::read(&copied).unwrap() == vec![b'x'; LONG]);
    assert_eq!(fs::metadata(&copied).unwrap().ino(), inode);
    assert_eq!(names(&machine.workspace()), ["f"]);
}

#[tokio::test]
async fn an_interrupted_tree_leaves_no_half_file() {
    let machine = Machine::start().await;
    let here = here();
    fs::create_dir(machine.workspace().join("tree")).unwrap();
    fs::write(machine.workspace().join("tree/f"), vec![b'x'; LONG]).unwrap();
    let to = here.path().join("new");
    let child = sup(&machine, &["cp", &there("tree"), &text(&to)])
        .spawn()
        .unwrap();
    let made = async {
        while !to.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    soon(made).await;
    waiting(&to).await;
    interrupt(&child);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(names(&to), [""; 0]);
}

#[tokio::test]
async fn progress_is_for_terminals_that_want_it() {
    let machine = Machine::start().await;
    let here = here();
    fs::write(machine.workspace().join("f"), vec![b'x'; 1 << 20]).unwrap();
    for (quiet, expected) in [(false, true), (true, false)] {
        let pty = nix::pty::openpty(None, None).unwrap();
        let to = text(&here.path().join("f"));
        let mut command = sup(&machine, &["cp", &there("f"), &to]);
        if quiet {
            command.arg("-q");
        }
        command
            .env("TERM", "xterm")
            .stderr(Stdio::from(pty.slave.try_clone().unwrap()));
        let mut child = command.spawn().unwrap();
        assert!(soon(child.wait()).await.unwrap().success());
        let mut end = fs::File::from(pty.slave);
        std::io::Write::write_all(&mut end, b"THE END").unwrap();
        let mut master = tokio::fs::File::from_std(fs::File::from(pty.master));
        let seen = read_until(&mut master, "THE END").await;
        assert_eq!(seen.contains("1.00 MiB"), expected, "{seen:?}");
    }
}

/// A disk of its own in a file, seen by what runs in this shell only.
fn on_a_disk(directory: &Path, script: &str) -> std::process::Command {
    let image = directory.join("image");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg(format!(
            "mkfs.ext4 -q image; mkdir disk; mount -o loop image disk; {script}"
        ))
        .current_dir(directory);
    command
}

#[tokio::test]
async fn a_tree_is_on_the_disk_when_the_copy_is_done() {
    let machine = Machine::start().await;
    let here = here();
    let tree = machine.workspace().join("tree/deep");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("file"), "so that it can be found again").unwrap();
    // What only the page cache of the mounted file system has is not in the image's file.
    let sup = sup(&machine, &[]);
    let sup = sup.as_std();
    let script = "\"$SUP\" cp \"$FROM\" disk/tree; \
        printf 'never waited for' > disk/other; \
        grep -c 'so that it can be found again' image; ! grep -q 'never waited for' image";
    let mut command = on_a_disk(here.path(), script);
    command.envs(
        sup.get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    command
        .env("SUP", sup.get_program())
        .env("FROM", there("tree"));
    let done = tokio::process::Command::from(command).output();
    let done = soon(done).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    assert_eq!(done.stdout, b"1\n", "{said}");
}
