//! The peer of the benchmark: Debian's QEMU with its libraries and firmware, as an archive that is put
//! behind the host's first root, so that `qemu-system-x86_64 -M microvm` runs in the same appliance.
//! It holds the installed files as they are and is in no image that is shipped.

use std::path::{Path, PathBuf};

use super::{Kitchen, RecipeError};
use crate::archive::Archive;
use crate::cache::Inputs;
use crate::debian;
use crate::files::AtPath as _;
use crate::progress::Progress;
use crate::tool::Tool;

const ARTIFACT: &str = "peer-qemu";
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-data", "seabios", "libc6"];
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// What `-M microvm -kernel` reads besides the program.
const FIRMWARE: [&str; 6] = [
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios-microvm.bin",
];

/// The directory with `peer-qemu.cpio`.
pub(crate) fn make(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let mut inputs = Inputs::new("peer-qemu 1");
    inputs.add("firmware", FIRMWARE.join(","));
    for package in PACKAGES {
        inputs.add(package, debian::installed_version(package));
    }
    kitchen.cache.ensure(ARTIFACT, &inputs.key(), |out| {
        let mut progress = Progress::start(ARTIFACT);
        progress.phase("packing the installed QEMU");
        let mut archive = Archive::default();
        archive.file(inside(PROGRAM), Path::new(PROGRAM), 0o755)?;
        for file in FIRMWARE {
            archive.file(inside(file), Path::new(file), 0o644)?;
        }
        let listing = Tool::new("ldd").arg(PROGRAM).read()?;
        for library in libraries(&listing) {
            archive.file(inside(library), Path::new(library), 0o755)?;
        }
        let packed = out.join("peer-qemu.cpio");
        archive.write_to(&packed)?;
        let bytes = std::fs::metadata(&packed).at("look at", &packed)?.len();
        progress.done(&format!("packed, {} MiB", bytes >> 20));
        Ok(())
    })
}

/// The files that `ldd` names: found libraries and the loader.
fn libraries(listing: &str) -> impl Iterator<Item = &str> {
    listing.lines().filter_map(|line| {
        let found = line.split_once("=>").map_or(line, |(_, found)| found);
        let path = found.split_whitespace().next()?;
        path.starts_with('/').then_some(path)
    })
}

/// The same path in an archive.
fn inside(path: &str) -> &str {
    path.trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_read_from_ldd() {
        let listing = "\tlinux-vdso.so.1 (0x00007f)\n\
                       \tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f)\n\
                       \tlibgone.so => not found\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<_> = libraries(listing).collect();
        assert_eq!(
            found,
            [
                "/lib/x86_64-linux-gnu/libz.so.1",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
    }
}
