//! From an archive to a tree: reads the archive's bytes, in pieces of any size, and has the tree grow
//! by what they say. No length in an archive is memory here.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::syncfs;
use protocol::file::transfer::WriteEnd;
use protocol::file::tree::{TreeUnpacked, UnpackTree};
use protocol::message::decode_body;
use protocol::{ErrorBody, Frame};

use super::grow::{Tree, bad, time};
use super::header::{self, Header, More};
use super::pax::{Records, Sparse, decimal};
use super::{BLOCK, Entry, Kind, MAX_STRETCHES, padding};
use crate::agent::Agent;
use crate::agent::file::error::{Failure, failed, refused};
use crate::agent::file::inflow::{Inflow, Piece};
use crate::agent::file::manage::make_directories;
use crate::agent::file::path;
use crate::agent::stream::{Stream, StreamError};

/// Bytes of records before one entry.
const MAX_MORE: u64 = 256 << 10;
/// Bytes of the map of a file with holes.
const MAX_MAP: usize = MAX_STRETCHES * 42;

/// Serves an unpacking to its last frame.
pub(crate) fn serve(
    agent: &Agent,
    request: UnpackTree,
    mut stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    match take(agent, request, &mut stream, early) {
        Ok(done) => stream.finish(&done),
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::Refused(error)) => stream.refuse_and_drain(&error),
    }
}

fn take(
    agent: &Agent,
    request: UnpackTree,
    stream: &mut Stream,
    early: Vec<Frame>,
) -> Result<TreeUnpacked, Failure> {
    let path = path::parse(request.path, &agent.workspace)?;
    make_directories(&path, Mode::from_bits_truncate(0o755))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root =
        open(&path, flags, Mode::empty()).map_err(|errno| refused("unpack into", &path, errno))?;
    let disk = root
        .try_clone()
        .map_err(|error| failed("unpack into", &path, &error))?;
    let shown = path.clone();
    let tree = Tree::new(root, path, request.owners, request.special);
    let mut unpack = Unpack::new(tree);
    let mut inflow = Inflow::new(early);
    loop {
        match inflow.next(stream)? {
            Piece::Data(data) => unpack.push(data)?,
            Piece::Frame(frame) if frame.kind == protocol::Kind::WRITE_END => {
                decode_body::<WriteEnd>(&frame.body).map_err(ErrorBody::from)?;
                let done = unpack.finish()?;
                sync(&disk).map_err(|errno| refused("write", &shown, errno))?;
                return Ok(done);
            }
            Piece::Frame(frame) => return Err(crate::agent::unsupported(frame.kind).into()),
        }
    }
}

/// Waits until all of the tree is on its disk. One call for the file system takes less than one for
/// each of many files.
fn sync(root: &OwnedFd) -> Result<(), Errno> {
    // The handle itself allows nothing but finding names.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    syncfs(openat(root, ".", flags, Mode::empty())?)
}

/// What the next bytes of the archive are.
enum State {
    /// A header, collected in the block.
    Header,
    /// More about the next entry.
    More {
        what: More,
        left: u64,
        bytes: Vec<u8>,
        padding: usize,
    },
    /// The map of a file with holes, which ends with a block.
    Map {
        left: u64,
        text: Vec<u8>,
        sink: Sink,
    },
    /// Content.
    Content {
        left: u64,
        sink: Sink,
        padding: usize,
    },
    /// Bytes that mean nothing.
    Skip { left: u64 },
    /// The archive has ended; what follows is filling.
    End,
}

/// Reads an archive.
struct Unpack {
    tree: Tree,
    state: State,
    block: [u8; BLOCK],
    filled: usize,
    /// Said for all entries.
    global: Records,
    /// Said for the next one.
    next: Option<Records>,
    entries: u64,
    bytes: u64,
}

impl Unpack {
    fn new(tree: Tree) -> Self {
        Self {
            tree,
            state: State::Header,
            block: [0; BLOCK],
            filled: 0,
            global: Records::default(),
            next: None,
            entries: 0,
            bytes: 0,
        }
    }

