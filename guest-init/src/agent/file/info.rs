//! What the kernel knows of a file, as the protocol says it.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStringExt;

use nix::sys::stat::FileStat;
use protocol::file::{FileInfo, FileType};

/// The kernel's words as the protocol's.
pub(crate) fn info(stat: &FileStat) -> FileInfo {
    FileInfo {
        file_type: file_type(stat),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        allocated: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512),
        mtime_s: stat.st_mtime,
        mtime_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        links: stat.st_nlink,
        inode: stat.st_ino,
        target: None,
    }
}

/// What is said of a name that cannot be looked at.
pub(crate) fn unknown() -> FileInfo {
    FileInfo {
        file_type: FileType::Unknown,
        mode: 0,
        uid: 0,
        gid: 0,
        size: 0,
        allocated: 0,
        mtime_s: 0,
        mtime_ns: 0,
        links: 0,
        inode: 0,
        target: None,
    }
}

/// What kind of file it is.
pub(crate) fn file_type(stat: &FileStat) -> FileType {
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileType::Regular,
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::Fifo,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        _ => FileType::Unknown,
    }
}

/// Where the link `name` in `directory` points, as far as that can be read.
pub(crate) fn target(directory: BorrowedFd<'_>, name: &OsStr) -> Option<Vec<u8>> {
    nix::fcntl::readlinkat(directory, name)
        .ok()
        .map(OsStringExt::into_vec)
}
