//! Writes the newc cpio archives a kernel unpacks into its first root. The bytes depend on names and
//! contents only (sorted, owner 0, time 0), no root is needed for device nodes, and each archive ends
//! on a multiple of four bytes, so that archives can be put one after the other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use cpio::newc;

use crate::files::{AtPath as _, FileError};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// A name or a file that an archive cannot hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The name is absolute, empty, has odd components or is not UTF-8.
    #[error("{0:?} is no name for a cpio entry: plain relative UTF-8 paths only")]
    Name(PathBuf),
    /// Two entries of one name.
    #[error("the cpio archive already has {0}")]
    Twice(String),
    /// newc lengths are 32 bits.
    #[error("{} has {length} bytes; a cpio entry holds less than 4 GiB", path.display())]
    Long {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// The length changed while it was copied.
    #[error("{} changed while it was being archived", .0.display())]
    Changed(PathBuf),
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The archive could not be written.
    #[error("cannot write the cpio archive: {0}")]
    Write(#[source] io::Error),
}

enum Content {
    Directory,
    Bytes(Vec<u8>),
    File { path: PathBuf, length: u32 },
    Device { major: u32, minor: u32 },
}

struct Entry {
    mode: u32,
    content: Content,
}

/// An archive in the making.
#[derive(Default)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// A directory; those above it are made too. Having it already is no error.
    pub(crate) fn directory(&mut self, name: impl AsRef<Path>) -> Result<(), ArchiveError> {
        let name = plain(name.as_ref())?;
        self.parents(&name);
        self.entries.entry(name).or_insert(Entry {
            mode: DIRECTORY | 0o755,
            content: Content::Directory,
        });
        Ok(())
    }

    /// A file of this machine, with the permissions `mode`.
    pub(crate) fn file(
        &mut self,
        name: impl AsRef<Path>,
        path: &Path,
        mode: u32,
    ) -> Result<(), ArchiveError> {
        let length = fs::metadata(path).at("look at", path)?.len();
        let length = u32::try_from(length).map_err(|_| ArchiveError::Long {
            path: path.to_owned(),
            length,
        })?;
        let content = Content::File {
            path: path.to_owned(),
            length,
        };
        self.insert(name.as_ref(), REGULAR | mode, content)
    }

    /// A character device.
    pub(crate) fn device(
        &mut self,
        name: impl AsRef<Path>,
        major: u32,
        minor: u32,
    ) -> Result<(), ArchiveError> {
        let content = Content::Device { major, minor };
        self.insert(name.as_ref(), CHARACTER | 0o600, content)
    }

    /// Everything below `root`: directories, symbolic links and files (0644, or 0755
    /// when they can be run), under `name`.
    pub(crate) fn tree(&mut self, name: impl AsRef<Path>, root: &Path) -> Result<(), ArchiveError> {
        let name = name.as_ref();
        self.directory(name)?;
        for entry in fs::read_dir(root).at("list", root)? {
            let entry = entry.at("list", root)?;
            let (path, name) = (entry.path(), name.join(entry.file_name()));
            let kind = entry.file_type().at("look at", &path)?;
            if kind.is_dir() {
                self.tree(name, &path)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).at("read the link", &path)?;
                let target = target.as_os_str().as_bytes().to_vec();
                self.insert(&name, SYMLINK | 0o777, Content::Bytes(target))?;
            } else {
                let mode = entry.metadata().at("look at", &path)?.mode();
                let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
                self.file(name, &path, mode)?;
            }
        }
        Ok(())
    }

    fn insert(&mut self, name: &Path, mode: u32, content: Content) -> Result<(), ArchiveError> {
        let name = plain(name)?;
        self.parents(&name);
        if self.entries.contains_key(&name) {
            return Err(ArchiveError::Twice(name));
        }
        self.entries.insert(name, Entry { mode, content });
        Ok(())
    }

    fn parents(&mut self, name: &str) {
        for (end, _) in name.match_indices('/') {
            if let Some(parent) = name.get(..end) {
                self.entries.entry(parent.to_owned()).or_insert(Entry {
                    mode: DIRECTORY | 0o755,
                    content: Content::Directory,
                });
            }
        }
    }

    /// Writes the archive, its trailer included.
    pub(crate) fn write(&self, out: &mut impl Write) -> Result<(), ArchiveError> {
        for (index, (name, entry)) in (1..).zip(&self.entries) {
            let links = if matches!(entry.content, Content::Directory) {
                2
            } else {
                1
            };
            let mut builder = newc::Builder::new(name)
                .ino(index)
                .nlink(links)
                .mode(entry.mode);
            let (length, mut content): (u32, Box<dyn io::Read>) = match &entry.content {
                Content::Directory => (0, Box::new(io::empty())),
                Content::Device { major, minor } => {
                    builder = builder.rdev_major(*major).rdev_minor(*minor);
                    (0, Box::new(io::empty()))
                }
                Content::Bytes(bytes) => {
                    let length = u32::try_from(bytes.len()).map_err(|_| ArchiveError::Long {
                        path: name.into(),
                        length: bytes.len() as u64,
                    })?;
                    (length, Box::new(bytes.as_slice()))
                }
                Content::File { path, length } => {
                    let file = File::open(path).at("open", path)?;
                    // One byte more than promised tells a file that has grown.
                    (*length, Box::new(file.take(u64::from(*length) + 1)))
                }
            };
            let mut writer = builder.write(&mut *out, length);
            match io::copy(&mut content, &mut writer) {
                Ok(copied) if copied == u64::from(length) => {}
                Ok(_) => return Err(ArchiveError::Changed(name.into())),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(ArchiveError::Changed(name.into()));
                }
                Err(error) => return Err(ArchiveError::Write(error)),
            }
            writer.finish().map_err(ArchiveError::Write)?;
        }
        newc::trailer(out).map(drop).map_err(ArchiveError::Write)
    }

    /// Writes the archive to a file that appears only when it is complete.
    pub(crate) fn write_to(&self, path: &Path) -> Result<(), ArchiveError> {
        self.write_with(path, |_| Ok(()))
    }

    /// As [`Archive::write_to`]; `append` then puts further whole archives behind it.
    pub(crate) fn write_with(
        &self,
        path: &Path,
        append: impl FnOnce(&mut io::BufWriter<&mut File>) -> io::Result<()>,
    ) -> Result<(), ArchiveError> {
        let mut failed = None;
        let written = crate::files::write_whole(path, |file| {
            let mut out = io::BufWriter::with_capacity(1 << 20, file);
            if let Err(error) = self.write(&mut out) {
                failed = Some(error);
                return Err(io::Error::other("archive not written"));
            }
            append(&mut out)?;
            out.flush()
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }
}

/// The archive's name for a relative path of ordinary components.
fn plain(name: &Path) -> Result<String, ArchiveError> {
    let odd = || ArchiveError::Name(name.to_owned());
    let text = name.to_str().ok_or_else(odd)?;
    let fine = !text.is_empty()
        && text
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    if fine {
        Ok(text.to_owned())
    } else {
        Err(odd())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn sample(dir: &Path) -> Archive {
        let file = dir.join("five");
        fs::write(&file, "12345").unwrap();
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/x"), "x").unwrap();
        fs::write(tree.join("run"), "").unwrap();
        fs::set_permissions(tree.join("run"), fs::Permissions::from_mode(0o740)).unwrap();
        std::os::unix::fs::symlink("sub/x", tree.join("link")).unwrap();
        let mut archive = Archive::default();
        archive.file("init", &file, 0o755).unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        archive.directory("proc").unwrap();
        archive.tree("lib/tree", &tree).unwrap();
        archive
    }

    fn bytes(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        archive.write(&mut out).unwrap();
        out
    }

    fn cpio(args: &[&str], input: &[u8]) -> String {
        let mut child = Command::new("cpio")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn the_system_cpio_lists_what_was_put_in() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = bytes(&sample(dir.path()));
        assert_eq!(
            cpio(&["-t", "--quiet"], &bytes).lines().collect::<Vec<_>>(),
            [
                "dev",
                "dev/console",
                "init",
                "lib",
                "lib/tree",
                "lib/tree/link",
                "lib/tree/run",
                "lib/tree/sub",
                "lib/tree/sub/x",
                "proc"
            ]
        );
        let long = cpio(&["-tvn", "--quiet"], &bytes);
        let line = |name: &str| {
            long.lines()
                .find(|line| line.contains(&format!(" {name}")))
                .unwrap_or_else(|| panic!("no {name} in {long}"))
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let console = line("dev/console");
        assert_eq!(console[..6], ["crw-------", "1", "0", "0", "5,", "1"]);
        assert_eq!(line("init")[..5], ["-rwxr-xr-x", "1", "0", "0", "5"]);
        assert_eq!(line("lib/tree/run")[0], "-rwxr-xr-x");
        assert_eq!(line("lib/tree/sub/x")[0], "-rw-r--r--");
        assert!(long.contains("lib/tree/link -> sub/x"), "{long}");
    }

    #[test]
    fn the_header_is_newc_byte_for_byte() {
        let mut archive = Archive::default();
        archive.device("dev/console", 5, 1).unwrap();
        let bytes = bytes(&archive);
        let directory = "070701000000010000\
            41ed00000000000000000000000200000000000000000000000000000000000000000000000000000004\
            00000000dev\0";
        let console = "070701000000020000\
            2180000000000000000000000001000000000000000000000000000000000000000500000001\
            0000000c00000000dev/console\0";
        let trailer = "TRAILER!!!\0";
        let at = |text: &str, start: usize| {
            assert_eq!(
                String::from_utf8_lossy(&bytes[start..start + text.len()]),
                text
            );
        };
        at(directory, 0);
        // 110 + 4 bytes are padded to 116, 110 + 12 to 124.
        at(console, 116);
        at(trailer, 116 + 124 + 110);
        assert_eq!(bytes.len(), 116 + 124 + 124);
    }

    #[test]
    fn archives_can_be_put_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let first = sample(dir.path());
        let path = dir.path().join("out.cpio");
        let mut second = Archive::default();
        second
            .file("etc/supvm.toml", &dir.path().join("five"), 0o644)
            .unwrap();
        let more = bytes(&second);
        first.write_with(&path, |out| out.write_all(&more)).unwrap();
        let both = fs::read(&path).unwrap();
        let split = both.len() - more.len();
        assert_eq!(split % 4, 0);
        assert_eq!(&both[..split], bytes(&first));
        assert_eq!(
            cpio(&["-t", "--quiet"], &both[split..]),
            "etc\netc/supvm.toml\n"
        );
    }

    #[test]
    fn order_and_times_of_the_sources_do_not_show() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = bytes(&sample(one.path()));
        let old = std::time::SystemTime::UNIX_EPOCH;
        let archive = sample(two.path());
        File::options()
            .write(true)
            .open(two.path().join("five"))
            .unwrap()
            .set_modified(old)
            .unwrap();
        assert_eq!(first, bytes(&archive));
    }

    #[test]
    fn odd_names_and_doubles_are_refused() {
        let mut archive = Archive::default();
        for name in ["/abs", "a//b", "../up", "a/./b", ""] {
            assert!(matches!(
                archive.directory(name),
                Err(ArchiveError::Name(_))
            ));
        }
        archive.device("x", 1, 3).unwrap();
        assert!(matches!(
            archive.device("x", 1, 3),
            Err(ArchiveError::Twice(_))
        ));
    }

    #[test]
    fn a_file_that_changed_meanwhile_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        for now in ["1234", "123456"] {
            let archive = {
                let mut archive = Archive::default();
                fs::write(dir.path().join("f"), "12345").unwrap();
                archive.file("f", &dir.path().join("f"), 0o644).unwrap();
                archive
            };
            fs::write(dir.path().join("f"), now).unwrap();
            assert!(matches!(
                archive.write(&mut Vec::new()),
                Err(ArchiveError::Changed(_))
            ));
        }
    }
}