    /// Takes the next bytes of the archive.
    fn push(&mut self, mut data: &[u8]) -> Result<(), ErrorBody> {
        while !data.is_empty() {
            data = match std::mem::replace(&mut self.state, State::Header) {
                State::End => {
                    self.state = State::End;
                    return Ok(());
                }
                State::Header => self.collect_header(data)?,
                State::Skip { left } => {
                    let (now, later) = cut(data, left);
                    let left = left.saturating_sub(now.len() as u64);
                    if left > 0 {
                        self.state = State::Skip { left };
                    }
                    later
                }
                State::More {
                    what,
                    left,
                    mut bytes,
                    padding,
                } => {
                    let (now, later) = cut(data, left);
                    bytes.extend_from_slice(now);
                    let left = left.saturating_sub(now.len() as u64);
                    if left > 0 {
                        self.state = State::More {
                            what,
                            left,
                            bytes,
                            padding,
                        };
                    } else {
                        self.say_more(what, &bytes)?;
                        self.skip(padding);
                    }
                    later
                }
                State::Map { left, text, sink } => self.collect_map(data, left, text, sink)?,
                State::Content {
                    left,
                    mut sink,
                    padding,
                } => {
                    let (now, later) = cut(data, left);
                    sink.write(now)?;
                    self.bytes = self.bytes.saturating_add(now.len() as u64);
                    self.content(left.saturating_sub(now.len() as u64), sink, padding)?;
                    later
                }
            };
        }
        Ok(())
    }

    /// The archive's bytes have ended.
    fn finish(mut self) -> Result<TreeUnpacked, ErrorBody> {
        if !matches!(self.state, State::End) {
            return Err(bad("the archive ends too early: its last block is missing"));
        }
        self.tree.leave(b"")?;
        Ok(TreeUnpacked {
            entries: self.entries,
            bytes: self.bytes,
        })
    }

    fn skip(&mut self, count: usize) {
        if count > 0 {
            self.state = State::Skip { left: count as u64 };
        }
    }

