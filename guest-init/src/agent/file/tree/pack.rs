//! From a tree to an archive. Walks open directories, so that nobody who changes the tree meanwhile
//! leads the walk out of it. What goes while it is being packed is left out; a file that becomes
//! shorter is filled with zeros, because its length has been said.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, major, minor};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};
use protocol::file::FileType;
use protocol::file::transfer::ReadEnded;
use protocol::file::tree::PackTree;
use protocol::{ErrorBody, ErrorCode};

use super::{BLOCK, Entry, Kind, MAX_DEPTH, MAX_STRETCHES, header, padding, pax};
use crate::agent::Agent;
use crate::agent::file::entries::{Entries, look};
use crate::agent::file::error::{Failure, refused, show};
use crate::agent::file::outflow::Outflow;
use crate::agent::file::path::{self, Place};
use crate::agent::file::{info, not_regular};
use crate::agent::stream::{Stream, StreamError};

/// Files with several names that are remembered, and bytes of their names. Beyond that each name
/// gets a copy of its own.
const MAX_LINKED: usize = 65_536;
const MAX_LINKED_BYTES: usize = 4 << 20;

/// Serves a packing to its last frame.
pub(crate) fn serve(
    agent: &Agent,
    request: PackTree,
    mut stream: Stream,
) -> Result<(), StreamError> {
    let path = match path::parse(request.path, &agent.workspace) {
        Ok(path) => path,
        Err(error) => return stream.refuse(&error),
    };
    let packed = Pack {
        out: Outflow::new(&mut stream, request.checksum),
        sparse: request.sparse,
        special: request.special,
        root: path.clone(),
        linked: HashMap::new(),
        linked_bytes: 0,
    }
    .run(&path);
    match packed {
        Ok(ended) => stream.finish(&ended),
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::Refused(error)) => stream.refuse(&error),
    }
}

struct Pack<'a> {
    out: Outflow<'a>,
    sparse: bool,
    special: bool,
    root: PathBuf,
    /// Where in the archive a file with several names is.
    linked: HashMap<(u64, u64), Vec<u8>>,
    linked_bytes: usize,
}

/// A directory that is being packed.
struct Level {
    entries: Entries,
    /// Length of the path up to here, with its slash.
    prefix: usize,
}

