//! Operations on files, one behind the other, among them uploads that break off and go on: no panic,
//! every one is answered, and nothing is touched outside the directory that they are in.

#![no_main]
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fn place() -> &'static TempDir {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    PLACE.get_or_init(|| tempfile::tempdir().expect("a directory"))
}

fuzz_target!(|bytes: &[u8]| {
    let place = place().path();
    let tree = place.join("tree");
    std::fs::create_dir(&tree).expect("a directory");
    fuzz::agent_files(&tree, bytes);
    std::fs::remove_dir_all(&tree).expect("it is still there");
    let left: Vec<_> = std::fs::read_dir(place)
        .expect("it is still there")
        .collect();
    assert!(left.is_empty(), "outside the directory: {left:?}");
});
