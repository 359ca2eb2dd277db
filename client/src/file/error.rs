//! What the file system in a VM refused, with the name of the errno and the path, so that programs
//! can act on it as they would on a file of their own machine.

use std::io;

use protocol::{ErrorBody, ErrorCode};

/// The codes of files.
const CODES: std::ops::RangeInclusive<u16> = 64..=81;

/// An operation on files in a VM that was refused.
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// match vm.stat("notes.txt").await {
///     Err(error) if error.file().and_then(|file| file.errno()) == Some("ENOENT") => {
///         println!("there are no notes");
///     }
///     other => println!("{} bytes", other?.size),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", body.message)]
pub struct FileError {
    body: ErrorBody,
    errno: Option<String>,
    path: Option<String>,
    appended: Option<u64>,
}

impl FileError {
    /// Gives back what is no error of files.
    pub(crate) fn new(body: ErrorBody) -> Result<Self, ErrorBody> {
        let named = named_errno(&body);
        if !CODES.contains(&body.code.to_wire()) && named.is_none() {
            return Err(body);
        }
        let (errno, path) = match named {
            Some((errno, path)) => (Some(errno.to_owned()), Some(path.to_owned())),
            None => (usual_errno(body.code).map(str::to_owned), None),
        };
        let appended = appended(&body);
        let path = match (path, appended) {
            (Some(mut path), Some((line, _))) => {
                path.truncate(path.len().saturating_sub(line.len().saturating_add(1)));
                Some(path)
            }
            (path, _) => path,
        };
        let appended = appended.map(|(_, count)| count);
        Ok(Self {
            body,
            errno,
            path,
            appended,
        })
    }

    /// Of an append that failed half-way: how many of the bytes that were sent are in the file.
    pub fn appended(&self) -> Option<u64> {
        self.appended
    }

    /// The whole answer.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// What went wrong, as the protocol counts.
    pub fn code(&self) -> ErrorCode {
        self.body.code
    }

    /// The name of the errno: `ENOENT`. None where no system call failed.
    pub fn errno(&self) -> Option<&str> {
        self.errno.as_deref()
    }

    /// The path, if the agent named it. What was no UTF-8 in it is U+FFFD.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    pub(crate) fn kind(&self) -> io::ErrorKind {
        match self.code() {
            ErrorCode::NoSuchFile => io::ErrorKind::NotFound,
            ErrorCode::NotADirectory => io::ErrorKind::NotADirectory,
            ErrorCode::IsADirectory => io::ErrorKind::IsADirectory,
            ErrorCode::FileExists => io::ErrorKind::AlreadyExists,
            ErrorCode::NoSpace => io::ErrorKind::StorageFull,
            ErrorCode::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            ErrorCode::PermissionDenied => io::ErrorKind::PermissionDenied,
            ErrorCode::DirectoryNotEmpty => io::ErrorKind::DirectoryNotEmpty,
            ErrorCode::FileBusy => io::ErrorKind::ResourceBusy,
            ErrorCode::FileTooLarge => io::ErrorKind::FileTooLarge,
            ErrorCode::CrossDevice => io::ErrorKind::CrossesDevices,
            ErrorCode::InvalidArgument => io::ErrorKind::InvalidInput,
            ErrorCode::ContentMismatch | ErrorCode::BadArchive => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        }
    }
}

/// The two lines of an error of files: the errno's name and the path.
fn named_errno(body: &ErrorBody) -> Option<(&str, &str)> {
    let (errno, path) = body.detail.split_once('\n')?;
    let mut letters = errno.bytes();
    let is_errno = errno.len() <= 16
        && letters.next() == Some(b'E')
        && errno.len() > 1
        && letters.all(|letter| letter.is_ascii_uppercase() || letter.is_ascii_digit());
    is_errno.then_some((errno, path))
}

/// The last line of an append's error and its number. A path may end so, but not the sentence, too.
fn appended(body: &ErrorBody) -> Option<(&str, u64)> {
    let line = body.detail.rsplit('\n').next()?;
    let count = line.strip_prefix("appended ")?.parse().ok()?;
    let said = format!("; {count} bytes were appended before that");
    body.message.ends_with(&said).then_some((line, count))
}

fn usual_errno(code: ErrorCode) -> Option<&'static str> {
    Some(match code {
        ErrorCode::NoSuchFile => "ENOENT",
        ErrorCode::NotADirectory => "ENOTDIR",
        ErrorCode::IsADirectory => "EISDIR",
        ErrorCode::FileExists => "EEXIST",
        ErrorCode::NoSpace => "ENOSPC",
        ErrorCode::ReadOnly => "EROFS",
        ErrorCode::PermissionDenied => "EACCES",
        ErrorCode::NameTooLong => "ENAMETOOLONG",
        ErrorCode::TooManyLinks => "ELOOP",
        ErrorCode::FileBusy => "EBUSY",
        ErrorCode::DirectoryNotEmpty => "ENOTEMPTY",
        ErrorCode::FileTooLarge => "EFBIG",
        ErrorCode::CrossDevice => "EXDEV",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_files_names_errno_and_path_and_others_stay_what_they_are() {
        let body = ErrorBody::caller(ErrorCode::NoSuchFile, "x").with_detail("ENOENT\n/a\nb");
        let error = FileError::new(body).unwrap();
        assert_eq!(
            (error.errno(), error.path()),
            (Some("ENOENT"), Some("/a\nb"))
        );
        let bare = FileError::new(ErrorBody::caller(ErrorCode::FileBusy, "x")).unwrap();
        assert_eq!((bare.errno(), bare.path()), (Some("EBUSY"), None));
        let mismatch = ErrorBody::caller(ErrorCode::ContentMismatch, "x");
        assert_eq!(FileError::new(mismatch).unwrap().errno(), None);
        let invalid = ErrorBody::caller(ErrorCode::InvalidArgument, "x").with_detail("EINVAL\n/a");
        assert_eq!(FileError::new(invalid).unwrap().errno(), Some("EINVAL"));
        let line = "ENOSPC\n/a\nappended 7";
        let message = "no room; 7 bytes were appended before that";
        let append = ErrorBody::guest(ErrorCode::NoSpace, message).with_detail(line);
        let append = FileError::new(append).unwrap();
        assert_eq!((append.path(), append.appended()), (Some("/a"), Some(7)));
        let odd = ErrorBody::guest(ErrorCode::NoSpace, "no room").with_detail(line);
        let odd = FileError::new(odd).unwrap();
        assert_eq!((odd.path(), odd.appended()), (Some("/a\nappended 7"), None));
        for detail in ["", "console\nlines", "E\n/a", "Eh\n/a"] {
            let other = ErrorBody::host(ErrorCode::BootFailed, "x").with_detail(detail);
            assert!(FileError::new(other).is_err(), "{detail}");
        }
    }
}
