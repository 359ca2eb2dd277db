//! Reading and writing small files on a disk that belongs to somebody else. What is there may be a
//! pipe that never answers, a device, or a file without end: none of them may block the agent or
//! fill its memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// The system refused.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// It is a pipe, a device or a directory.
    #[error("{0} is no regular file")]
    NotRegular(PathBuf),
    /// It is longer than it may be.
    #[error("{path} is longer than {limit} bytes")]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_path_buf();
    move |cause| FileError::Io { what, path, cause }
}

/// Reads a regular file of at most `limit` bytes. Never waits for a pipe's other end.
pub(crate) fn read(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed("open", path))?;
    let about = file.metadata().map_err(failed("look at", path))?;
    if !about.is_file() {
        return Err(FileError::NotRegular(path.to_path_buf()));
    }
    let mut bytes = Vec::new();
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(most)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    if bytes.len() > limit {
        return Err(FileError::TooLong {
            path: path.to_path_buf(),
            limit,
        });
    }
    Ok(bytes)
}

/// Puts a new file in the place of whatever has this name, without opening that. A file that holds
/// these bytes already is left alone.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    if read(path, bytes.len()).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".supvm-new");
    let new = PathBuf::from(name);
    // A file of this name is what a crash left behind. Nothing is opened that exists.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove", &new)(error));
        }
        _ => {}
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)
        .map_err(failed("make", &new))?;
    let written = fill(file, bytes)
        .map_err(failed("write", &new))
        .and_then(|()| fs::rename(&new, path).map_err(failed("replace", path)));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&new);
    }
    written
}

fn fill(mut file: File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn a_pipe_in_a_files_place_neither_blocks_reading_nor_writing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hostname");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        assert!(matches!(read(&path, 10), Err(FileError::NotRegular(_))));
        replace(&path, b"name\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"name\n");
    }

    #[test]
    fn a_file_without_end_is_not_read_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(read(&path, 100), Err(FileError::TooLong { .. })));
    }

    #[test]
    fn a_link_is_replaced_and_its_target_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        fs::write(&target, b"precious").unwrap();
        let path = directory.path().join("resolv.conf");
        std::os::unix::fs::symlink(&target, &path).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_directory_in_a_files_place_is_a_named_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        fs::create_dir(&path).unwrap();
        let error = replace(&path, b"new").unwrap_err();
        assert!(error.to_string().contains("hosts"), "{error}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
