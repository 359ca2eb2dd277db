//! The size of the root file system: what its superblock says, and growing it to its device while
//! it is mounted. The superblock is the user's and believed in nothing but this.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// The disk in a virtual machine.
pub(crate) const ROOT_DEVICE: &str = "/dev/vda";

/// Why the disk could not be measured or grown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// A file operation failed.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// There is no ext4 file system on it.
    #[error("{0} holds no ext4 file system that can be read")]
    NotExt4(PathBuf),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_path_buf();
    move |cause| DiskError::Io { what, path, cause }
}

mod request {
    //! Requests to block devices and ext4, by their numbers in the kernel's headers.
    use nix::{ioctl_read, ioctl_write_ptr};
    ioctl_read!(device_bytes, 0x12, 114, u64);
    ioctl_write_ptr!(resize, b'f', 16, u64);
}

/// Bytes of the root file system as users see them.
pub(crate) fn root_bytes() -> Result<u64, DiskError> {
    let about = nix::sys::statvfs::statvfs("/")
        .map_err(|errno| failed("measure", Path::new("/"))(errno.into()))?;
    Ok(about.blocks().saturating_mul(about.fragment_size()))
}

/// Grows the root file system to the size of its disk.
pub(crate) fn grow_root() -> Result<(), DiskError> {
    grow(Path::new(ROOT_DEVICE), Path::new("/")).map(drop)
}

/// Grows the ext4 file system on `device`, mounted at `mounted`, to the device's size. Gives its
/// blocks before and after.
fn grow(device: &Path, mounted: &Path) -> Result<(u64, u64), DiskError> {
    let disk = File::open(device).map_err(failed("open", device))?;
    let mut bytes = 0;
    // SAFETY: the request writes one u64 to the valid place it is given.
    unsafe { request::device_bytes(disk.as_raw_fd(), &raw mut bytes) }
        .map_err(|errno| failed("measure", device)(errno.into()))?;
    let now = superblock(device, &disk)?;
    let wanted = bytes.checked_div(now.block_size).unwrap_or(0);
    if wanted <= now.blocks {
        return Ok((now.blocks, now.blocks));
    }
    let root = File::open(mounted).map_err(failed("open", mounted))?;
    // SAFETY: the request reads one u64, which lives across the call.
    match unsafe { request::resize(root.as_raw_fd(), &raw const wanted) } {
        Ok(_) => Ok((now.blocks, superblock(device, &disk)?.blocks)),
        Err(errno @ Errno::EOPNOTSUPP) => Err(failed(
            "grow, because it was made without room to grow,",
            mounted,
        )(errno.into())),
        Err(errno) => Err(failed("grow", mounted)(errno.into())),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    blocks: u64,
    block_size: u64,
}

fn superblock(path: &Path, disk: &File) -> Result<Superblock, DiskError> {
    let mut bytes = [0; 1024];
    disk.read_exact_at(&mut bytes, 1024)
        .map_err(failed("read", path))?;
    parse(&bytes).ok_or_else(|| DiskError::NotExt4(path.to_path_buf()))
}

fn parse(bytes: &[u8; 1024]) -> Option<Superblock> {
    let number = |offset: usize| {
        let four = bytes.get(offset..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*four))
    };
    let magic = bytes.get(0x38..)?.first_chunk::<2>()?;
    let log_size = number(0x18)?;
    if *magic != [0x53, 0xef] || log_size > 6 {
        return None;
    }
    let has_64_bits = number(0x60)? & 0x80 != 0;
    let high = if has_64_bits { number(0x150)? } else { 0 };
    Some(Superblock {
        blocks: u64::from(number(0x4)?) | u64::from(high) << 32,
        block_size: 1024_u64 << log_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_superblock_that_lies_is_no_superblock() {
        let mut bytes = [0; 1024];
        assert_eq!(parse(&bytes), None);
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x18] = 200;
        assert_eq!(parse(&bytes), None);
    }

    /// Needs root, a loop device and mkfs.ext4, and fails without them. On a machine that withholds
    /// CAP_SYS_RESOURCE from root it says so and checks only that the refusal is named.
    #[test]
    fn a_mounted_file_system_grows_to_its_device() {
        fn run(program: &str, arguments: &[&str]) -> String {
            let output = Command::new(program).args(arguments).output().unwrap();
            assert!(output.status.success(), "{program}: {output:?}");
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        }
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let mounted = directory.path().join("mounted");
        std::fs::create_dir(&mounted).unwrap();
        let (image, mounted) = (image.to_str().unwrap(), mounted.to_str().unwrap());
        File::create(image).unwrap().set_len(256 << 20).unwrap();
        run("mkfs.ext4", &["-q", "-b", "4096", image, "64M"]);
        let device = run("losetup", &["--find", "--show", image]);
        run("mount", &["-t", "ext4", &device, mounted]);
        let grown = grow(Path::new(&device), Path::new(mounted));
        let again = grow(Path::new(&device), Path::new(mounted));
        let before = superblock(Path::new(&device), &File::open(&device).unwrap());
        run("umount", &[mounted]);
        run("losetup", &["--detach", &device]);
        if may_resize() {
            assert_eq!(grown.unwrap(), (16_384, 65_536));
            assert_eq!(again.unwrap(), (65_536, 65_536));
        } else {
            eprintln!("growing itself was not tested: CAP_SYS_RESOURCE is missing here");
            assert_eq!(before.unwrap().blocks, 16_384);
            let error = grown.unwrap_err().to_string();
            assert!(
                error.contains("cannot grow") && error.contains(mounted),
                "{error}"
            );
        }
    }

    /// Whether this process has CAP_SYS_RESOURCE.
    fn may_resize() -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("CapEff:"))
            .unwrap();
        let set = u64::from_str_radix(line["CapEff:".len()..].trim(), 16).unwrap();
        set & (1 << 24) != 0
    }
}
