//! Writing one file. It grows under a hidden name in its own directory and gets its final name in
//! one step, when everything is there and on the disk: whoever looks sees the old file or the new
//! one, never a half. Appending is the exception, and writes as it comes.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, stat};
use nix::unistd::{Gid, Uid, fchown, fsync, ftruncate};
use protocol::file::FileType;
use protocol::file::transfer::{
    FileHole, FileWritten, WriteEnd, WriteFile, WriteMode, WriteStarted,
};
use protocol::message::decode_body;
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use super::error::{Failure, failed, invalid, refused, show};
use super::inflow::{Inflow, Piece};
use super::manage::{make_directories, rename_in};
use super::path::{self, Place};
use super::upload::{self, Claim, HashError, WriteBehind};
use super::{info, outflow};
use crate::agent::Agent;
use crate::agent::stream::{Stream, StreamError};

/// What a new file may be used for.
const NEW: u32 = 0o644;

/// Serves a write to its last frame.
pub(super) fn serve(
    agent: &Agent,
    request: WriteFile,
    mut stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let outcome = take(agent, request, &mut stream, early);
    match outcome {
        Ok(written) => stream.finish(&written),
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::Refused(error)) => stream.refuse_and_drain(&error),
    }
}

fn take(
    agent: &Agent,
    request: WriteFile,
    stream: &mut Stream,
    early: Vec<Frame>,
) -> Result<FileWritten, Failure> {
    let mut sink = Sink::open(agent, request)?;
    let filled = fill(&mut sink, stream, early);
    filled.map_err(|failure| match failure {
        Failure::Refused(error) => Failure::Refused(Box::new(sink.explain(*error))),
        gone @ Failure::Stream(_) => gone,
    })
}

fn fill(
    sink: &mut Sink<'_>,
    stream: &mut Stream,
    early: Vec<Frame>,
) -> Result<FileWritten, Failure> {
    sink.prepare(stream)?;
    stream.queue(&WriteStarted {})?;
    let mut inflow = Inflow::new(early);
    let end: WriteEnd = loop {
        match inflow.next(stream)? {
            Piece::Data(data) => sink.write(data)?,
            Piece::Frame(frame) => match frame.kind {
                Kind::FILE_HOLE => {
                    let hole: FileHole = decode_body(&frame.body).map_err(ErrorBody::from)?;
                    sink.leave_hole(hole.length, stream)?;
                }
                Kind::WRITE_END => break decode_body(&frame.body).map_err(ErrorBody::from)?,
                kind => return Err(crate::agent::unsupported(kind).into()),
            },
        }
    };
    drop(inflow);
    sink.finish(&end, stream)
}

/// Where the bytes go.
struct Sink<'a> {
    /// The file's final name, with no link in the last place.
    path: PathBuf,
    file: File,
    goal: Goal<'a>,
    /// Where the file began to be ours: the end of the old one when appending.
    base: u64,
    /// Where the next byte goes.
    at: u64,
    size: Option<u64>,
    hasher: Option<blake3::Hasher>,
    permissions: Option<Mode>,
    old: Option<FileStat>,
    behind: WriteBehind,
}

enum Goal<'a> {
    /// The hidden file becomes the final one.
    Rename {
        place: Place,
        upload: protocol::file::transfer::UploadId,
        claim: Claim<'a>,
        no_replace: bool,
        resumable: bool,
    },
    /// It is the final one.
    Append,
}

