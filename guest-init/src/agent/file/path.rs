//! Paths from a client: bytes that become a path once, here. Whoever holds a [`PathBuf`] from here
//! knows that it is absolute and has no zero byte. `..` and links are the owner's own business.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use protocol::ErrorBody;

use super::error::{invalid, refused};

/// Symbolic links that are followed one after the other, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// Makes a path of a client's bytes.
pub(crate) fn parse(bytes: Vec<u8>, workspace: &Path) -> Result<PathBuf, ErrorBody> {
    if bytes.contains(&0) {
        return Err(invalid("the path contains a zero byte"));
    }
    Ok(workspace.join(OsString::from_vec(bytes)))
}

/// A path as the directory that the last name is in, and that name.
#[derive(Debug)]
pub(crate) struct Place {
    /// The directory, opened to nothing but name things in it.
    pub(crate) parent: OwnedFd,
    /// The last name.
    pub(crate) name: OsString,
}

/// Splits a path into directory and name. Slashes at the end do not count.
pub(crate) fn split(path: &Path) -> Result<(PathBuf, OsString), ErrorBody> {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes
        .iter()
        .rposition(|byte| *byte != b'/')
        .map_or(0, |last| last.saturating_add(1));
    let bytes = bytes.get(..end).unwrap_or_default();
    let start = bytes
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |slash| slash.saturating_add(1));
    let name = bytes.get(start..).unwrap_or_default();
    if name.is_empty() || name == b"." || name == b".." {
        let shown = super::error::show(path);
        return Err(invalid(format!("{shown} does not end in a name")));
    }
    let parent = bytes.get(..start).unwrap_or_default();
    Ok((
        PathBuf::from(OsStr::from_bytes(parent)),
        OsStr::from_bytes(name).to_owned(),
    ))
}

impl Place {
    /// Opens the directory that the last name is in.
    pub(crate) fn open(path: &Path) -> Result<Self, ErrorBody> {
        let (parent, name) = split(path)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent =
            open(&parent, flags, Mode::empty()).map_err(|errno| refused("find", path, errno))?;
        Ok(Self { parent, name })
    }
}

/// Whether the path says that it is a directory: it ends with a slash or a dot.
pub(crate) fn names_directory(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.") || bytes.ends_with(b"/..")
}

/// Follows links in the last place of the path until there is none: what is found there, or
/// nothing, is what a write goes to.
pub(crate) fn follow(path: &Path) -> Result<PathBuf, ErrorBody> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match nix::fcntl::readlink(&path) {
            Ok(target) => {
                let (parent, _) = split(&path)?;
                path = parent.join(target);
            }
            Err(_) => return Ok(path),
        }
    }
    Err(refused("follow", &path, Errno::ELOOP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_start_at_the_workspace_and_zero_bytes_are_refused() {
        let at = |bytes: &[u8]| parse(bytes.to_vec(), Path::new("/w"));
        assert_eq!(at(b"a/b").unwrap(), Path::new("/w/a/b"));
        assert_eq!(at(b"/a").unwrap(), Path::new("/a"));
        assert_eq!(at(b"").unwrap(), Path::new("/w/"));
        assert!(at(b"a\0b").is_err());
    }

    #[test]
    fn the_last_name_is_found_behind_any_number_of_slashes() {
        let both = |text: &str| split(Path::new(text)).unwrap();
        assert_eq!(both("/a//b//"), (PathBuf::from("/a//"), "b".into()));
        assert_eq!(both("/b"), (PathBuf::from("/"), "b".into()));
        for odd in ["/", "//", "/a/..", "/a/."] {
            assert!(split(Path::new(odd)).is_err(), "{odd}");
        }
    }
}
