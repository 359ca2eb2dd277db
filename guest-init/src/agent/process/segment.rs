//! The files of a process's log. A log is a row of segments, each a file whose name says whose it is
//! and at which merged offset it begins:
//!
//! `NUMBER-ID.OFFSET`, all hexadecimal, holding `supvmlg1`, then records `tag u8 | length u32 |
//! bytes`: first what is known of the process, then output, and at the end of the last segment how
//! it ended. What is read back here lay on the user's disk: it may be anything.

use std::collections::VecDeque;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use protocol::frame::MAX_DATA;
use protocol::id::ProcessId;
use protocol::message::{decode_body, encode_body};
use protocol::processes::ProcessInfo;

use super::piece::{Piece, Source, as_u64};

const MAGIC: &[u8; 8] = b"supvmlg1";
/// A segment is closed when it has so many bytes of output.
pub(crate) const SEGMENT: u64 = 4 << 20;
/// Longest record that is read back.
const MAX_RECORD: usize = MAX_DATA;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ABOUT: u8 = 3;
const ENDED: u8 = 4;

/// One file of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) path: PathBuf,
    /// The merged offsets of its first byte and behind its last one.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The length of the file.
    pub(crate) size: u64,
}

/// The segments of one process, oldest first.
#[derive(Default)]
pub(crate) struct Segments {
    pub(crate) list: VecDeque<Segment>,
    /// The last one, while it is written.
    file: Option<File>,
    /// The end is in it, or nothing is to be in it any more.
    is_finished: bool,
}

/// Whose a file is, from its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) number: u64,
    pub(crate) id: ProcessId,
    pub(crate) start: u64,
    /// The file's length, where it was looked at.
    pub(crate) size: u64,
}

impl Name {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (number, rest) = text.split_once('-')?;
        let (id, start) = rest.split_once('.')?;
        if number.len() != 16 || id.len() != 32 || start.len() != 16 {
            return None;
        }
        Some(Self {
            number: u64::from_str_radix(number, 16).ok()?,
            id: ProcessId(u128::from_str_radix(id, 16).ok()?.to_be_bytes()),
            start: u64::from_str_radix(start, 16).ok()?,
            size: 0,
        })
    }

    pub(crate) fn text(self) -> String {
        format!("{:016x}-{}.{:016x}", self.number, self.id, self.start)
    }
}

impl Segments {
    /// Writes pieces that begin at `start`. What was written partly is taken back.
    pub(crate) fn write(
        &mut self,
        directory: &Path,
        about: &ProcessInfo,
        start: u64,
        pieces: &[Piece],
    ) -> io::Result<()> {
        let fits = self
            .list
            .back()
            .is_some_and(|last| last.end == start && last.end.saturating_sub(last.start) < SEGMENT);
        let is_new = self.file.is_none() || !fits;
        if is_new {
            self.begin(directory, about, start)?;
        }
        let heads: Vec<[u8; 5]> = pieces
            .iter()
            .map(|piece| {
                let tag = match piece.source {
                    Source::Stdout => STDOUT,
                    Source::Stderr => STDERR,
                };
                head(tag, piece.bytes().len())
            })
            .collect();
        let mut parts = Vec::with_capacity(pieces.len().saturating_mul(2));
        for (head, piece) in heads.iter().zip(pieces) {
            parts.push(IoSlice::new(head));
            parts.push(IoSlice::new(piece.bytes()));
        }
        let written = self.put(&mut parts);
        if written.is_err() && is_new && self.list.len() > 1 {
            self.discard_last();
        }
        written?;
        if let Some(last) = self.list.back_mut() {
            let bytes = pieces.iter().map(Piece::len).sum();
            last.end = last.end.saturating_add(bytes);
        }
        Ok(())
    }

    /// Writes what is known of the process, before there is output.
    pub(crate) fn open(&mut self, directory: &Path, about: &ProcessInfo) -> io::Result<()> {
        self.begin(directory, about, 0)
    }

    /// Writes how the process ended, once, and closes the last segment.
    pub(crate) fn finish(&mut self, directory: &Path, about: &ProcessInfo) -> io::Result<()> {
        if self.is_finished {
            return Ok(());
        }
        if self.file.is_none() {
            self.begin(directory, about, about.bytes)?;
        }
        let body = encode_body(about).map_err(io::Error::other)?;
        let head = head(ENDED, body.len());
        self.put(&mut [IoSlice::new(&head), IoSlice::new(&body)])?;
        self.file = None;
        self.is_finished = true;
        Ok(())
    }

    /// The process is to be forgotten: nothing more is written about it.
    pub(crate) fn close(&mut self) {
        self.file = None;
        self.is_finished = true;
    }

