//! The small operations: a request becomes a few system calls and one answer.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, lstat, mkdirat, stat};
use nix::unistd::{Gid, Uid, fchownat};
use protocol::ErrorBody;
use protocol::file::manage::{
    ChangeMode, ChangeOwner, FilesRemoved, LinkTarget, MakeDirectory, MakeSymlink, ReadLink,
    RemoveFile, RenameFile, ResizeFile, StatFile,
};
use protocol::file::{FileDone, FileInfo, FileType};

use super::error::{invalid, refused};
use super::path::{self, Place};
use super::{info, owner, remove};

/// The twelve bits that a mode may have.
const MODE: u32 = 0o7777;

/// Permission bits, checked.
pub(crate) fn mode(bits: u32) -> Result<Mode, ErrorBody> {
    if bits & !MODE != 0 {
        return Err(invalid(format!("mode {bits:#o} has bits beyond 07777")));
    }
    Ok(Mode::from_bits_truncate(bits))
}

pub(super) fn stat_file(request: StatFile, workspace: &Path) -> Result<FileInfo, ErrorBody> {
    let path = path::parse(request.path, workspace)?;
    let looked = if request.follow {
        stat(&path)
    } else {
        lstat(&path)
    };
    let about = looked.map_err(|errno| refused("look at", &path, errno))?;
    let mut info = info::info(&about);
    if info.file_type == FileType::Symlink {
        info.target = nix::fcntl::readlink(&path).ok().map(OsString::into_vec);
    }
    Ok(info)
}

pub(super) fn make_directory(
    request: MakeDirectory,
    workspace: &Path,
) -> Result<FileDone, ErrorBody> {
    let mode = mode(request.mode)?;
    let path = path::parse(request.path, workspace)?;
    if request.parents {
        make_directories(&path, mode)?;
    } else {
        make_one(&path, mode).map_err(|errno| refused("make directory", &path, errno))?;
    }
    Ok(FileDone {})
}

/// Makes a directory and its missing parents; those get 0755. One that exists is left as it is.
pub(crate) fn make_directories(path: &Path, mode: Mode) -> Result<(), ErrorBody> {
    let failed = |errno| refused("make directory", path, errno);
    let is_directory =
        |path: &Path| stat(path).map(|about| info::file_type(&about) == FileType::Directory);
    match is_directory(path) {
        Ok(true) => return Ok(()),
        Ok(false) => return Err(failed(Errno::EEXIST)),
        Err(Errno::ENOENT) => {}
        Err(errno) => return Err(failed(errno)),
    }
    // Up to the first parent that exists, then down again.
    let mut missing = Vec::new();
    for parent in path.ancestors() {
        match is_directory(parent) {
            Ok(true) => break,
            Ok(false) => return Err(failed(Errno::ENOTDIR)),
            Err(Errno::ENOENT) => missing.push(parent),
            Err(errno) => return Err(failed(errno)),
        }
    }
    for one in missing.iter().rev() {
        let bits = if *one == path {
            mode
        } else {
            Mode::from_bits_truncate(0o755)
        };
        match make_one(one, bits) {
            Ok(()) => {}
            // Somebody else was faster, or the name is one with a dot.
            Err(Errno::EEXIST) if is_directory(one) == Ok(true) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(())
}

/// Makes a directory that has exactly this mode, whatever the agent's mask is.
fn make_one(path: &Path, mode: Mode) -> Result<(), Errno> {
    mkdirat(AT_FDCWD, path, mode)?;
    fchmodat(AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink)
}

pub(super) fn rename(request: RenameFile, workspace: &Path) -> Result<FileDone, ErrorBody> {
    let from = path::parse(request.from, workspace)?;
    let to = path::parse(request.to, workspace)?;
    let (old, new) = (Place::open(&from)?, Place::open(&to)?);
    let flags = if request.no_replace {
        libc::RENAME_NOREPLACE
    } else {
        0
    };
    rename_in(
        old.parent.as_fd(),
        &old.name,
        new.parent.as_fd(),
        &new.name,
        flags,
    )
    .map_err(|errno| match errno {
        // These are about the new name.
        Errno::EEXIST | Errno::ENOTEMPTY | Errno::EISDIR | Errno::ENOSPC => {
            refused("rename to", &to, errno)
        }
        _ => refused("rename", &from, errno),
    })?;
    Ok(FileDone {})
}

/// `renameat2`, which the C library of the guest's agent does not offer.
pub(crate) fn rename_in(
    from: std::os::fd::BorrowedFd<'_>,
    old: &std::ffi::OsStr,
    to: std::os::fd::BorrowedFd<'_>,
    new: &std::ffi::OsStr,
    flags: libc::c_uint,
) -> Result<(), Errno> {
    let text =
        |name: &std::ffi::OsStr| std::ffi::CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL);
    let (old, new) = (text(old)?, text(new)?);
    // SAFETY: both strings end with a zero byte and live across the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            old.as_ptr(),
            to.as_raw_fd(),
            new.as_ptr(),
            flags,
        )
    };
    Errno::result(done).map(drop)
}

