//! What a client is told when the system refuses: a code that programs act on, one sentence for a
//! person, and in the detail the name of the errno and the path.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use protocol::{ErrorBody, ErrorCode};

use crate::agent::stream::StreamError;

/// Longest path that is repeated to the client.
const MAX_SHOWN: usize = 4096;

/// Why an operation on a stream did not come to its end.
pub(crate) enum Failure {
    /// The client has gone: there is nobody to tell.
    Stream(StreamError),
    /// It is refused.
    Refused(Box<ErrorBody>),
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

impl From<ErrorBody> for Failure {
    fn from(error: ErrorBody) -> Self {
        Self::Refused(Box::new(error))
    }
}

/// An operation on a path that the system refused.
pub(crate) fn refused(what: &str, path: &Path, errno: Errno) -> ErrorBody {
    let shown = show(path);
    let (code, advice) = meaning(errno);
    let message = format!("cannot {what} {shown}: {advice}");
    let error = match code {
        ErrorCode::NoSpace | ErrorCode::FileFailed => ErrorBody::guest(code, message),
        _ => ErrorBody::caller(code, message),
    };
    error.with_detail(format!("{errno:?}\n{shown}"))
}

/// The same for errors of the standard library.
pub(crate) fn failed(what: &str, path: &Path, error: &io::Error) -> ErrorBody {
    refused(
        what,
        path,
        Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    )
}

/// A value in the request that cannot be served.
pub(crate) fn invalid(message: impl Into<String>) -> ErrorBody {
    ErrorBody::caller(ErrorCode::InvalidArgument, message)
}

/// The path for people, no longer than it has to be.
pub(crate) fn show(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let shown = bytes.get(..MAX_SHOWN).unwrap_or(bytes);
    OsStr::from_bytes(shown).to_string_lossy().into_owned()
}

fn meaning(errno: Errno) -> (ErrorCode, &'static str) {
    match errno {
        Errno::ENOENT => (ErrorCode::NoSuchFile, "no such file or directory"),
        Errno::ENOTDIR => (
            ErrorCode::NotADirectory,
            "it, or a part of the path, is no directory",
        ),
        Errno::EISDIR => (ErrorCode::IsADirectory, "it is a directory"),
        Errno::EEXIST => (ErrorCode::FileExists, "the name is taken"),
        Errno::ENOSPC => (
            ErrorCode::NoSpace,
            "no space is left on the VM's disk; remove something first",
        ),
        Errno::EDQUOT => (ErrorCode::NoSpace, "the quota is used up"),
        Errno::EROFS => (ErrorCode::ReadOnly, "the file system is read-only"),
        Errno::EACCES | Errno::EPERM => (ErrorCode::PermissionDenied, "not permitted"),
        Errno::ENAMETOOLONG => (
            ErrorCode::NameTooLong,
            "the path is longer than 4095 bytes, or a name longer than 255",
        ),
        Errno::ELOOP => (
            ErrorCode::TooManyLinks,
            "too many symbolic links on the way",
        ),
        Errno::EMLINK => (ErrorCode::TooManyLinks, "it has too many names already"),
        Errno::EBUSY | Errno::ETXTBSY => (ErrorCode::FileBusy, "it is in use"),
        Errno::ENOTEMPTY => (
            ErrorCode::DirectoryNotEmpty,
            "the directory is not empty; ask for recursive removal",
        ),
        Errno::EFBIG | Errno::EOVERFLOW => (
            ErrorCode::FileTooLarge,
            "larger than a file may be on this file system",
        ),
        Errno::EXDEV => (
            ErrorCode::CrossDevice,
            "the two names are on different file systems; copy instead",
        ),
        Errno::EINVAL => (
            ErrorCode::InvalidArgument,
            "the system takes it for invalid",
        ),
        other => (ErrorCode::FileFailed, other.desc()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_errno_and_the_path_whatever_its_bytes() {
        let path = Path::new(OsStr::from_bytes(b"/a\xff"));
        let error = refused("open", path, Errno::ENOENT);
        assert_eq!(error.code, ErrorCode::NoSuchFile);
        assert_eq!(error.detail, "ENOENT\n/a\u{fffd}");
        assert!(error.message.contains("/a"), "{}", error.message);
    }

    #[test]
    fn a_path_without_end_is_not_repeated_in_full() {
        let long = "x".repeat(1 << 20);
        let error = refused("open", Path::new(&long), Errno::ENAMETOOLONG);
        assert_eq!(error.code, ErrorCode::NameTooLong);
        assert!(error.message.len() + error.detail.len() < 9000);
    }
}
