//! One header block, to bytes and from bytes. Knows fields and numbers, nothing of files.

use super::{BLOCK, Entry, Kind};

/// The largest number that fits in eleven octal digits, and in seven.
pub(super) const MAX_LONG: u64 = 0o777_7777_7777;
pub(super) const MAX_SHORT: u64 = 0o777_7777;
/// Longest name in a header.
pub(super) const MAX_NAME: usize = 100;

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// Nothing but zeros: the end of the archive.
    End,
    /// A file, directory or link.
    Entry(Entry),
    /// So many bytes follow that say more of the next entry.
    More(More, u64),
    /// So many bytes follow that mean nothing here.
    Skip(u64),
}

/// What more is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum More {
    /// pax records for the next entry.
    Pax,
    /// pax records for all that follow.
    PaxGlobal,
    /// Its name, GNU's way.
    Name,
    /// Its link, GNU's way.
    Link,
}

/// Why a block is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    /// The sum over its bytes is wrong.
    #[error("a header's checksum is wrong: it is no tar archive, or it is damaged")]
    Checksum,
    /// A field is no number.
    #[error("a header's {0} is no number")]
    Number(&'static str),
    /// Nobody here knows this kind.
    #[error("an entry has the unknown type {0:?}")]
    Type(char),
}

fn field(block: &[u8; BLOCK], start: usize, length: usize) -> &[u8] {
    block
        .get(start..start.saturating_add(length))
        .unwrap_or_default()
}

/// Text up to the first zero byte.
fn text(block: &[u8; BLOCK], start: usize, length: usize) -> &[u8] {
    let field = field(block, start, length);
    let end = field.iter().position(|byte| *byte == 0);
    field.get(..end.unwrap_or(field.len())).unwrap_or_default()
}

/// A number that is never negative.
fn number(bytes: &[u8]) -> Option<u64> {
    signed(bytes).and_then(|number| u64::try_from(number).ok())
}

/// Octal digits between blanks and zero bytes; or, with the top bit set, a binary number, whose sign
/// is the bit below it.
fn signed(bytes: &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first()?;
    if first & 0x80 != 0 {
        let begin = i64::from(first & 0x3f).checked_sub(i64::from(first & 0x40))?;
        return rest.iter().try_fold(begin, |number, byte| {
            number.checked_mul(256)?.checked_add(i64::from(*byte))
        });
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().position(|byte| !blank(byte))?;
    let digits = bytes.get(start..)?;
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    digits.get(..end)?.iter().try_fold(0_i64, |number, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 8)?;
        number.checked_mul(8)?.checked_add(i64::from(digit))
    })
}

fn sum(block: &[u8; BLOCK]) -> u64 {
    block
        .iter()
        .enumerate()
        .map(|(index, byte)| match index {
            148..156 => u64::from(b' '),
            _ => u64::from(*byte),
        })
        .sum()
}

/// Reads a block.
pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Header, HeaderError> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(Header::End);
    }
    if number(field(block, 148, 8)) != Some(sum(block)) {
        return Err(HeaderError::Checksum);
    }
    // An empty field is zero: old archives have them.
    let read = |name, start, length| {
        let field = field(block, start, length);
        if field.iter().all(|byte| matches!(byte, b' ' | 0)) {
            return Ok(0);
        }
        number(field).ok_or(HeaderError::Number(name))
    };
    let size = read("size", 124, 12)?;
    let letter = field(block, 156, 1).first().copied().unwrap_or(0);
    let kind = match letter {
        0 | b'0' | b'7' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'x' => return Ok(Header::More(More::Pax, size)),
        b'g' => return Ok(Header::More(More::PaxGlobal, size)),
        b'L' => return Ok(Header::More(More::Name, size)),
        b'K' => return Ok(Header::More(More::Link, size)),
        b'V' => return Ok(Header::Skip(size)),
        other => return Err(HeaderError::Type(char::from(other))),
    };
    let mut name = Vec::new();
    let ustar = field(block, 257, 6) == b"ustar\0";
    let prefix = text(block, 345, 155);
    if ustar && !prefix.is_empty() {
        name.extend_from_slice(prefix);
        name.push(b'/');
    }
    name.extend_from_slice(text(block, 0, MAX_NAME));
    let kind = match kind {
        // How archives before POSIX wrote directories.
        Kind::File if letter == 0 && name.ends_with(b"/") => Kind::Directory,
        kind => kind,
    };
    let mtime = field(block, 136, 12);
    let mtime_s = match mtime.iter().all(|byte| matches!(byte, b' ' | 0)) {
        true => 0,
        false => signed(mtime).ok_or(HeaderError::Number("time"))?,
    };
    Ok(Header::Entry(Entry {
        kind,
        name,
        link: text(block, 157, MAX_NAME).to_vec(),
        mode: u32::try_from(read("mode", 100, 8)? & 0o7777).unwrap_or(0),
        uid: read("owner", 108, 8)?,
        gid: read("group", 116, 8)?,
        size,
        mtime_s,
        mtime_ns: 0,
        major: read("device number", 329, 8)?,
        minor: read("device number", 337, 8)?,
    }))
}

