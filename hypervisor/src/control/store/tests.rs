//! The store's promises under crashes: the process "dies" at every step of every operation, and the
//! next start finds everything whole or nothing.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use super::disk::Copied;
use super::record::sample;
use super::*;

thread_local! {
    static DIE_AT: Cell<Option<usize>> = const { Cell::new(None) };
    static PASSED: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn die_at(name: &'static str) -> Result<(), StoreError> {
    PASSED.with_borrow_mut(|passed| passed.push(name));
    match DIE_AT.get() {
        Some(0) => Err(StoreError::Died(name)),
        Some(left) => {
            DIE_AT.set(Some(left - 1));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Runs `operation` once for each of its steps, dying there; `check` then looks at a new start.
fn die_at_each_step(
    prepare: impl Fn(&Store),
    operation: impl Fn(&Store) -> Result<(), StoreError>,
    check: impl Fn(&Store, &'static str),
) {
    let mut seen = BTreeSet::new();
    for at in 0.. {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Store::open(directory.path()).unwrap();
        template(&store, "1", 3 << 20);
        prepare(&store);
        DIE_AT.set(Some(at));
        let result = operation(&store);
        DIE_AT.set(None);
        match result {
            Err(StoreError::Died(step)) => {
                seen.insert(step);
                let again = Store::open(directory.path()).unwrap();
                assert_eq!(names(&again.staging()), [""; 0], "staging after `{step}`");
                check(&again, step);
            }
            Err(other) => panic!("{other}"),
            Ok(()) => break,
        }
    }
    assert!(seen.len() >= 2, "no steps were passed");
}

fn template(store: &Store, version: &str, bytes: u64) -> PathBuf {
    let directory = store.templates().join(format!("debian@{version}"));
    write_template(&directory, version, bytes);
    directory.join("disk.img")
}

fn write_template(directory: &Path, version: &str, bytes: u64) {
    fs::create_dir_all(directory).unwrap();
    let disk = File::create(directory.join("disk.img")).unwrap();
    disk.set_len(bytes).unwrap();
    disk.write_all_at(b"root file system", 4096).unwrap();
    fs::write(
        directory.join("template.toml"),
        format!("name = \"debian\"\nversion = \"{version}\"\ndisk_bytes = {bytes}\ndescription = \"x\"\n"),
    )
    .unwrap();
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn template_disk(store: &Store) -> PathBuf {
    store.template(&"debian".parse().unwrap()).unwrap().disk
}

#[test]
fn a_crash_while_making_a_vm_leaves_a_whole_vm_or_nothing() {
    let record = sample("vm-1234abcd");
    die_at_each_step(
        |_| {},
        |store| store.make_vm(&record, &template_disk(store)).map(|_| ()),
        |store, step| {
            let found = store.load().unwrap();
            assert!(found.broken.is_empty(), "`{step}`: {:?}", found.broken);
            if step == "make: renamed" || step == "make: durable" {
                assert_eq!(found.records, std::slice::from_ref(&record), "`{step}`");
                assert_eq!(
                    fs::metadata(store.disk(&record.id)).unwrap().len(),
                    10 << 20
                );
            } else {
                assert!(found.records.is_empty(), "`{step}`");
                assert!(names(&store.vms()).is_empty(), "`{step}`");
            }
        },
    );
}

#[test]
fn a_crash_while_deleting_a_vm_leaves_it_whole_or_gone() {
    let record = sample("vm-1234abcd");
    die_at_each_step(
        |store| {
            store.make_vm(&record, &template_disk(store)).unwrap();
        },
        |store| store.remove_vm(&record.id),
        |store, step| {
            let found = store.load().unwrap();
            assert!(found.broken.is_empty(), "`{step}`: {:?}", found.broken);
            assert_eq!(
                found.records.len(),
                usize::from(step == "remove: begun"),
                "`{step}`"
            );
        },
    );
}

#[test]
fn a_crash_while_saving_a_record_leaves_the_old_or_the_new_one() {
    let old = sample("vm-1234abcd");
    let new = VmRecord {
        generation: 8,
        ..old.clone()
    };
    die_at_each_step(
        |store| {
            store.make_vm(&old, &template_disk(store)).unwrap();
        },
        |store| store.save(&new),
        |store, step| {
            let expected = if step == "replace: renamed" {
                &new
            } else {
                &old
            };
            assert_eq!(
                store.load().unwrap().records,
                std::slice::from_ref(expected),
                "`{step}`"
            );
        },
    );
}

#[test]
fn a_damaged_vm_is_set_aside_and_the_others_live() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Store::open(directory.path()).unwrap();
    let disk = template(&store, "1", 1 << 20);
    let ids = ["vm-aaaaaaaa", "vm-bbbbbbbb", "vm-cccccccc"];
    for id in ids {
        store.make_vm(&sample(id), &disk).unwrap();
    }
    let path = store.vms().join(ids[0]).join("record");
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    fs::remove_file(store.vms().join(ids[1]).join("record")).unwrap();
    let found = store.load().unwrap();
    assert_eq!(found.records, [sample(ids[2])]);
    assert_eq!(found.broken.len(), 2);
    assert_eq!(names(&store.broken()), [ids[0], ids[1]]);
    assert_eq!(names(&store.vms()), [ids[2]]);
    assert!(store.broken().join(ids[0]).join("disk.img").exists());
}

#[test]
fn a_template_of_the_system_slot_is_imported_once_and_the_newest_version_is_used() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let system = directory.path().join("system");
    write_template(&system.join("templates/debian@9"), "9", 1 << 20);
    write_template(&system.join("templates/debian@10"), "10", 2 << 20);
    write_template(&system.join("templates/wrong@10"), "10", 2 << 20);
    let store = Store::open(&directory.path().join("state")).unwrap();
    store.import_templates(&system);
    assert_eq!(names(&store.templates()), ["debian@10", "debian@9"]);
    let found = store.template(&"debian".parse().unwrap()).unwrap();
    assert_eq!((found.version.as_str(), found.disk_mib()), ("10", 2));
    assert_eq!(
        fs::read(&found.disk).unwrap(),
        fs::read(system.join("templates/debian@10/disk.img")).unwrap()
    );
    assert!(store.template(&"alpine".parse().unwrap()).is_none());
    // What is there already is not written again.
    fs::remove_file(system.join("templates/debian@9/disk.img")).unwrap();
    store.import_templates(&system);
    assert!(store.templates().join("debian@9/disk.img").exists());
}

#[test]
fn a_deleted_vm_is_remembered_for_a_day() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Store::open(directory.path()).unwrap();
    let record = sample("vm-1234abcd");
    let deleted = store.remember_deleted(&record).unwrap();
    assert_eq!(
        store.load_deleted().unwrap(),
        std::slice::from_ref(&deleted)
    );
    let old = idempotency::DeletedVm {
        deleted_at: deleted.deleted_at - idempotency::KEPT.as_secs() - 1,
        ..deleted
    };
    assert!(idempotency::expired(&old));
    fs::write(store.deleted().join("vm-1234abcd"), b"garbage").unwrap();
    assert!(store.load_deleted().unwrap().is_empty());
    assert!(names(&store.deleted()).is_empty());
}

#[test]
fn a_user_number_is_given_out_once_even_after_a_restart() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let first = Store::open(directory.path()).unwrap().next_uid().unwrap();
    let second = Store::open(directory.path()).unwrap().next_uid().unwrap();
    assert_eq!((first, second), (200_000, 200_001));
}

#[test]
fn creates_at_the_same_time_get_different_user_numbers() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Store::open(directory.path()).unwrap();
    let mut numbers: Vec<u32> = std::thread::scope(|scope| {
        let takers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    (0..16)
                        .map(|_| store.next_uid().unwrap())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        takers
            .into_iter()
            .flat_map(|taker| taker.join().unwrap())
            .collect()
    });
    numbers.sort_unstable();
    assert_eq!(numbers, (200_000..200_128).collect::<Vec<_>>());
}

/// A loop-mounted file system that goes away with the value. Needs root.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn xfs(mebibytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        File::create(&image)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        let point = directory.path().join("point");
        fs::create_dir(&point).unwrap();
        run(
            "mkfs.xfs",
            &["-q", "-m", "reflink=1", image.to_str().unwrap()],
        );
        run(
            "mount",
            &[
                "-o",
                "loop",
                image.to_str().unwrap(),
                point.to_str().unwrap(),
            ],
        );
        Self(directory)
    }

    fn tmpfs(mebibytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("point");
        fs::create_dir(&point).unwrap();
        let size = format!("size={mebibytes}m");
        run(
            "mount",
            &["-t", "tmpfs", "-o", &size, "tmpfs", point.to_str().unwrap()],
        );
        Self(directory)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("point")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.path().to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{program} {arguments:?}: {status:?} (this test needs root and xfsprogs)"
    );
}