pub(super) fn remove(request: RemoveFile, workspace: &Path) -> Result<FilesRemoved, ErrorBody> {
    let path = path::parse(request.path, workspace)?;
    remove::remove(&path, request.recursive).map(|count| FilesRemoved { count })
}

pub(super) fn symlink(request: MakeSymlink, workspace: &Path) -> Result<FileDone, ErrorBody> {
    if request.target.contains(&0) {
        return Err(invalid("the link's target contains a zero byte"));
    }
    let path = path::parse(request.path, workspace)?;
    let target = OsString::from_vec(request.target);
    nix::unistd::symlinkat(target.as_os_str(), AT_FDCWD, &path)
        .map_err(|errno| refused("make link", &path, errno))?;
    Ok(FileDone {})
}

pub(super) fn read_link(request: ReadLink, workspace: &Path) -> Result<LinkTarget, ErrorBody> {
    let path = path::parse(request.path, workspace)?;
    let target = nix::fcntl::readlink(&path).map_err(|errno| refused("read link", &path, errno))?;
    Ok(LinkTarget {
        target: target.into_vec(),
    })
}

pub(super) fn change_mode(request: ChangeMode, workspace: &Path) -> Result<FileDone, ErrorBody> {
    let mode = mode(request.mode)?;
    let path = path::parse(request.path, workspace)?;
    fchmodat(AT_FDCWD, &path, mode, FchmodatFlags::FollowSymlink)
        .map_err(|errno| refused("change the mode of", &path, errno))?;
    Ok(FileDone {})
}

pub(super) fn change_owner(request: ChangeOwner, workspace: &Path) -> Result<FileDone, ErrorBody> {
    let user = owner::user(&request.user)?.map(Uid::from_raw);
    let group = owner::group(&request.group)?.map(Gid::from_raw);
    let path = path::parse(request.path, workspace)?;
    let flags = if request.follow {
        AtFlags::empty()
    } else {
        AtFlags::AT_SYMLINK_NOFOLLOW
    };
    fchownat(AT_FDCWD, &path, user, group, flags)
        .map_err(|errno| refused("change the owner of", &path, errno))?;
    Ok(FileDone {})
}

pub(super) fn resize(request: ResizeFile, workspace: &Path) -> Result<FileDone, ErrorBody> {
    let path = path::parse(request.path, workspace)?;
    let failed = |errno| refused("resize", &path, errno);
    let length = i64::try_from(request.length).map_err(|_| failed(Errno::EFBIG))?;
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(&path, flags, Mode::empty()).map_err(failed)?;
    let about = fstat(&file).map_err(failed)?;
    if SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(super::not_regular(&path));
    }
    nix::unistd::ftruncate(&file, length).map_err(failed)?;
    Ok(FileDone {})
}
