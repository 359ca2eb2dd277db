//! Archives as an attacker would make them, by hand.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use tar::{EntryType, Header};

use super::*;

/// An archive in the making.
#[derive(Default)]
struct Made(Vec<u8>);

impl Made {
    fn entry(self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Self {
        self.with_mode(kind, name, link, content, 0o644)
    }

    fn with_mode(
        mut self,
        kind: EntryType,
        name: &str,
        link: &str,
        content: &[u8],
        mode: u32,
    ) -> Self {
        self.header(kind, name, link, content.len() as u64, mode);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn header(&mut self, kind: EntryType, name: &str, link: &str, size: u64, mode: u32) {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(1_700_000_000);
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes())
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    fn record(self, key: &str, value: &str) -> Self {
        let length = key.len() + value.len() + 3;
        let length = length + (length + 2).to_string().len();
        let record = format!("{length} {key}={value}\n");
        self.entry(EntryType::XHeader, "records", "", record.as_bytes())
    }

    fn whole(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// A place outside, with a tree in it.
struct Ground {
    outside: tempfile::TempDir,
    notes: Notes,
}

impl Ground {
    fn new() -> Self {
        Self {
            outside: tempfile::tempdir().unwrap(),
            notes: Notes::new(true),
        }
    }

    fn tree(&self) -> std::path::PathBuf {
        self.outside.path().join("tree")
    }

    fn unpack(&self, made: Made) -> Result<(), UnpackError> {
        self.unpack_as(made, false, false)
    }

    fn unpack_as(&self, made: Made, sparse: bool, all_links: bool) -> Result<(), UnpackError> {
        let options = Options {
            sparse,
            all_links,
            is_new: false,
        };
        unpack(&made.whole()[..], &self.tree(), options, &self.notes)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.tree().join(name)).unwrap()
    }

    /// Nothing but the tree is there, and in the tree nothing that waits for its name.
    fn is_clean(&self) -> bool {
        let names = |path: &Path| -> Vec<_> {
            let entries = fs::read_dir(path).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        let waits = |name: &std::ffi::OsString| name.to_string_lossy().starts_with(".sup-");
        names(self.outside.path()) == ["tree"] && !names(&self.tree()).iter().any(waits)
    }
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../evil", "/tmp/sup-evil", "a/../../evil", ".."] {
        let ground = Ground::new();
        let error = ground.unpack(Made::default().file(name, "x")).unwrap_err();
        assert!(matches!(error, UnpackError::Name { .. }), "{name}: {error}");
        assert!(ground.is_clean(), "{name}");
        let ground = Ground::new();
        let long = Made::default().record("path", name).file("harmless", "x");
        assert!(ground.unpack(long).is_err(), "{name}");
        assert!(ground.is_clean(), "{name}");
    }
}

#[test]
fn links_that_lead_out_are_left_out_and_others_are_not() {
    let ground = Ground::new();
    let made = Made::default()
        .symlink("absolute", "/etc/passwd")
        .symlink("up", "../outside")
        .symlink("around", "a/../../outside")
        .entry(EntryType::Directory, "d/", "", b"")
        .symlink("d/inside", "../f")
        .file("f", "content");
    ground.unpack(made).unwrap();
    assert_eq!(ground.notes.left_out(), 3);
    assert_eq!(ground.read("d/inside"), "content");
    for name in ["absolute", "up", "around"] {
        assert!(!ground.tree().join(name).is_symlink(), "{name}");
    }
}

#[test]
fn nothing_is_written_through_a_link_neither_the_archives_nor_ours() {
    for all_links in [false, true] {
        let ground = Ground::new();
        let made = Made::default()
            .symlink("way", "..")
            .file("way/evil", "evil");
        let unpacked = ground.unpack_as(made, false, all_links);
        // A link that was left out does not stand in the way of a directory of its name.
        assert_eq!(unpacked.is_err(), all_links);
        assert!(ground.is_clean());
        // One of a tree that was there before, to a directory and to a file.
        let ground = Ground::new();
        fs::create_dir(ground.tree()).unwrap();
        symlink("..", ground.tree().join("way")).unwrap();
        let made = Made::default().file("way/evil", "evil");
        assert!(ground.unpack_as(made, false, all_links).is_err());
        assert!(ground.is_clean());
        let kept = tempfile::NamedTempFile::new().unwrap();
        symlink(kept.path(), ground.tree().join("file")).unwrap();
        let made = Made::default().file("file", "new");
        ground.unpack_as(made, false, all_links).unwrap();
        assert_eq!(ground.read("file"), "new");
        assert_eq!(fs::read(kept.path()).unwrap(), b"");
        // And a directory's rights are not changed through one.
        let ground = Ground::new();
        let before = fs::metadata(ground.outside.path()).unwrap().mode();
        let made = Made::default().symlink("way", "..").with_mode(
            EntryType::Directory,
            "way/",
            "",
            b"",
            0o777,
        );
        let _ = ground.unpack_as(made, false, true);
        assert_eq!(fs::metadata(ground.outside.path()).unwrap().mode(), before);
    }
}

#[test]
fn hard_links_join_files_of_the_tree_only() {
    let ground = Ground::new();
    let link = |name, target| {
        let made = Made::default().file("f", "content").symlink("s", "f");
        made.entry(EntryType::Link, name, target, b"")
    };
    ground.unpack(link("g", "f")).unwrap();
    assert_eq!(ground.read("g"), "content");
    assert_eq!(fs::metadata(ground.tree().join("g")).unwrap().nlink(), 2);
    // The same again, over what is there.
    ground.unpack(link("g", "f")).unwrap();
    for target in ["/etc/passwd", "../f", "s", ".", "missing"] {
        assert!(ground.unpack(link("h", target)).is_err(), "{target}");
        assert!(!ground.tree().join("h").exists(), "{target}");
    }
    assert!(ground.is_clean());
}

#[test]
fn devices_are_left_out_and_no_bit_gives_a_users_rights() {
    let ground = Ground::new();
    let made = Made::default()
        .entry(EntryType::Char, "null", "", b"")
        .entry(EntryType::Block, "disk", "", b"")
        .entry(EntryType::Fifo, "pipe", "", b"")
        .with_mode(EntryType::Directory, "d/", "", b"", 0o7755)
        .with_mode(EntryType::Regular, "su", "", b"#!", 0o6755);
    ground.unpack(made).unwrap();
    assert_eq!(ground.notes.left_out(), 3);
    let mode = |name: &str| fs::metadata(ground.tree().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("su"), mode("d")), (0o755, 0o755));
    assert_eq!(fs::read_dir(ground.tree()).unwrap().count(), 2);
}

#[test]
fn a_directory_that_may_not_be_written_to_is_filled_first() {
    let ground = Ground::new();
    let made = Made::default()
        .with_mode(EntryType::Directory, "./", "", b"", 0o500)
        .with_mode(EntryType::Directory, "d/", "", b"", 0o500)
        .file("d/f", "content");
    ground.unpack(made).unwrap();
    assert_eq!(ground.read("d/f"), "content");
    for name in ["", "d"] {
        let about = fs::metadata(ground.tree().join(name)).unwrap();
        assert_eq!(about.mode() & 0o7777, 0o500);
    }
}

#[test]
fn the_last_of_several_with_one_name_stays_and_no_directory_is_replaced() {
    let ground = Ground::new();
    let made = Made::default()
        .file("f", "first")
        .symlink("f", "elsewhere")
        .file("f", "last");
    ground.unpack(made).unwrap();
    assert_eq!(ground.read("f"), "last");
    let made = Made::default()
        .entry(EntryType::Directory, "d", "", b"")
        .file("d", "x");
    assert!(ground.unpack(made).is_err());
    let made = Made::default().entry(EntryType::Directory, "f", "", b"");
    assert!(ground.unpack(made).is_err());
    assert!(ground.is_clean());
}

#[test]
fn sizes_that_cannot_be_are_refused_before_room_is_made_for_them() {
    let header = |kind, size| {
        let mut made = Made::default();
        made.header(kind, "f", "", size, 0o644);
        made
    };
    for made in [
        header(EntryType::Regular, u64::MAX),
        header(EntryType::Regular, 1 << 62),
        header(EntryType::XHeader, 1 << 40),
        header(EntryType::GNULongName, 1 << 40),
        header(EntryType::XGlobalHeader, 1 << 40),
        header(EntryType::Directory, 1 << 20),
        Made::default()
            .record("size", "18446744073709551615")
            .file("f", "x"),
        // Many small ones before one entry.
        (0..2000).fold(Made::default(), |made, _| {
            made.record("path", &"x".repeat(200))
        }),
    ] {
        let ground = Ground::new();
        assert!(ground.unpack(made).is_err());
        assert!(ground.is_clean());
    }
}

#[test]
fn an_archive_that_ends_early_or_is_damaged_leaves_no_half_file() {
    let whole = Made::default().file("f", &"x".repeat(2000)).whole();
    for length in [0, 100, 512, 600, 2500, 2560] {
        let ground = Ground::new();
        let options = Options {
            sparse: false,
            all_links: false,
            is_new: false,
        };
        let unpacked = unpack(&whole[..length], &ground.tree(), options, &ground.notes);
        assert!(unpacked.is_err(), "{length}");
        assert!(ground.is_clean(), "{length}");
        assert_eq!(ground.tree().join("f").exists(), length == 2560, "{length}");
    }
    // Whatever byte of the header is another one: an error or a file, and nothing outside.
    for at in 0..512 {
        let ground = Ground::new();
        let mut bytes = Made::default().file("f", "content").0;
        bytes[at] ^= 0x41;
        assert!(ground.unpack(Made(bytes)).is_err(), "{at}");
        assert!(ground.is_clean(), "{at}");
    }
    let mut behind = Made::default().file("f", "x").whole();
    behind.push(1);
    assert!(Ground::new().unpack(Made(behind)).is_err());
}

fn with_holes(map: &str, size: &str, content: &str) -> Made {
    let mut text = map.as_bytes().to_vec();
    text.resize(512, 0);
    text.extend_from_slice(content.as_bytes());
    let records = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "f"),
        ("GNU.sparse.realsize", size),
    ];
    let made = records.iter().fold(Made::default(), |made, (key, value)| {
        made.record(key, value)
    });
    made.entry(EntryType::Regular, "x/f", "", &text)
}