impl<'a> Sink<'a> {
    fn open(agent: &'a Agent, request: WriteFile) -> Result<Self, ErrorBody> {
        let path = path::parse(request.path, &agent.workspace)?;
        if path::names_directory(&path) {
            return Err(refused("write", &path, Errno::EISDIR));
        }
        let permissions = request.permissions.map(super::manage::mode).transpose()?;
        let path = path::follow(&path)?;
        let old = match stat(&path) {
            Ok(about) => Some(about),
            Err(Errno::ENOENT) => None,
            Err(errno) => return Err(refused("write", &path, errno)),
        };
        match old.as_ref().map(info::file_type) {
            None | Some(FileType::Regular) => {}
            Some(FileType::Directory) => return Err(refused("write", &path, Errno::EISDIR)),
            Some(_) => return Err(super::not_regular(&path)),
        }
        let hasher = request.checksum.then(blake3::Hasher::new);
        let (parent, name) = path::split(&path)?;
        make_directories(&parent, Mode::from_bits_truncate(0o755))?;
        let no_replace = match request.mode {
            WriteMode::Replace => false,
            WriteMode::Create if old.is_some() => {
                return Err(refused("make", &path, Errno::EEXIST));
            }
            WriteMode::Create => true,
            WriteMode::Append => {
                if request.upload.is_some() || request.offset != 0 {
                    return Err(invalid(
                        "an append cannot be resumed; leave upload and offset out",
                    ));
                }
                let file = open_to_append(&path)?;
                let base = length(&file, &path)?;
                return Ok(Self {
                    path,
                    file,
                    goal: Goal::Append,
                    base,
                    at: base,
                    size: request.size,
                    hasher,
                    permissions: permissions.filter(|_| old.is_none()),
                    old,
                    behind: WriteBehind::begin(base),
                });
            }
            other => {
                let message = format!("mode has the unknown value {}", other.to_wire());
                return Err(invalid(message));
            }
        };
        if request.offset > 0 && request.upload.is_none() {
            return Err(invalid("an offset goes with the name of an upload"));
        }
        let upload = match request.upload {
            Some(upload) => upload,
            None => upload::fresh_id().map_err(|errno| refused("write", &path, errno))?,
        };
        let hidden = parent.join(upload::hidden_name(upload));
        let resumable = request.upload.is_some();
        let claim = agent.uploads.claim(upload, &hidden, resumable)?;
        let mut place = Place::open(&hidden)?;
        place.name = name;
        let file = open_hidden(&place, upload, request.offset, &path)?;
        Ok(Self {
            path,
            file,
            goal: Goal::Rename {
                place,
                upload,
                claim,
                no_replace,
                resumable,
            },
            base: 0,
            at: request.offset,
            size: request.size,
            hasher,
            permissions,
            old,
            behind: WriteBehind::begin(request.offset),
        })
    }

