//! Reading one file: what it is and how much will come, its bytes, the end. A pipe or a device is
//! read only when that was asked for, and then waited for together with the client.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::sys::statfs::fstatfs;
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};
use protocol::ErrorBody;
use protocol::file::FileType;
use protocol::file::transfer::{FileHole, ReadEnded, ReadFile, ReadStarted};

use super::error::{invalid, refused};
use super::outflow::Outflow;
use super::upload::{HashError, hash_file};
use super::{info, path};
use crate::agent::Agent;
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};

/// File systems whose files are made when they are read, by the numbers in the kernel's
/// `linux/magic.h`: the length of such a file is not known before. (The C libraries disagree on the
/// type of these numbers.)
const MADE_BY_KERNEL: [i128; 9] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_e0eb, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0xcafe_4a11, // bpf
];

/// Why a read did not come to its end.
enum Failure {
    Stream(StreamError),
    File(Errno),
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::File(errno)
    }
}

/// Serves a read to its last frame.
pub(super) fn serve(
    agent: &Agent,
    request: ReadFile,
    mut stream: Stream,
) -> Result<(), StreamError> {
    let path = match path::parse(request.path.clone(), &agent.workspace) {
        Ok(path) => path,
        Err(error) => return stream.refuse(&error),
    };
    let source = match Source::open(agent, &path, request.special).and_then(|source| {
        source.check(&request, &path)?;
        Ok(source)
    }) {
        Ok(source) => source,
        Err(error) => return stream.refuse(&error),
    };
    match source.send(&mut stream, &request) {
        Ok(ended) => stream.finish(&ended),
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::File(errno)) => stream.refuse(&refused("read", &path, errno)),
    }
}

/// Opens what a handle stands for. The handle has shown what it is, and nobody can exchange it.
pub(crate) fn reopen(
    proc: BorrowedFd<'_>,
    handle: BorrowedFd<'_>,
    flags: OFlag,
) -> Result<OwnedFd, Errno> {
    let name = format!("self/fd/{}", handle.as_raw_fd());
    let always = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    openat(proc, name.as_str(), flags | always, Mode::empty())
}

struct Source {
    file: OwnedFd,
    about: FileStat,
    kind: Content,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    /// A regular file on a disk: its length is known and it has places.
    Stored,
    /// A file of the kernel: it has places, and ends where reading ends.
    Made,
    /// A pipe or a device: it comes when it comes.
    Stream,
}

impl Source {
    fn open(agent: &Agent, path: &Path, special: bool) -> Result<Self, ErrorBody> {
        let failed = |errno| refused("read", path, errno);
        let handle = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
        let about = fstat(&handle).map_err(failed)?;
        let kind = match info::file_type(&about) {
            FileType::Directory => return Err(failed(Errno::EISDIR)),
            FileType::Regular => {
                let system = fstatfs(&handle).map_err(failed)?;
                if MADE_BY_KERNEL.contains(&i128::from(system.filesystem_type().0)) {
                    Content::Made
                } else {
                    Content::Stored
                }
            }
            FileType::Fifo | FileType::CharDevice | FileType::BlockDevice if special => {
                Content::Stream
            }
            _ => return Err(super::not_regular(path)),
        };
        let file = reopen(agent.proc.as_fd(), handle.as_fd(), OFlag::O_RDONLY).map_err(failed)?;
        Ok(Self { file, about, kind })
    }

    fn size(&self) -> u64 {
        u64::try_from(self.about.st_size).unwrap_or(0)
    }