    fn collect_header<'a>(&mut self, data: &'a [u8]) -> Result<&'a [u8], ErrorBody> {
        let wanted = BLOCK.saturating_sub(self.filled);
        let (now, later) = data.split_at(wanted.min(data.len()));
        let place = self.block.get_mut(self.filled..).unwrap_or_default();
        for (to, from) in place.iter_mut().zip(now) {
            *to = *from;
        }
        self.filled = self.filled.saturating_add(now.len());
        if self.filled < BLOCK {
            return Ok(later);
        }
        self.filled = 0;
        match header::parse(&self.block).map_err(|error| bad(error.to_string()))? {
            Header::End if self.next.is_some() => {
                return Err(bad("the archive ends before an entry that it spoke of"));
            }
            Header::End => self.state = State::End,
            Header::Skip(size) => {
                let left = size.saturating_add(padding(size) as u64);
                if left > 0 {
                    self.state = State::Skip { left };
                }
            }
            Header::More(_, size) if size > MAX_MORE => {
                return Err(bad(format!(
                    "{size} bytes of records before an entry; at most {MAX_MORE} are read"
                )));
            }
            Header::More(what, 0) => self.say_more(what, b"")?,
            Header::More(what, size) => {
                self.state = State::More {
                    what,
                    left: size,
                    bytes: Vec::new(),
                    padding: padding(size),
                }
            }
            Header::Entry(entry) => self.begin(entry)?,
        }
        Ok(later)
    }

    fn say_more(&mut self, what: More, bytes: &[u8]) -> Result<(), ErrorBody> {
        let next = self.next.get_or_insert_with(|| self.global.clone());
        let text = || {
            let end = bytes.iter().position(|byte| *byte == 0);
            Some(
                bytes
                    .get(..end.unwrap_or(bytes.len()))
                    .unwrap_or_default()
                    .to_vec(),
            )
        };
        let done = match what {
            More::Pax => next.read(bytes),
            More::PaxGlobal => {
                self.next = None;
                self.global.read(bytes)
            }
            More::Name => {
                next.path = text();
                Ok(())
            }
            More::Link => {
                next.link = text();
                Ok(())
            }
        };
        done.map_err(|error| bad(error.to_string()))
    }

    fn begin(&mut self, mut entry: Entry) -> Result<(), ErrorBody> {
        let records = self.next.take().unwrap_or_else(|| self.global.clone());
        let (sparse, real_size) = (records.sparse, records.real_size);
        records.apply(&mut entry);
        self.entries = self.entries.saturating_add(1);
        if entry.kind != Kind::File {
            // Some write a length for what has no content.
            entry.size = 0;
        }
        if entry.size > i64::MAX.unsigned_abs() {
            return Err(bad(format!("an entry has {} bytes", entry.size)));
        }
        let size = entry.size;
        let Some(file) = self.tree.make(&entry)? else {
            return Ok(());
        };
        let sink = Sink {
            path: self.tree.shown(&entry.name),
            file,
            holes: None,
            at: 0,
            entry,
        };
        match (sparse, real_size) {
            (Sparse::No, _) => self.content(size, sink, padding(size)),
            (Sparse::Map, Some(real)) if i64::try_from(real).is_ok() => {
                let mut sink = sink;
                sink.holes = Some(Holes {
                    real,
                    stretches: VecDeque::new(),
                });
                self.state = State::Map {
                    left: size,
                    text: Vec::new(),
                    sink,
                };
                Ok(())
            }
            _ => Err(bad(format!(
                "{} has holes in a format that is not read here; pack it with --sparse-version=1.0",
                sink.path.display()
            ))),
        }
    }

    /// Goes on with content of which so much is left.
    fn content(&mut self, left: u64, sink: Sink, padding: usize) -> Result<(), ErrorBody> {
        if left > 0 {
            self.state = State::Content {
                left,
                sink,
                padding,
            };
            return Ok(());
        }
        self.skip(padding);
        sink.finish(&self.tree)
    }

    /// The map is whole blocks of numbers, one a line: how many stretches, then where each begins
    /// and how long it is.
    fn collect_map<'a>(
        &mut self,
        data: &'a [u8],
        left: u64,
        mut text: Vec<u8>,
        mut sink: Sink,
    ) -> Result<&'a [u8], ErrorBody> {
        let damaged = || bad("the map of a file with holes is damaged");
        let block = BLOCK.saturating_sub(text.len() % BLOCK);
        let (now, later) = data.split_at(block.min(data.len()));
        let rest = left.checked_sub(now.len() as u64).ok_or_else(damaged)?;
        text.extend_from_slice(now);
        if text.len() > MAX_MAP {
            return Err(damaged());
        }
        let whole = text.len().is_multiple_of(BLOCK);
        let map = if whole {
            map(&text).map_err(|()| damaged())?
        } else {
            None
        };
        let Some(stretches) = map else {
            if rest == 0 {
                return Err(damaged());
            }
            self.state = State::Map {
                left: rest,
                text,
                sink,
            };
            return Ok(later);
        };
        let total = stretches.iter().try_fold(0_u64, |sum, (offset, length)| {
            let end = offset.checked_add(*length)?;
            let fits = sink.holes.as_ref().is_some_and(|holes| end <= holes.real);
            if fits { sum.checked_add(*length) } else { None }
        });
        if total != Some(rest) {
            return Err(damaged());
        }
        if let Some(holes) = &mut sink.holes {
            holes.stretches = stretches;
        }
        self.content(rest, sink, padding(rest))?;
        Ok(later)
    }
}

/// Splits up to `wanted` bytes off the front.
fn cut(data: &[u8], wanted: u64) -> (&[u8], &[u8]) {
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    data.split_at(wanted.min(data.len()))
}

type Stretches = VecDeque<(u64, u64)>;

