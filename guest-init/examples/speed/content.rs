//! What is sent through: bytes that can be checked wherever they are cut, about as fast as memory.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::LazyLock;

/// The pattern repeats after a prime number of bytes, so that a lost frame is noticed.
const PERIOD: usize = 65_521;
/// Bytes that are taken at once.
pub(crate) const BLOCK: usize = 256 << 10;

/// The pattern, several times over.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let one = crate::common::files::noise(PERIOD);
    one.iter()
        .copied()
        .cycle()
        .take(PERIOD + (2 << 20))
        .collect()
});

/// So many bytes of the content, from this offset on.
pub(crate) fn at(offset: u64, length: usize) -> &'static [u8] {
    let start = usize::try_from(offset % PERIOD as u64).unwrap();
    &BYTES[start..start + length]
}

pub(crate) fn make(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    feed(&mut file, size);
}

/// Writes the content.
pub(crate) fn feed(sink: &mut impl Write, size: u64) {
    let mut sent = 0;
    while sent < size {
        let length = (size - sent).min(BLOCK as u64) as usize;
        sink.write_all(at(sent, length)).unwrap();
        sent += length as u64;
    }
}

/// Takes the content and looks at every byte of it.
#[derive(Default)]
pub(crate) struct Check {
    seen: u64,
}

impl Check {
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        assert!(
            bytes == at(self.seen, bytes.len()),
            "bytes were lost or changed near offset {}",
            self.seen
        );
        self.seen += bytes.len() as u64;
    }

    pub(crate) fn end(self, size: u64) {
        assert_eq!(self.seen, size, "bytes were lost at the end");
    }
}

pub(crate) fn check(source: &mut impl Read, size: u64) {
    let (mut check, mut buffer) = (Check::default(), vec![0; BLOCK]);
    while let count @ 1.. = source.read(&mut buffer).unwrap() {
        check.take(&buffer[..count]);
    }
    check.end(size);
}

pub(crate) fn check_file(path: &Path, size: u64) {
    check(&mut File::open(path).unwrap(), size);
}