    fn check(&self, request: &ReadFile, path: &Path) -> Result<(), ErrorBody> {
        let offset = request.offset;
        let end = offset.checked_add(request.length.unwrap_or(0));
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(refused("read", path, Errno::EOVERFLOW));
        }
        let before = request.before;
        if before > 0 && (before > offset || !request.checksum || self.kind != Content::Stored) {
            return Err(invalid(format!(
                "{before} bytes before offset {offset} cannot be counted in a checksum: they have to \
                 be in a file on a disk, and a checksum has to be asked for"
            )));
        }
        match self.kind {
            Content::Stored if offset > self.size() => Err(invalid(format!(
                "offset {offset} is beyond the end of {}, which has {} bytes",
                super::error::show(path),
                self.size()
            ))),
            Content::Stream if offset != 0 => Err(invalid(format!(
                "{} can be read from its beginning only",
                super::error::show(path)
            ))),
            _ => Ok(()),
        }
    }

    fn send(&self, stream: &mut Stream, request: &ReadFile) -> Result<ReadEnded, Failure> {
        let offset = request.offset;
        let most = request.length.unwrap_or(u64::MAX);
        let total = match self.kind {
            Content::Stored => Some(self.size().saturating_sub(offset).min(most)),
            Content::Made | Content::Stream => None,
        };
        let mut out = Outflow::new(stream, request.checksum);
        out.message(&ReadStarted {
            info: info::info(&self.about),
            total,
        })?;
        let limit = total.unwrap_or(most);
        if request.before > 0 {
            out.flush()?;
            let start = offset.saturating_sub(request.before);
            out.hash_before(|hasher, stream| {
                hash_file(&self.file, start..offset, hasher, stream).map_err(|error| match error {
                    HashError::Read(errno) => Failure::File(errno),
                    HashError::Stream(error) => Failure::Stream(error),
                })
            })?;
        }
        match self.kind {
            Content::Stored if request.sparse => self.send_sparse(&mut out, offset, limit)?,
            _ => self.send_stretch(&mut out, offset, limit)?,
        }
        out.flush()?;
        Ok(ReadEnded {
            bytes: out.bytes(),
            blake3: out.checksum(),
        })
    }

    /// Sends up to `most` bytes from `offset` on. Ends earlier where the file ends.
    fn send_stretch(&self, out: &mut Outflow<'_>, offset: u64, most: u64) -> Result<(), Failure> {
        let mut at = offset;
        let mut left = most;
        while left > 0 {
            let room = out.room()?;
            let turn = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            let room = room.get_mut(..turn).unwrap_or_default();
            let read = match self.kind {
                Content::Stream => nix::unistd::read(&self.file, room),
                _ => pread(&self.file, room, i64::try_from(at).unwrap_or(i64::MAX)),
            };
            let count = match read {
                Ok(0) if self.waits_for_writer() => {
                    self.wait(out)?;
                    continue;
                }
                Ok(0) => break,
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    self.wait(out)?;
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            out.add(count)?;
            if self.kind == Content::Stream {
                // Somebody may wait for just this.
                out.flush()?;
            }
            let count = u64::try_from(count).unwrap_or(left);
            at = at.saturating_add(count);
            left = left.saturating_sub(count);
        }
        Ok(())
    }

    /// The same, with holes as messages.
    fn send_sparse(&self, out: &mut Outflow<'_>, offset: u64, most: u64) -> Result<(), Failure> {
        let end = offset.saturating_add(most);
        let mut at = offset;
        while at < end {
            let data = self.seek(at, Whence::SeekData, end)?;
            if data > at {
                let length = data.saturating_sub(at);
                out.message(&FileHole { length })?;
                out.zeros(length)?;
                at = data;
                continue;
            }
            let hole = self.seek(at, Whence::SeekHole, end)?;
            let before = out.bytes();
            self.send_stretch(out, at, hole.saturating_sub(at))?;
            let sent = out.bytes().saturating_sub(before);
            if sent == 0 {
                break;
            }
            at = at.saturating_add(sent);
        }
        Ok(())
    }

    /// The next data or hole at or after `at`, at most `end`; `at` itself where the file ends there.
    fn seek(&self, at: u64, whence: Whence, end: u64) -> Result<u64, Errno> {
        match lseek(&self.file, i64::try_from(at).unwrap_or(i64::MAX), whence) {
            Ok(found) => Ok(u64::try_from(found).unwrap_or(end).clamp(at, end)),
            // Nothing but a hole up to the file's end, which may have come nearer meanwhile.
            Err(Errno::ENXIO) => {
                let size = u64::try_from(fstat(&self.file)?.st_size).unwrap_or(0);
                Ok(size.min(end).max(at))
            }
            Err(errno) => Err(errno),
        }
    }

    /// Whether nobody has opened the pipe for writing yet, so that its end is none.
    fn waits_for_writer(&self) -> bool {
        if info::file_type(&self.about) != FileType::Fifo {
            return false;
        }
        let mut interests = [Interest::new(self.file.as_fd(), true, false)];
        let waited = poll::wait(&mut interests, Some(std::time::Instant::now()));
        let [pipe] = interests;
        waited.is_ok() && !pipe.hung_up() && !pipe.has_input()
    }

    /// Waits until the file has something or the client has gone.
    fn wait(&self, out: &mut Outflow<'_>) -> Result<(), Failure> {
        out.flush()?;
        // A client that only says no more is looked at once.
        let mut end_seen = false;
        loop {
            let client = out.stream().interest(false);
            let mut interests = [
                Interest::new(self.file.as_fd(), true, false),
                if end_seen { client } else { client.and_end() },
            ];
            poll::wait(&mut interests, None).map_err(Failure::File)?;
            let [file, client] = interests;
            if client.hung_up() {
                return Err(StreamError::Gone(Errno::EPIPE).into());
            }
            if client.ended() {
                end_seen = true;
                out.stream().check_heard()?;
            }
            if file.readable() {
                return Ok(());
            }
        }
    }
}