impl Pack<'_> {
    fn run(mut self, path: &Path) -> Result<ReadEnded, Failure> {
        let about = nix::sys::stat::stat(path).map_err(|errno| refused("pack", path, errno))?;
        if info::file_type(&about) == FileType::Directory {
            let top = Entries::open(path).map_err(|errno| refused("pack", path, errno))?;
            let about = fstat(top.as_fd()).map_err(|errno| refused("pack", path, errno))?;
            self.header(&entry(Kind::Directory, b"./".to_vec(), &about))?;
            self.walk(top)?;
        } else {
            let target = path::follow(path)?;
            let place = Place::open(&target)?;
            let name = place.name.clone().into_vec();
            if !self.one(place.parent.as_fd(), &place.name, name, &about)? {
                return Err(not_regular(path).into());
            }
        }
        // The end is two empty blocks.
        self.bytes(&[0; BLOCK])?;
        self.bytes(&[0; BLOCK])?;
        self.out.flush()?;
        Ok(ReadEnded {
            bytes: self.out.bytes(),
            blake3: self.out.checksum(),
        })
    }

    fn walk(&mut self, top: Entries) -> Result<(), Failure> {
        let mut name: Vec<u8> = Vec::new();
        let mut levels = vec![Level {
            entries: top,
            prefix: 0,
        }];
        while let Some(level) = levels.last_mut() {
            name.truncate(level.prefix);
            let next = level.entries.next_owned();
            let Some((child, _)) = next.map_err(|errno| self.refused(&name, errno))? else {
                levels.pop();
                continue;
            };
            name.extend_from_slice(child.as_bytes());
            let about = match look(level.entries.as_fd(), &child) {
                Err(Errno::ENOENT) => continue,
                other => other.map_err(|errno| self.refused(&name, errno))?,
            };
            if info::file_type(&about) != FileType::Directory {
                self.one(level.entries.as_fd(), &child, name.clone(), &about)?;
                continue;
            }
            let entries = match Entries::open_in(level.entries.as_fd(), &child) {
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
                other => other.map_err(|errno| self.refused(&name, errno))?,
            };
            name.push(b'/');
            self.header(&entry(Kind::Directory, name.clone(), &about))?;
            if levels.len() >= MAX_DEPTH {
                let shown = show(&self.root);
                let message =
                    format!("{shown} has more than {MAX_DEPTH} levels; pack a part of it");
                let error = ErrorBody::caller(ErrorCode::NameTooLong, message);
                return Err(error.with_detail(format!("ENAMETOOLONG\n{shown}")).into());
            }
            levels.push(Level {
                entries,
                prefix: name.len(),
            });
        }
        Ok(())
    }

    /// Packs what is no directory. Says whether it was packed.
    fn one(
        &mut self,
        parent: BorrowedFd<'_>,
        child: &OsStr,
        name: Vec<u8>,
        about: &FileStat,
    ) -> Result<bool, Failure> {
        let kind = match info::file_type(about) {
            FileType::Regular => return self.regular(parent, child, name),
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo if self.special => Kind::Fifo,
            FileType::CharDevice if self.special => Kind::CharDevice,
            FileType::BlockDevice if self.special => Kind::BlockDevice,
            _ => return Ok(false),
        };
        let mut entry = entry(kind, name, about);
        if kind == Kind::Symlink {
            let target = nix::fcntl::readlinkat(parent, child);
            match target.map(OsString::into_vec) {
                Ok(target) => entry.link = target,
                Err(Errno::ENOENT | Errno::EINVAL) => return Ok(true),
                Err(errno) => return Err(self.refused(&entry.name, errno).into()),
            }
        }
        self.header(&entry)?;
        Ok(true)
    }

    fn regular(
        &mut self,
        parent: BorrowedFd<'_>,
        child: &OsStr,
        name: Vec<u8>,
    ) -> Result<bool, Failure> {
        // What was a file a moment ago may be a pipe now: neither is waited for.
        let flags = OFlag::O_RDONLY
            | OFlag::O_NOFOLLOW
            | OFlag::O_NONBLOCK
            | OFlag::O_NOCTTY
            | OFlag::O_CLOEXEC;
        let file = match openat(parent, child, flags, Mode::empty()) {
            Err(Errno::ENOENT | Errno::ELOOP | Errno::ENXIO) => return Ok(true),
            other => other.map_err(|errno| self.refused(&name, errno))?,
        };
        let about = fstat(&file).map_err(|errno| self.refused(&name, errno))?;
        if info::file_type(&about) != FileType::Regular {
            return Ok(true);
        }
        let mut entry = entry(Kind::File, name, &about);
        let id = (about.st_dev, about.st_ino);
        if about.st_nlink > 1 {
            if let Some(first) = self.linked.get(&id) {
                entry.kind = Kind::HardLink;
                entry.link = first.clone();
                self.header(&entry)?;
                return Ok(true);
            }
            let bytes = self.linked_bytes.saturating_add(entry.name.len());
            if self.linked.len() < MAX_LINKED && bytes <= MAX_LINKED_BYTES {
                self.linked_bytes = bytes;
                self.linked.insert(id, entry.name.clone());
            }
        }
        let size = u64::try_from(about.st_size).unwrap_or(0);
        let stored = u64::try_from(about.st_blocks).unwrap_or(0);
        if self.sparse
            && stored.saturating_mul(512) < size
            && let Some(map) = stretches(&file, size)
        {
            self.with_holes(&file, entry, size, &map)?;
            return Ok(true);
        }
        entry.size = size;
        self.header(&entry)?;
        self.stretch(&file, &entry.name, 0, size)?;
        self.bytes(zeros(padding(size)))?;
        Ok(true)
    }

    /// GNU's format 1.0: the map of the data comes before the data.
    fn with_holes(
        &mut self,
        file: &OwnedFd,
        mut entry: Entry,
        size: u64,
        map: &[(u64, u64)],
    ) -> Result<(), Failure> {
        let mut text = format!("{}\n", map.len()).into_bytes();
        for (offset, length) in map {
            text.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
        }
        let length = u64::try_from(text.len()).unwrap_or(0);
        text.resize(text.len().saturating_add(padding(length)), 0);
        let data = map
            .iter()
            .fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
        let name = entry.name.clone();
        let mut records = pax::for_sparse(&name, size);
        entry.name = b"GNUSparseFile.0/file".to_vec();
        entry.size = data.saturating_add(u64::try_from(text.len()).unwrap_or(0));
        records.extend_from_slice(&pax::for_entry(&entry));
        self.records(&records)?;
        self.bytes(&header::entry(&entry))?;
        self.bytes(&text)?;
        for (offset, length) in map {
            self.stretch(file, &name, *offset, *length)?;
        }
        self.bytes(zeros(padding(data)))
    }

    fn header(&mut self, entry: &Entry) -> Result<(), Failure> {
        let records = pax::for_entry(entry);
        if !records.is_empty() {
            self.records(&records)?;
        }
        self.bytes(&header::entry(entry))
    }

    fn records(&mut self, records: &[u8]) -> Result<(), Failure> {
        let length = u64::try_from(records.len()).unwrap_or(0);
        self.bytes(&header::pax(length))?;
        self.bytes(records)?;
        self.bytes(zeros(padding(length)))
    }

    fn bytes(&mut self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let room = self.out.room()?;
            let count = room.len().min(bytes.len());
            let (now, later) = bytes.split_at(count);
            for (to, from) in room.iter_mut().zip(now) {
                *to = *from;
            }
            self.out.add(count)?;
            bytes = later;
        }
        Ok(())
    }

    /// Exactly so many bytes of a file.
    fn stretch(
        &mut self,
        file: &OwnedFd,
        name: &[u8],
        offset: u64,
        length: u64,
    ) -> Result<(), Failure> {
        let (mut at, mut left) = (offset, length);
        while left > 0 {
            let room = self.out.room()?;
            let turn = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            let room = room.get_mut(..turn).unwrap_or_default();
            let count = match pread(file, room, i64::try_from(at).unwrap_or(i64::MAX)) {
                // It has become shorter.
                Ok(0) => {
                    room.fill(0);
                    turn
                }
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(self.refused(name, errno).into()),
            };
            self.out.add(count)?;
            let count = u64::try_from(count).unwrap_or(left);
            at = at.saturating_add(count);
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    fn refused(&self, name: &[u8], errno: Errno) -> ErrorBody {
        refused("pack", &self.root.join(OsStr::from_bytes(name)), errno)
    }
}

fn zeros(count: usize) -> &'static [u8] {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    ZEROS.get(..count).unwrap_or_default()
}

