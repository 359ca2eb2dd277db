//! A tar archive as a VM sends it: entries one after the other, their content as it comes. It is
//! written by an attacker: what it says of itself is bounded here and believed nowhere.

use std::io::{self, Read};

use tar::{EntryType, Header};

const BLOCK: usize = 512;

/// The most that may be said of one entry before it: names, times, sizes.
const MOST_RECORDS: u64 = 256 << 10;

/// The longest map of a file with holes, and the most places that it may name.
const MOST_MAP: usize = 4 << 20;
const MOST_STRETCHES: u64 = 65_536;

/// What may follow the end.
const MOST_BEHIND: usize = 1 << 20;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    /// Where in the file its content goes: offsets and lengths, in order.
    Sparse(Vec<(u64, u64)>),
    Directory,
    Symlink,
    HardLink,
    /// A device or a pipe.
    Special,
}

/// What the archive says of the entry. Its names are not to be used as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) mtime_s: i64,
    pub(super) mtime_ns: u32,
    /// Of the file, with its holes.
    pub(super) size: u64,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("the archive cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("the VM's archive is damaged: {0}")]
    Damaged(&'static str),
}

use ArchiveError::Damaged;

/// The entries of an archive.
pub(super) struct Archive<R> {
    from: R,
    /// Of the present entry's content.
    left: u64,
    /// Behind it.
    padding: u64,
}

/// What records say of the next entry.
#[derive(Default)]
struct Records {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<(i64, u32)>,
    real_size: Option<u64>,
    sparse: bool,
    length: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            left: 0,
            padding: 0,
        }
    }

    /// The next entry; none at the archive's end. What was not read of the one before is passed
    /// over.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        self.pass_over()?;
        let mut records = Records::default();
        loop {
            let mut block = [0; BLOCK];
            self.from.read_exact(&mut block)?;
            if block == [0; BLOCK] {
                self.end()?;
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check(header)?;
            let size = header.entry_size().map_err(|_| Damaged("a size"))?;
            self.begin(size)?;
            let kind = match header.entry_type() {
                EntryType::XHeader => {
                    let bytes = self.records(&mut records)?;
                    records.read(&bytes)?;
                    continue;
                }
                EntryType::GNULongName => {
                    records.path = Some(text(self.records(&mut records)?));
                    continue;
                }
                EntryType::GNULongLink => {
                    records.link = Some(text(self.records(&mut records)?));
                    continue;
                }
                EntryType::XGlobalHeader => {
                    self.records(&mut records)?;
                    continue;
                }
                EntryType::Regular | EntryType::Continuous => Kind::File,
                EntryType::Directory => Kind::Directory,
                EntryType::Symlink => Kind::Symlink,
                EntryType::Link => Kind::HardLink,
                EntryType::Char | EntryType::Block | EntryType::Fifo => Kind::Special,
                _ => return Err(Damaged("an entry of a kind that nobody knows")),
            };
            return self.entry(header, kind, records).map(Some);
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        mut kind: Kind,
        records: Records,
    ) -> Result<Entry, ArchiveError> {
        if let Some(size) = records.size {
            self.begin(size)?;
        }
        let link = || header.link_name_bytes().map(|link| link.into_owned());
        let mtime = header.mtime().unwrap_or(0);
        let (mtime_s, mtime_ns) = records
            .mtime
            .unwrap_or((i64::try_from(mtime).unwrap_or(0), 0));
        let mut size = self.left;
        if kind == Kind::File {
            if records.sparse {
                size = records.real_size.ok_or(Damaged("a length with holes"))?;
                kind = Kind::Sparse(self.map(size)?);
            }
        } else if self.left > 0 {
            return Err(Damaged("content of what is no file"));
        }
        Ok(Entry {
            kind,
            name: records
                .path
                .unwrap_or_else(|| header.path_bytes().into_owned()),
            link: records.link.or_else(link).unwrap_or_default(),
            mode: header.mode().unwrap_or(0o600),
            mtime_s,
            mtime_ns,
            size,
        })
    }

    /// Content of the present entry.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let room = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let buffer = buffer.get_mut(..room).unwrap_or_default();
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.from.read(buffer)?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.left = self.left.saturating_sub(u64::try_from(count).unwrap_or(0));
        Ok(count)
    }

    fn begin(&mut self, size: u64) -> Result<(), ArchiveError> {
        let block = u64::try_from(BLOCK).unwrap_or(512);
        let whole = size.checked_next_multiple_of(block);
        self.padding = whole.ok_or(Damaged("a size"))?.saturating_sub(size);
        self.left = size;
        Ok(())
    }

    fn pass_over(&mut self) -> Result<(), ArchiveError> {
        let length = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        let passed = io::copy(&mut (&mut self.from).take(length), &mut io::sink())?;
        if passed < length {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    /// All of a small entry's content.
    fn records(&mut self, records: &mut Records) -> Result<Vec<u8>, ArchiveError> {
        records.length = records.length.saturating_add(self.left);
        if records.length > MOST_RECORDS {
            return Err(Damaged("too much is said of one entry"));
        }
        let mut bytes = vec![0; usize::try_from(self.left).unwrap_or(0)];
        self.from.read_exact(&mut bytes)?;
        self.left = 0;
        self.pass_over()?;
        Ok(bytes)
    }

    /// The map before the content of a file with holes: decimal numbers, a line each, in whole
    /// blocks.
    fn map(&mut self, size: u64) -> Result<Vec<(u64, u64)>, ArchiveError> {
        let mut bytes = Vec::new();
        let mut at = 0;
        let mut number = |archive: &mut Self| -> Result<u64, ArchiveError> {
            loop {
                let rest = bytes.get(at..).unwrap_or_default();
                if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let digits: &[u8] = rest.get(..end).unwrap_or_default();
                    let number = decimal(digits).ok_or(Damaged("a map of holes"))?;
                    at = at.saturating_add(end).saturating_add(1);
                    return Ok(number);
                }
                if rest.len() > 20 || bytes.len() > MOST_MAP {
                    return Err(Damaged("a map of holes"));
                }
                let mut block = [0; BLOCK];
                let mut filled = 0;
                while let Some(room @ [_, ..]) = block.get_mut(filled..) {
                    match archive.read(room)? {
                        0 => return Err(Damaged("a map of holes")),
                        count => filled = filled.saturating_add(count),
                    }
                }
                bytes.extend_from_slice(&block);
            }
        };
        let count = number(self)?;
        if count > MOST_STRETCHES {
            return Err(Damaged("too many holes"));
        }
        let (mut map, mut end, mut content) = (Vec::new(), 0, 0_u64);
        for _ in 0..count {
            let (offset, length) = (number(self)?, number(self)?);
            if offset < end {
                return Err(Damaged("a map of holes"));
            }
            end = offset
                .checked_add(length)
                .filter(|end| *end <= size)
                .ok_or(Damaged("a map of holes"))?;
            content = content.saturating_add(length);
            map.push((offset, length));
        }
        if content != self.left {
            return Err(Damaged("a map of holes"));
        }
        Ok(map)
    }

    /// Nothing but zeros is behind the end.
    fn end(&mut self) -> Result<(), ArchiveError> {
        let mut behind = 0_usize;
        let mut buffer = [0; BLOCK];
        loop {
            let count = self.from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            behind = behind.saturating_add(count);
            let zeros = buffer
                .get(..count)
                .is_some_and(|read| read.iter().all(|byte| *byte == 0));
            if !zeros || behind > MOST_BEHIND {
                return Err(Damaged("something is behind its end"));
            }
        }
    }
}