    /// Hashes what an earlier stream left.
    fn prepare(&mut self, stream: &Stream) -> Result<(), Failure> {
        if let Some(size) = self.size
            && self.at.saturating_sub(self.base) > size
        {
            return Err(self.too_much(size).into());
        }
        if let (Goal::Rename { .. }, Some(hasher)) = (&self.goal, &mut self.hasher) {
            let file = clone(&self.file, &self.path)?;
            hash(&file, self.at, hasher, stream, &self.path)?;
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<(), Failure> {
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        self.check_room(length)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(data);
        }
        let mut rest = data;
        while !rest.is_empty() {
            let count = match self.file.write(rest) {
                Ok(0) => return Err(refused("write", &self.path, Errno::EIO).into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // What got in stays: it is counted, and an append may have others' bytes behind it.
                Err(error) => return Err(failed("write", &self.path, &error).into()),
            };
            rest = rest.get(count..).unwrap_or_default();
            self.at = self
                .at
                .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
        self.behind.written(&self.file, self.at);
        Ok(())
    }

    fn leave_hole(&mut self, length: u64, stream: &Stream) -> Result<(), Failure> {
        if matches!(self.goal, Goal::Append) {
            // To set the file's length would cut off what others append meanwhile.
            return Err(invalid("a hole has no place in an append; send the zeros").into());
        }
        self.check_room(length)?;
        let end = self.at.checked_add(length);
        let end = end
            .and_then(|end| i64::try_from(end).ok())
            .ok_or_else(|| refused("write", &self.path, Errno::EFBIG))?;
        let lengthened = ftruncate(&self.file, end)
            .and_then(|()| nix::unistd::lseek(&self.file, end, nix::unistd::Whence::SeekSet));
        lengthened.map_err(|errno| refused("write", &self.path, errno))?;
        if let Some(hasher) = &mut self.hasher {
            outflow::hash_zeros(hasher, length, stream)?;
        }
        self.at = self.at.saturating_add(length);
        self.behind = WriteBehind::begin(self.at);
        Ok(())
    }

    fn check_room(&mut self, length: u64) -> Result<(), ErrorBody> {
        let total = self.at.saturating_sub(self.base).saturating_add(length);
        match self.size {
            Some(size) if total > size => Err(self.too_much(size)),
            _ => Ok(()),
        }
    }

    fn too_much(&mut self, size: u64) -> ErrorBody {
        self.keep(false);
        ErrorBody::caller(
            ErrorCode::ContentMismatch,
            format!(
                "more than the {size} bytes that were announced were sent for {}",
                show(&self.path)
            ),
        )
    }

    /// Of an append that fails half-way: how much of it is in the file.
    fn explain(&self, mut error: ErrorBody) -> ErrorBody {
        if matches!(self.goal, Goal::Append) {
            let appended = self.at.saturating_sub(self.base);
            error.message += &format!("; {appended} bytes were appended before that");
            let line = if error.detail.is_empty() { "" } else { "\n" };
            error.detail += &format!("{line}appended {appended}");
        }
        error
    }

    fn keep(&mut self, keep: bool) {
        if let Goal::Rename {
            claim, resumable, ..
        } = &mut self.goal
        {
            claim.keep(keep && *resumable);
        }
    }

    fn finish(&mut self, end: &WriteEnd, stream: &Stream) -> Result<FileWritten, Failure> {
        let sent = self.at.saturating_sub(self.base);
        if let Some(size) = self.size
            && size != sent
        {
            let message = format!(
                "{sent} bytes were sent for {}, {size} were announced",
                show(&self.path)
            );
            return Err(ErrorBody::caller(ErrorCode::ContentMismatch, message).into());
        }
        let checksum = self.checksum(end, stream)?;
        if let (Some(wanted), Some(found)) = (end.blake3, checksum)
            && wanted != found
        {
            self.keep(false);
            let message = format!(
                "what arrived for {} has the BLAKE3 checksum {}, not {}; send it again",
                show(&self.path),
                blake3::Hash::from_bytes(found),
                blake3::Hash::from_bytes(wanted),
            );
            let error = ErrorBody::caller(ErrorCode::ContentMismatch, message);
            return Err(error.retryable().into());
        }
        self.commit()?;
        let size = match self.goal {
            Goal::Rename { .. } => self.at,
            // Others may have appended, too.
            Goal::Append => length(&self.file, &self.path)?,
        };
        Ok(FileWritten {
            size,
            blake3: checksum,
        })
    }

    /// The checksum if anybody wants it.
    fn checksum(&self, end: &WriteEnd, stream: &Stream) -> Result<Option<[u8; 32]>, Failure> {
        let hasher = match (&self.hasher, end.blake3) {
            (Some(hasher), _) => hasher.clone(),
            (None, None) => return Ok(None),
            (None, Some(_)) => match self.goal {
                Goal::Append => {
                    let message = "a checksum of what is appended has to be asked for first";
                    return Err(invalid(message).into());
                }
                Goal::Rename { .. } => {
                    let mut hasher = blake3::Hasher::new();
                    let file = clone(&self.file, &self.path)?;
                    hash(&file, self.at, &mut hasher, stream, &self.path)?;
                    hasher
                }
            },
        };
        Ok(Some(*hasher.finalize().as_bytes()))
    }

    /// Makes it the file, durably.
    fn commit(&mut self) -> Result<(), ErrorBody> {
        let path = &self.path;
        let refused = |what: &'static str| move |errno| refused(what, path, errno);
        if let (Goal::Rename { .. }, Some(old)) = (&self.goal, &self.old) {
            let (uid, gid) = (Uid::from_raw(old.st_uid), Gid::from_raw(old.st_gid));
            fchown(&self.file, Some(uid), Some(gid)).map_err(refused("set the owner of"))?;
        }
        let mode = match (&self.goal, self.permissions, &self.old) {
            (_, Some(mode), _) => Some(mode),
            (Goal::Rename { .. }, None, Some(old)) => {
                Some(Mode::from_bits_truncate(old.st_mode & 0o7777))
            }
            (_, None, None) => Some(Mode::from_bits_truncate(NEW)),
            (Goal::Append, None, Some(_)) => None,
        };
        if let Some(mode) = mode {
            fchmod(&self.file, mode).map_err(refused("set the mode of"))?;
        }
        fsync(&self.file).map_err(refused("write"))?;
        let Goal::Rename {
            place,
            upload,
            claim,
            no_replace,
            ..
        } = &mut self.goal
        else {
            return sync_directory(path);
        };
        let flags = if *no_replace {
            libc::RENAME_NOREPLACE
        } else {
            0
        };
        let directory = place.parent.as_fd();
        let hidden = upload::hidden_name(*upload);
        rename_in(directory, &hidden, directory, &place.name, flags).map_err(refused("write"))?;
        // There is nothing left of it to keep.
        claim.keep(false);
        sync_directory(path)
    }
}

/// Makes the file's name durable.
fn sync_directory(path: &Path) -> Result<(), ErrorBody> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let (parent, _) = path::split(path)?;
    nix::fcntl::open(&parent, flags, Mode::empty())
        .and_then(fsync)
        .map_err(|errno| refused("write the directory of", path, errno))
}

fn length(file: &File, path: &Path) -> Result<u64, ErrorBody> {
    let about = fstat(file).map_err(|errno| refused("look at", path, errno))?;
    Ok(u64::try_from(about.st_size).unwrap_or(0))
}

fn clone(file: &File, path: &Path) -> Result<OwnedFd, ErrorBody> {
    let copy = file
        .try_clone()
        .map_err(|error| failed("read", path, &error))?;
    Ok(copy.into())
}

fn hash(
    file: &OwnedFd,
    length: u64,
    hasher: &mut blake3::Hasher,
    stream: &Stream,
    path: &Path,
) -> Result<(), Failure> {
    upload::hash_file(file, 0..length, hasher, stream).map_err(|error| match error {
        HashError::Read(errno) => Failure::from(refused("read", path, errno)),
        HashError::Stream(error) => Failure::from(error),
    })
}

fn open_to_append(path: &Path) -> Result<File, ErrorBody> {
    let flags = OFlag::O_WRONLY
        | OFlag::O_APPEND
        | OFlag::O_CREAT
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(path, flags, Mode::from_bits_truncate(NEW))
        .map_err(|errno| refused("write", path, errno))?;
    let about = fstat(&file).map_err(|errno| refused("look at", path, errno))?;
    if info::file_type(&about) != FileType::Regular {
        return Err(super::not_regular(path));
    }
    Ok(file.into())
}

/// Opens the hidden file, ready to be written at `offset`.
fn open_hidden(
    place: &Place,
    upload: protocol::file::transfer::UploadId,
    offset: u64,
    path: &Path,
) -> Result<File, ErrorBody> {
    let failed = |errno| refused("write", path, errno);
    let kept = upload::open_kept(place, upload).map_err(failed)?;
    let file: File = match kept {
        Some(file) => file.into(),
        None if offset > 0 => return Err(not_so_far(upload, offset, 0)),
        None => {
            let flags = OFlag::O_RDWR
                | OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            let mode = Mode::from_bits_truncate(0o600);
            openat(
                &place.parent,
                upload::hidden_name(upload).as_os_str(),
                flags,
                mode,
            )
            .map_err(failed)?
            .into()
        }
    };
    let there = length(&file, path)?;
    if offset > there {
        return Err(not_so_far(upload, offset, there));
    }
    let at = i64::try_from(offset).map_err(|_| failed(Errno::EFBIG))?;
    ftruncate(&file, at).map_err(failed)?;
    nix::unistd::lseek(&file, at, nix::unistd::Whence::SeekSet).map_err(failed)?;
    Ok(file)
}

fn not_so_far(upload: protocol::file::transfer::UploadId, offset: u64, there: u64) -> ErrorBody {
    let message = format!(
        "upload {upload} cannot go on at {offset}: {there} bytes are kept; ask how far it is"
    );
    ErrorBody::caller(ErrorCode::NoSuchUpload, message)
}