fn entry(kind: Kind, name: Vec<u8>, about: &FileStat) -> Entry {
    Entry {
        kind,
        name,
        link: Vec::new(),
        mode: about.st_mode & 0o7777,
        uid: u64::from(about.st_uid),
        gid: u64::from(about.st_gid),
        size: 0,
        mtime_s: about.st_mtime,
        mtime_ns: u32::try_from(about.st_mtime_nsec).unwrap_or(0),
        major: major(about.st_rdev),
        minor: minor(about.st_rdev),
    }
}

/// Where the data of a file is; none when it is in too many places or cannot be asked. A file that
/// ends in a hole has an empty stretch at its end, as GNU's tar writes it.
fn stretches(file: &OwnedFd, size: u64) -> Option<Vec<(u64, u64)>> {
    let seek = |at: u64, whence| lseek(file, i64::try_from(at).ok()?, whence).ok();
    let mut map = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(data) = seek(at, Whence::SeekData).and_then(|data| u64::try_from(data).ok())
        else {
            break;
        };
        if data >= size {
            break;
        }
        let hole = u64::try_from(seek(data, Whence::SeekHole)?).ok()?.min(size);
        map.push((data, hole.checked_sub(data)?));
        if map.len() >= MAX_STRETCHES || hole <= data {
            return None;
        }
        at = hole;
    }
    if at < size {
        map.push((size, 0));
    }
    Some(map)
}
