//! File system calls whose errors name the path and what was being done. It must never hide a
//! failure and never leave a half-written file under its final name.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A file system call that failed, with what it was for.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub(crate) struct FileError {
    action: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

/// Adds the path to an I/O result.
pub(crate) trait AtPath<T> {
    /// `action` completes the sentence "cannot … PATH".
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|source| FileError {
            action,
            path: path.to_owned(),
            source,
        })
    }
}

/// Reads a whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).at("read", path)
}

/// Reads a whole text file.
pub(crate) fn read_text(path: &Path) -> Result<String, FileError> {
    fs::read_to_string(path).at("read", path)
}

/// Makes a directory and its parents.
pub(crate) fn make_dir(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).at("make the directory", path)
}

/// Copies one file, making the parents of its destination.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), FileError> {
    if let Some(parent) = to.parent() {
        make_dir(parent)?;
    }
    fs::copy(from, to).map(drop).at("copy", from)
}

/// Makes `to` the same file as `from` where the file system can, else a copy.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::hard_link(from, to).or_else(|_| copy(from, to))
}

/// Replaces `path` by `content`, whole or not at all.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write_whole(path, |file| file.write_all(content))
}

/// Lets `fill` write a file that takes its final name only when it is complete.
pub(crate) fn write_whole(
    path: &Path,
    fill: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    make_dir(parent)?;
    let mut staged = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(parent)
        .at("make a temporary file in", parent)?;
    fill(staged.as_file_mut()).at("write", path)?;
    staged
        .persist(path)
        .map(drop)
        .map_err(|error| error.error)
        .at("replace", path)
}

/// Makes `link` a symbolic link to `target`, replacing what was there.
pub(crate) fn replace_link(target: &Path, link: &Path) -> Result<(), FileError> {
    if fs::read_link(link).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let parent = link.parent().unwrap_or(Path::new("."));
    make_dir(parent)?;
    let staging = tempfile::tempdir_in(parent).at("make a directory in", parent)?;
    let staged = staging.path().join("link");
    std::os::unix::fs::symlink(target, &staged).at("link", &staged)?;
    fs::rename(&staged, link).at("replace", link)
}

/// Every regular file below `root`, as paths relative to it, sorted.
pub(crate) fn files_below(root: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).at("list", &dir)? {
            let entry = entry.at("list", &dir)?;
            let kind = entry.file_type().at("look at", &entry.path())?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file()
                && let Ok(relative) = entry.path().strip_prefix(root)
            {
                found.push(relative.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"old").unwrap();
        let failed = write_whole(&path, |file| {
            file.write_all(b"half")?;
            Err(std::io::Error::other("no more"))
        });
        assert!(failed.is_err());
        assert_eq!(read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_is_replaced_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("l");
        replace_link(Path::new("/one"), &link).unwrap();
        replace_link(Path::new("/two"), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/two"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