#[test]
fn holes_come_only_when_asked_for_and_where_they_fit() {
    let good = || with_holes("2\n100000\n4\n200000\n0\n", "200000", "data");
    let ground = Ground::new();
    assert!(matches!(ground.unpack(good()), Err(UnpackError::Sparse)));
    assert!(ground.is_clean());
    ground.unpack_as(good(), true, false).unwrap();
    let read = fs::read(ground.tree().join("f")).unwrap();
    assert_eq!(
        (read.len(), &read[100_000..100_004]),
        (200_000, &b"data"[..])
    );
    for bad in [
        with_holes("1\n0\n5\n", "4", "data"),
        with_holes("1\n0\n3\n", "4", "data"),
        with_holes("1\n0\n5\n", "4", "data!"),
        with_holes("2\n2\n2\n0\n2\n", "4", "data"),
        with_holes("1\n18446744073709551615\n4\n", "4", "data"),
        with_holes("99999999\n", "4", "data"),
        with_holes("x\n", "4", "data"),
        with_holes("", "4", "data"),
        with_holes("0\n", "9223372036854775808", ""),
        with_holes("1\n9223372036854775806\n4\n", "9223372036854775810", "data"),
    ] {
        let ground = Ground::new();
        assert!(ground.unpack_as(bad, true, false).is_err());
        assert!(ground.is_clean());
    }
}

