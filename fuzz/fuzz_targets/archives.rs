//! A tar archive from anybody, unpacked by the agent's own code: no panic, and nothing outside the
//! directory that it is unpacked into. The header's checksum is made right, or nothing would get past
//! it.

#![no_main]
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fn place() -> &'static TempDir {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    PLACE.get_or_init(|| tempfile::tempdir().expect("a directory"))
}

/// Makes the checksum of each block right that has a type where a header has it.
fn mend(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(512) {
        if b"0123456789xgLKV7".contains(&block[156]) {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, archive)) = bytes.split_first() else {
        return;
    };
    let mut archive = archive.to_vec();
    mend(&mut archive);
    archive.extend([0; 1024]);
    let place = place().path();
    fuzz::archive(&place.join("tree"), usize::from(*cut) * 8, &archive);
    let left: Vec<_> = std::fs::read_dir(place)
        .expect("it is still there")
        .collect();
    assert!(left.is_empty(), "outside the tree: {left:?}");
});