/// The stretches, if all of them are there.
fn map(text: &[u8]) -> Result<Option<Stretches>, ()> {
    let mut lines = text.split_inclusive(|byte| *byte == b'\n');
    let mut next = || match lines.next() {
        Some([digits @ .., b'\n']) => decimal(digits).map(Some).ok_or(()),
        _ => Ok(None),
    };
    let Some(count) = next()? else {
        return Ok(None);
    };
    if count > MAX_STRETCHES as u64 {
        return Err(());
    }
    let mut stretches = VecDeque::new();
    for _ in 0..count {
        let (Some(offset), Some(length)) = (next()?, next()?) else {
            return Ok(None);
        };
        stretches.push_back((offset, length));
    }
    Ok(Some(stretches))
}

/// A file that content goes into.
struct Sink {
    path: PathBuf,
    file: File,
    holes: Option<Holes>,
    at: u64,
    entry: Entry,
}

struct Holes {
    real: u64,
    stretches: Stretches,
}

impl Sink {
    fn write(&mut self, mut data: &[u8]) -> Result<(), ErrorBody> {
        while !data.is_empty() {
            let (now, later, at) = match &mut self.holes {
                None => (data, &[][..], self.at),
                Some(holes) => {
                    let Some((offset, length)) = holes.stretches.front_mut() else {
                        return Err(bad("a file with holes has more data than its map"));
                    };
                    let at = *offset;
                    let (now, later) = cut(data, *length);
                    *offset = offset.saturating_add(now.len() as u64);
                    *length = length.saturating_sub(now.len() as u64);
                    if *length == 0 {
                        holes.stretches.pop_front();
                    }
                    (now, later, at)
                }
            };
            self.file
                .write_all_at(now, at)
                .map_err(|error| failed("write", &self.path, &error))?;
            self.at = at.saturating_add(now.len() as u64);
            data = later;
        }
        Ok(())
    }

    fn finish(self, tree: &Tree) -> Result<(), ErrorBody> {
        if let Some(holes) = &self.holes {
            self.file
                .set_len(holes.real)
                .map_err(|error| failed("write", &self.path, &error))?;
        }
        let refused = |errno| refused("set the attributes of", &self.path, errno);
        let (uid, gid) = tree.owner(&self.entry);
        nix::unistd::fchown(&self.file, uid, gid).map_err(refused)?;
        let mode = Mode::from_bits_truncate(self.entry.mode);
        nix::sys::stat::fchmod(&self.file, mode).map_err(refused)?;
        let time = time(&self.entry);
        nix::sys::stat::futimens(&self.file, &time, &time).map_err(refused)
    }
}

