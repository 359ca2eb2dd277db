//! The two first roots: the guest's, which carries only its agent, and the host's, which is the
//! whole appliance. They are quick to write, so they go straight to their destination.

use std::fs::File;
use std::io;
use std::path::Path;

use super::RecipeError;
use crate::archive::Archive;

/// Where the appliance finds the parts of its guests.
const GUEST_DIR: &str = "usr/lib/supvm/guest";

/// Directories PID 1 of the host mounts on or writes to.
const HOST_DIRECTORIES: &[&str] = &[
    "data", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sys", "system", "tmp", "usr/bin",
    "var",
];

const GUEST_DIRECTORIES: &[&str] = &["dev", "etc", "newroot", "proc", "run", "sys", "tmp"];

/// What the host's first root is made of.
pub(crate) struct Host<'a> {
    /// The `supvm` program.
    pub(crate) supvm: &'a Path,
    /// The guest kernel.
    pub(crate) guest_vmlinux: &'a Path,
    /// The guest's first root.
    pub(crate) guest_initramfs: &'a Path,
    /// Modules and firmware, an archive of its own.
    pub(crate) modules: &'a Path,
}

/// Writes the guest's first root.
pub(crate) fn guest(guest_init: &Path, out: &Path) -> Result<(), RecipeError> {
    let mut archive = base(GUEST_DIRECTORIES)?;
    archive.file("init", guest_init, 0o755)?;
    archive.write_to(out)?;
    Ok(())
}

/// Writes the host's first root. A further archive (settings) may be put behind it.
pub(crate) fn host(parts: &Host<'_>, out: &Path) -> Result<(), RecipeError> {
    let mut archive = base(HOST_DIRECTORIES)?;
    archive.file("init", parts.supvm, 0o755)?;
    let guest = Path::new(GUEST_DIR);
    archive.file(guest.join("vmlinux"), parts.guest_vmlinux, 0o644)?;
    archive.file(guest.join("initramfs.cpio"), parts.guest_initramfs, 0o644)?;
    archive.write_with(out, |out| {
        io::copy(&mut File::open(parts.modules)?, out).map(drop)
    })?;
    Ok(())
}

/// Directories, and the console the kernel opens for PID 1 before anything is mounted.
fn base(directories: &[&str]) -> Result<Archive, RecipeError> {
    let mut archive = Archive::default();
    for directory in directories {
        archive.directory(directory)?;
    }
    archive.device("dev/console", 5, 1)?;
    archive.device("dev/null", 1, 3)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_host_archive_ends_with_the_modules_and_stays_appendable() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("supvm"), "program").unwrap();
        fs::write(at("vmlinux"), "kernel").unwrap();
        guest(&at("supvm"), &at("guest.cpio")).unwrap();
        let mut modules = Archive::default();
        modules.directory("lib/modules/6.12").unwrap();
        modules.write_to(&at("modules.cpio")).unwrap();
        let parts = Host {
            supvm: &at("supvm"),
            guest_vmlinux: &at("vmlinux"),
            guest_initramfs: &at("guest.cpio"),
            modules: &at("modules.cpio"),
        };
        host(&parts, &at("host.cpio")).unwrap();
        let (whole, tail) = (
            fs::read(at("host.cpio")).unwrap(),
            fs::read(at("modules.cpio")).unwrap(),
        );
        assert!(whole.ends_with(&tail));
        assert_eq!(whole.len() % 4, 0);
        let text = String::from_utf8_lossy(&whole);
        for name in [
            "init\0",
            "dev/console\0",
            "system\0",
            "usr/lib/supvm/guest/vmlinux\0",
        ] {
            assert!(text.contains(name), "{name:?} is missing");
        }
    }
}