#[test]
fn on_xfs_a_vm_shares_its_template_s_blocks() {
    let mounted = Mounted::xfs(320);
    let store = Store::open(&mounted.path()).unwrap();
    let disk = template(&store, "1", 64 << 20);
    File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .write_all_at(&vec![7; 64 << 20], 0)
        .unwrap();
    // Ten copies of 64 MiB do not fit into 320 MiB unless they share.
    for number in 0..10 {
        let record = VmRecord {
            disk_mib: 128,
            ..sample(&format!("vm-1234567{number}"))
        };
        assert_eq!(store.make_vm(&record, &disk).unwrap(), Copied::Shared);
        let copy = File::open(store.disk(&record.id)).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 128 << 20);
        let mut byte = [0];
        copy.read_at(&mut byte, (64 << 20) - 1).unwrap();
        assert_eq!(byte, [7]);
    }
    assert_eq!(store.load().unwrap().records.len(), 10);
}

#[test]
fn a_full_file_system_is_named_and_leaves_nothing_behind() {
    let mounted = Mounted::xfs(320);
    let store = Store::open(&mounted.path()).unwrap();
    // The template lies elsewhere: its blocks cannot be shared and do not fit.
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = elsewhere.path().join("disk.img");
    fs::write(&disk, vec![7; 330 << 20]).unwrap();
    let record = sample("vm-1234abcd");
    let error = store.make_vm(&record, &disk).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(names(&store.staging()).is_empty());
    assert!(names(&store.vms()).is_empty());
}

#[test]
fn on_a_full_file_system_a_vm_can_still_be_deleted() {
    let mounted = Mounted::tmpfs(4);
    let store = Store::open(&mounted.path()).unwrap();
    let disk = template(&store, "1", 1 << 20);
    let record = sample("vm-1234abcd");
    store.make_vm(&record, &disk).unwrap();
    let fill = mounted.path().join("fill");
    fs::write(&fill, vec![7; 8 << 20]).unwrap_err();
    let error = store.remember_deleted(&record).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    let deleted = store.delete_vm(&record).unwrap();
    assert!(names(&store.vms()).is_empty());
    assert!(names(&store.staging()).is_empty());
    assert_eq!(
        store.load_deleted().unwrap(),
        std::slice::from_ref(&deleted)
    );
}