/// The block of an entry. What does not fit has been said in pax records before.
pub(super) fn entry(entry: &Entry) -> [u8; BLOCK] {
    let letter = match entry.kind {
        Kind::File => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::CharDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    block(entry, letter)
}

/// The block before so many bytes of pax records.
pub(super) fn pax(length: u64) -> [u8; BLOCK] {
    let entry = Entry {
        kind: Kind::File,
        name: b"PaxHeaders/entry".to_vec(),
        link: Vec::new(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: length,
        mtime_s: 0,
        mtime_ns: 0,
        major: 0,
        minor: 0,
    };
    block(&entry, b'x')
}

fn block(entry: &Entry, letter: u8) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |start: usize, length: usize, bytes: &[u8]| {
        let place = block.get_mut(start..start.saturating_add(length));
        for (to, from) in place.unwrap_or_default().iter_mut().zip(bytes) {
            *to = *from;
        }
    };
    let short = |number: u64| format!("{:07o}\0", number.min(MAX_SHORT));
    let long = |number: u64| format!("{:011o}\0", number.min(MAX_LONG));
    put(0, MAX_NAME, &entry.name);
    put(100, 8, short(u64::from(entry.mode)).as_bytes());
    put(108, 8, short(entry.uid).as_bytes());
    put(116, 8, short(entry.gid).as_bytes());
    put(124, 12, long(entry.size).as_bytes());
    let mtime = u64::try_from(entry.mtime_s).unwrap_or(0);
    put(136, 12, long(mtime).as_bytes());
    put(156, 1, &[letter]);
    put(157, MAX_NAME, &entry.link);
    put(257, 8, b"ustar\x0000");
    put(329, 8, short(entry.major).as_bytes());
    put(337, 8, short(entry.minor).as_bytes());
    let total = sum(&block);
    let sum = format!("{total:06o}\0 ");
    for (to, from) in block.iter_mut().skip(148).zip(sum.bytes()) {
        *to = from;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Entry {
        Entry {
            kind: Kind::Symlink,
            name: b"a/b".to_vec(),
            link: b"../c".to_vec(),
            mode: 0o4755,
            uid: 1000,
            gid: 1001,
            size: 0,
            mtime_s: 1_700_000_000,
            mtime_ns: 0,
            major: 8,
            minor: 1,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let block = entry(&sample());
        assert_eq!(parse(&block), Ok(Header::Entry(sample())));
        assert_eq!(parse(&pax(300)), Ok(Header::More(More::Pax, 300)));
        assert_eq!(parse(&[0; BLOCK]), Ok(Header::End));
    }

    #[test]
    fn a_damaged_header_is_told() {
        let mut block = entry(&sample());
        block[5] ^= 1;
        assert_eq!(parse(&block), Err(HeaderError::Checksum));
        assert_eq!(parse(&[0xff; BLOCK]), Err(HeaderError::Checksum));
    }

    #[test]
    fn numbers_are_octal_or_binary_and_never_overflow() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   12 \0 "), Some(0o12));
        assert_eq!(number(b"12x"), None);
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x01\0\0\0\0"), Some(1 << 32));
        assert_eq!(number(&[0xff; 12]), None);
        assert_eq!(number(&[0xff; 8]), None, "less than nothing");
        let mut nearly = [0; 12];
        nearly[0] = 0x80;
        nearly[4] = 0x80;
        assert_eq!(number(&nearly), None);
        assert_eq!(number(&[b'7'; 30]), None);
    }

    #[test]
    fn a_time_before_1970_is_read_as_gnu_writes_it() {
        let mut block = entry(&sample());
        for (time, wanted) in [(-1_i64, -1), (-86_400, -86_400), (1 << 34, 1 << 34)] {
            let mut field = [if time < 0 { 0xff } else { 0 }; 12];
            field[4..].copy_from_slice(&time.to_be_bytes());
            field[0] |= 0x80;
            block[136..148].copy_from_slice(&field);
            let total = sum(&block);
            block[148..156].copy_from_slice(format!("{total:06o}\0 ").as_bytes());
            let Ok(Header::Entry(entry)) = parse(&block) else {
                panic!("{time}");
            };
            assert_eq!(entry.mtime_s, wanted);
        }
    }
}