    fn begin(&mut self, directory: &Path, about: &ProcessInfo, start: u64) -> io::Result<()> {
        self.file = None;
        let name = Name {
            number: about.number,
            id: about.id,
            start,
            size: 0,
        };
        let path = directory.join(name.text());
        // A file of this name is one that could not be written before.
        if self.list.back().is_some_and(|last| last.path == path) {
            self.list.pop_back();
        }
        let file = match create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                std::fs::remove_file(&path)?;
                create(&path)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The directory is not there yet, or not any more.
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(directory)?;
                create(&path)
            }
            created => created,
        };
        self.file = Some(file?);
        self.list.push_back(Segment {
            path,
            start,
            end: start,
            size: 0,
        });
        let body = encode_body(about).map_err(io::Error::other)?;
        let head = head(ABOUT, body.len());
        let written = self.put(&mut [
            IoSlice::new(MAGIC),
            IoSlice::new(&head),
            IoSlice::new(&body),
        ]);
        if written.is_err() {
            self.discard_last();
        }
        written
    }

    /// Takes back a segment that nothing could be written to: each attempt would leave another one.
    fn discard_last(&mut self) {
        self.file = None;
        if let Some(last) = self.list.pop_back() {
            // One that the user has removed is gone all the same.
            let _ = std::fs::remove_file(&last.path);
        }
    }

    /// Appends all of it or nothing.
    fn put(&mut self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        let (Some(file), Some(last)) = (&mut self.file, self.list.back_mut()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let length: u64 = parts.iter().map(|part| as_u64(part.len())).sum();
        let mut written = Ok(());
        while !parts.is_empty() {
            // At most this many parts are taken at once by the system.
            let most = parts.len().min(1024);
            match file.write_vectored(parts.get(..most).unwrap_or_default()) {
                Ok(0) => {
                    written = Err(io::ErrorKind::WriteZero.into());
                    break;
                }
                Ok(count) => IoSlice::advance_slices(&mut parts, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    written = Err(error);
                    break;
                }
            }
        }
        match written {
            Ok(()) => last.size = last.size.saturating_add(length),
            Err(_) => {
                // A half record would hide what follows it. If even this fails, the segment ends here.
                let _ = file.set_len(last.size);
                self.file = None;
            }
        }
        written
    }

    /// Removes the oldest segment; gives its bytes of output and its size.
    pub(crate) fn drop_oldest(&mut self) -> Option<(u64, u64)> {
        let first = self.list.pop_front()?;
        if self.list.is_empty() {
            self.file = None;
        }
        // One that the user has removed is gone all the same.
        let _ = std::fs::remove_file(&first.path);
        Some((first.end.saturating_sub(first.start), first.size))
    }

    /// Bytes of output in all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.list
            .iter()
            .map(|one| one.end.saturating_sub(one.start))
            .sum()
    }

    pub(crate) fn size(&self) -> u64 {
        self.list.iter().map(|one| one.size).sum()
    }

    /// The segment that has the byte at `offset`, or the first one after it.
    pub(crate) fn find(&self, offset: u64) -> Option<Segment> {
        self.list
            .iter()
            .find(|one| one.end > offset && one.end > one.start)
            .cloned()
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn head(tag: u8, length: usize) -> [u8; 5] {
    // No record is longer than a frame.
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    [tag, a, b, c, d]
}

/// What a record is.
enum Record {
    Output(Piece),
    About(ProcessInfo),
    Ended(ProcessInfo),
}

/// Reads one segment from its beginning.
pub(crate) struct Cursor {
    file: BufReader<File>,
    /// The merged offset of the next record of output.
    pub(crate) offset: u64,
    /// Nothing is read beyond this merged offset.
    pub(crate) end: u64,
}

impl Cursor {
    pub(crate) fn open(segment: &Segment) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(&segment.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut cursor = Self {
            file: BufReader::with_capacity(16 << 10, file),
            offset: segment.start,
            end: segment.end,
        };
        let mut magic = [0; 8];
        cursor.file.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(cursor)
    }

    /// The next output and its merged offset; none at the end that was known when it was opened.
    pub(crate) fn next(&mut self) -> io::Result<Option<(u64, Piece)>> {
        while self.offset < self.end {
            if let Record::Output(piece) = self.record()? {
                let at = self.offset;
                self.offset = at.saturating_add(piece.len());
                return Ok(Some((at, piece)));
            }
        }
        Ok(None)
    }

    fn record(&mut self) -> io::Result<Record> {
        let mut head = [0; 5];
        self.file.read_exact(&mut head)?;
        let [tag, a, b, c, d] = head;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > MAX_RECORD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut body = vec![0; length];
        self.file.read_exact(&mut body)?;
        match tag {
            STDOUT => Ok(Record::Output(Piece::new(Source::Stdout, body))),
            STDERR => Ok(Record::Output(Piece::new(Source::Stderr, body))),
            ABOUT => decode_body(&body)
                .map(Record::About)
                .map_err(io::Error::other),
            ENDED => decode_body(&body)
                .map(Record::Ended)
                .map_err(io::Error::other),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// What a log on the disk says about its process: what was known at its start, or at its end.
pub(crate) struct Recovered {
    pub(crate) info: ProcessInfo,
    pub(crate) has_ended: bool,
    pub(crate) segments: Segments,
}

/// Reads the log that an earlier run left behind. `names` are all its files.
pub(crate) fn recover(directory: &Path, mut names: Vec<Name>) -> Option<Recovered> {
    names.sort_by_key(|name| name.start);
    let mut segments = Segments::default();
    let mut found = None;
    for name in names {
        let path = directory.join(name.text());
        let Ok(size) = std::fs::symlink_metadata(&path).map(|about| about.len()) else {
            continue;
        };
        let mut segment = Segment {
            path,
            start: name.start,
            end: u64::MAX,
            size,
        };
        let Ok(mut cursor) = Cursor::open(&segment) else {
            continue;
        };
        segment.end = segment.start;
        while let Ok(record) = cursor.record() {
            match record {
                Record::Output(piece) => segment.end = segment.end.saturating_add(piece.len()),
                Record::About(info) if info.id == name.id => found = Some((info, false)),
                Record::Ended(info) if info.id == name.id => found = Some((info, true)),
                Record::About(_) | Record::Ended(_) => {}
            }
        }
        segments.list.push_back(segment);
    }
    let (info, has_ended) = found?;
    Some(Recovered {
        info,
        has_ended,
        segments,
    })
}