#[test]
fn what_is_packed_here_is_unpacked_as_it_was() {
    let ground = Ground::new();
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    let long = "n".repeat(150);
    fs::create_dir_all(at("d/e")).unwrap();
    fs::write(at("d/e").join(&long), "long").unwrap();
    fs::write(at("d/a\nb"), "newline").unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("run"), "#!/bin/sh").unwrap();
    fs::set_permissions(at("run"), Permissions::from_mode(0o751)).unwrap();
    symlink(format!("e/{long}"), at("d/link")).unwrap();
    let file = fs::File::create(at("holes")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 3 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    for sparse in [false, true] {
        let mut archive = Vec::new();
        super::super::pack::pack(source.path(), sparse, &mut archive, &ground.notes).unwrap();
        assert_eq!(archive.len() < 1 << 20, sparse);
        let to = ground.outside.path().join(format!("{sparse}"));
        let options = Options {
            sparse,
            all_links: false,
            is_new: false,
        };
        unpack(&archive[..], &to, options, &ground.notes).unwrap();
        assert_eq!(fs::read(to.join("d/link")).unwrap(), b"long");
        assert_eq!(fs::read(to.join("d/a\nb")).unwrap(), b"newline");
        assert_eq!(fs::read(to.join("empty")).unwrap(), b"");
        let (old, new) = (
            at("run").metadata().unwrap(),
            to.join("run").metadata().unwrap(),
        );
        assert_eq!(old.mode(), new.mode());
        assert_eq!(old.modified().unwrap(), new.modified().unwrap());
        assert!(fs::read(to.join("holes")).unwrap() == fs::read(at("holes")).unwrap());
        let blocks = to.join("holes").metadata().unwrap().blocks();
        assert_eq!(blocks * 512 < 1 << 20, sparse);
    }
    assert_eq!(ground.notes.left_out(), 0);
}