/// Unpacks anything, cut anywhere, into an empty directory `inside`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(inside: &std::path::Path, cut: usize, bytes: &[u8]) -> Result<(), ErrorBody> {
    make_directories(inside, Mode::from_bits_truncate(0o755))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(inside, flags, Mode::empty())
        .map_err(|errno| refused("unpack into", inside, errno))?;
    let mut unpack = Unpack::new(Tree::new(root, inside.to_path_buf(), false, false));
    let unpacked = bytes
        .chunks(cut.max(1))
        .try_for_each(|piece| unpack.push(piece))
        .and_then(|()| unpack.finish().map(drop));
    crate::agent::file::remove::remove(inside, true)?;
    unpacked
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use proptest::prelude::*;
    use protocol::ErrorCode;

    fn unpack(into: &Path) -> Unpack {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(into, flags, Mode::empty()).unwrap();
        Unpack::new(Tree::new(root, into.to_path_buf(), false, false))
    }

    fn file(name: &[u8], kind: Kind, link: &[u8]) -> Vec<u8> {
        let content: &[u8] = if kind == Kind::File { b"owned" } else { b"" };
        let entry = Entry {
            kind,
            name: name.to_vec(),
            link: link.to_vec(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
            mtime_s: 1,
            mtime_ns: 0,
            major: 1,
            minor: 3,
        };
        let mut bytes = header::entry(&entry).to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    /// What unpacking these entries leaves beside the tree.
    fn outside_after(entries: &[Vec<u8>]) -> (Vec<std::ffi::OsString>, Option<ErrorBody>) {
        let directory = tempfile::tempdir().unwrap();
        let (inside, outside) = (directory.path().join("in"), directory.path().join("out"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("planted")).unwrap();
        let mut unpack = unpack(&inside);
        let result = entries.iter().try_for_each(|entry| unpack.push(entry));
        let found = std::fs::read_dir(&outside).unwrap();
        (
            found.map(|entry| entry.unwrap().file_name()).collect(),
            result.err(),
        )
    }

    #[test]
    fn nothing_in_an_archive_leads_out_of_the_tree() {
        let outside: Vec<Vec<u8>> = vec![
            file(b"../out/x", Kind::File, b""),
            file(b"a/../../out/x", Kind::File, b""),
            file(b"..", Kind::Directory, b""),
            file(b"a/../..", Kind::Directory, b""),
            file(b"planted/x", Kind::File, b""),
            file(b"planted/d/", Kind::Directory, b""),
            file(b"planted/l", Kind::Symlink, b"x"),
            file(b"l", Kind::HardLink, b"../out/x"),
        ];
        for entry in outside {
            let (found, error) = outside_after(&[entry]);
            assert!(found.is_empty(), "{found:?}");
            assert_eq!(error.unwrap().code, ErrorCode::BadArchive);
        }
        // Through a link that the archive itself has made, absolute or not.
        for target in [&b"../out"[..], b"/tmp", b".."] {
            let link = file(b"link", Kind::Symlink, target);
            let through = file(b"link/x", Kind::File, b"");
            let (found, error) = outside_after(&[link, through]);
            assert!(found.is_empty(), "{found:?}");
            assert_eq!(error.unwrap().code, ErrorCode::BadArchive);
        }
        // A file over a link replaces the link.
        let (found, error) = outside_after(&[file(b"planted", Kind::File, b"")]);
        assert!(found.is_empty() && error.is_none());
    }

    #[test]
    fn devices_are_refused_unless_asked_for() {
        for kind in [Kind::CharDevice, Kind::BlockDevice, Kind::Fifo] {
            let (_, error) = outside_after(&[file(b"d", kind, b"")]);
            assert_eq!(error.unwrap().code, ErrorCode::BadArchive);
        }
    }

    #[test]
    fn no_length_in_an_archive_is_memory() {
        let directory = tempfile::tempdir().unwrap();
        for letter in [b'x', b'g', b'L', b'K'] {
            let mut block = header::pax(header::MAX_LONG);
            block[156] = letter;
            let sum: u32 = block
                .iter()
                .enumerate()
                .map(|(at, byte)| {
                    if (148..156).contains(&at) {
                        32
                    } else {
                        u32::from(*byte)
                    }
                })
                .sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let error = unpack(directory.path()).push(&block).unwrap_err();
            assert_eq!(error.code, ErrorCode::BadArchive);
        }
    }

    proptest! {
        #[test]
        fn damaged_archives_never_panic_and_never_leave_the_tree(
            at in 0_usize..3000,
            value in any::<u8>(),
            cut in 1_usize..700,
        ) {
            let mut bytes = file(b"d/", Kind::Directory, b"");
            bytes.extend(file(b"d/f", Kind::File, b""));
            bytes.extend(file(b"l", Kind::Symlink, b"d/f"));
            bytes.extend(file(b"h", Kind::HardLink, b"d/f"));
            bytes.extend([0; 1024]);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            let directory = tempfile::tempdir().unwrap();
            let inside = directory.path().join("in");
            std::fs::create_dir(&inside).unwrap();
            let mut unpack = unpack(&inside);
            for piece in bytes.chunks(cut) {
                if unpack.push(piece).is_err() {
                    break;
                }
            }
            prop_assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }
}
