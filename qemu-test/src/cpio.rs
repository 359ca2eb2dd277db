//! A writer for the `newc` archives that a kernel unpacks as its initramfs. It makes the small
//! second archive that is appended to the image's own, so that settings and the probe's shell reach
//! the appliance without being part of any image. It must never change the first archive.

/// Every archive begins and ends on such a boundary, so that archives can be concatenated.
const ALIGNMENT: usize = 4;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Why an entry cannot be part of an archive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpioError {
    /// A field of the header has eight hexadecimal digits.
    #[error("`{path}` is {length} bytes long; a newc archive holds files of up to 4 GiB")]
    TooLong {
        /// The entry.
        path: String,
        /// Its length.
        length: usize,
    },
}

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive without entries.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a directory; one that exists already is left alone by the kernel.
    pub(crate) fn directory(&mut self, path: &str) -> Result<(), CpioError> {
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    /// Adds a file with its permission bits.
    pub(crate) fn file(
        &mut self,
        path: &str,
        permissions: u32,
        data: &[u8],
    ) -> Result<(), CpioError> {
        self.entry(path, REGULAR | permissions, data)
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> Result<(), CpioError> {
        self.entry(path, SYMLINK | 0o777, target.as_bytes())
    }

    /// Closes the archive and gives its bytes, a multiple of four.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<(), CpioError> {
        let too_long = |_| CpioError::TooLong {
            path: path.to_owned(),
            length: data.len(),
        };
        let size = u32::try_from(data.len()).map_err(too_long)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_long)?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // Inode, mode, owner, group, links, time, size, four device numbers, name size, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        pad(&mut self.bytes);
        self.bytes.extend_from_slice(data);
        pad(&mut self.bytes);
        Ok(())
    }
}

/// Fills up with zeroes to the next boundary.
pub(crate) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_system_cpio_unpacks_what_was_written() {
        let mut archive = Archive::new();
        archive.directory("etc").unwrap();
        archive.file("etc/odd", 0o600, b"12345").unwrap();
        archive.symlink("link", "etc/odd").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 0);

        let directory = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["-i", "--quiet"])
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(cpio.wait().unwrap().success());
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(read("etc/odd"), b"12345");
        assert_eq!(read("link"), b"12345");
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(directory.path().join("etc/odd")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    }
}
