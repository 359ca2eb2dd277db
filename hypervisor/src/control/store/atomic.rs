//! Files that are replaced whole: written beside the old one, made durable, renamed over it. After
//! a crash there is the old content or the new one, never a mixture.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{StoreError, step};

/// Makes the names in a directory durable.
pub(crate) fn fsync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(StoreError::io("sync", path))
}

/// Replaces `path`; the new content is durable when this returns. Writers of one path take turns.
pub(crate) fn write_replacing(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let written = write_new(&temporary, bytes, mode)
        .map_err(StoreError::io("write", &temporary))
        .and_then(|()| {
            step("replace: temporary written")?;
            fs::rename(&temporary, path).map_err(StoreError::io("replace", path))
        });
    if written.is_err() && !died(&written) {
        // The old content stays; a left-over is harmless, the next writer replaces it.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    step("replace: renamed")?;
    path.parent().map_or(Ok(()), fsync_dir)
}

/// Writes a new file and makes its content durable, not its name.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The whole file; none when there is no such file.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(StoreError::io("read", path)(cause)),
    }
}

/// Whether a test made the process "die" here, so that no clean-up may run.
pub(crate) fn died<T>(_result: &Result<T, StoreError>) -> bool {
    #[cfg(test)]
    if matches!(_result, Err(StoreError::Died(_))) {
        return true;
    }
    false
}