fn check(header: &Header) -> Result<(), ArchiveError> {
    let sum: u32 = header
        .as_bytes()
        .iter()
        .enumerate()
        .map(|(at, byte)| match at {
            148..156 => u32::from(b' '),
            _ => u32::from(*byte),
        })
        .sum();
    match header.cksum() {
        Ok(said) if said == sum => Ok(()),
        _ => Err(Damaged("a header's checksum")),
    }
}

fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes.truncate(end.unwrap_or(bytes.len()));
    bytes
}

impl Records {
    /// Lines of `length key=value`, whose length counts all of the line.
    fn read(&mut self, mut bytes: &[u8]) -> Result<(), ArchiveError> {
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or(Damaged("a record"))?;
            self.set(key, value).ok_or(Damaged("a record"))?;
            bytes = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" | b"GNU.sparse.name" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"mtime" => self.mtime = time(value),
            b"GNU.sparse.realsize" => self.real_size = Some(decimal(value)?),
            b"GNU.sparse.major" if value == b"1" => self.sparse = true,
            b"GNU.sparse.minor" => {}
            // Formats that nobody sends us.
            key if key.starts_with(b"GNU.sparse.") => return None,
            _ => {}
        }
        Some(())
    }
}

fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(bytes.get(..blank)?)?).ok()?;
    let (line, rest) = bytes.split_at_checked(length)?;
    let line = line.get(blank.checked_add(1)?..)?.strip_suffix(b"\n")?;
    let equals = line.iter().position(|byte| *byte == b'=')?;
    let (key, value) = line.split_at(equals);
    Some((key, value.get(1..)?, rest))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with a fraction; those before 1970 are not kept.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos = parts.next().unwrap_or_default().to_vec();
    nanos.resize(9, b'0');
    Some((seconds, u32::try_from(decimal(&nanos)?).ok()?))
}
