//! The emulator that plays the server in tests: QEMU from the backports of Debian 13, with the
//! libraries and firmware it needs, unpacked and not installed. Its emulation of AMD's virtualization
//! is what our tests stand on, and QEMU 10.0.2, the newest that Debian 12 installs, loses VMs by it
//! (docs/performance.md). It is in no image that is shipped.

use std::path::{Path, PathBuf};

use super::resolved::{self, Selection};
use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::debian;
use crate::files::{self, AtPath as _};
use crate::progress::Progress;
use crate::tool::{self, Tool};

const ARTIFACT: &str = "emulator";

/// Below the artifact: a root with nothing but the program and what it reads, in `usr` and `lib64`.
pub(super) const ROOT: &str = "root";
/// Below the artifact: starts the program in that root from anywhere.
const LAUNCHER: &str = "qemu-system-x86_64";

const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// What `-M q35` and `-M microvm` with `-kernel` read besides the program.
const FIRMWARE: [&str; 6] = [
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
];

/// It has a libc of its own, so it runs on Debian 12 as on 13.
const SCRIPT: &str = r#"#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
exec "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
    --argv0 qemu-system-x86_64 "$root/usr/bin/qemu-system-x86_64" "$@" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios"
"#;

const SELECTION: Selection = Selection {
    artifact: "emulator-versions",
    about: "the emulator",
    suite: "trixie",
    packages: &["qemu-system-x86"],
    options: &[
        "--variant=extract",
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=APT::Default-Release \"trixie-backports\"",
    ],
    sources: &[
        "deb http://deb.debian.org/debian trixie main",
        "deb http://deb.debian.org/debian trixie-backports main",
    ],
};

/// The directory with the launcher `qemu-system-x86_64` and its root.
pub(crate) fn make(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let resolved = resolved::resolve(kitchen, &SELECTION)?;
    let mut inputs = Inputs::new("emulator 1");
    inputs
        .add("resolved", &resolved.packages)
        .add("firmware", FIRMWARE.join(","))
        .add("script", SCRIPT)
        .add("mmdebstrap", debian::installed_version("mmdebstrap"));
    kitchen
        .cache
        .ensure(ARTIFACT, &inputs.key(), |out| build(kitchen, out))
}

fn build(kitchen: &Kitchen, out: &Path) -> Result<(), RecipeError> {
    let log = kitchen.log(ARTIFACT);
    let mut progress = Progress::start(ARTIFACT);
    let (tar, all) = (out.join("all.tar"), out.join("all"));

    progress.phase("fetching QEMU with mmdebstrap");
    SELECTION
        .mmdebstrap()
        .args(["--format=tar", "--skip=output/dev"])
        .arg(if tool::is_root() {
            "--mode=root"
        } else {
            "--mode=unshare"
        })
        .arg(SELECTION.suite)
        .arg(&tar)
        .args(SELECTION.sources)
        .run(&log, &mut progress)?;
    files::make_dir(&all)?;
    Tool::new("tar")
        .args(["--no-same-owner", "-xf"])
        .arg(&tar)
        .arg("-C")
        .arg(&all)
        .arg("./usr")
        .run(&log, &mut progress)?;

    progress.phase("keeping what it needs");
    let listing = Tool::new(all.join("usr").join(LOADER))
        .arg("--library-path")
        .arg(all.join(LIBRARIES))
        .arg("--list")
        .arg(all.join(PROGRAM))
        .read()?;
    let root = out.join(ROOT);
    let libraries = libraries(&listing).map(|name| format!("{LIBRARIES}/{name}"));
    files::copy(&all.join("usr").join(LOADER), &root.join(LOADER))?;
    let wanted = [PROGRAM].into_iter().chain(FIRMWARE).map(str::to_owned);
    for file in wanted.chain(libraries) {
        files::copy(&all.join(&file), &root.join(&file))?;
    }
    let launcher = out.join(LAUNCHER);
    files::replace(&launcher, SCRIPT.as_bytes())?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&launcher, mode).at("make executable", &launcher)?;
    std::fs::remove_file(&tar).at("remove", &tar)?;
    std::fs::remove_dir_all(&all).at("remove", &all)?;
    let version = Tool::new(&launcher).arg("--version").read()?;
    let version = version.lines().next().unwrap_or("of no version");
    progress.done(version);
    Ok(())
}

/// The names of the libraries that the loader found.
fn libraries(listing: &str) -> impl Iterator<Item = &str> {
    listing.lines().filter_map(|line| {
        let (name, found) = line.trim().split_once(" => ")?;
        let is_library = found.starts_with('/') && !name.starts_with('/');
        is_library.then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_the_loader_lists() {
        let listing = "\tlinux-vdso.so.1 (0x00007f)\n\
                       \tlibz.so.1 => /c/root/usr/lib/x86_64-linux-gnu/libz.so.1 (0x00007f)\n\
                       \tlibgone.so => not found\n\
                       \t/lib64/ld-linux-x86-64.so.2 => /c/usr/lib64/ld-linux-x86-64.so.2 (0x7)\n";
        assert_eq!(libraries(listing).collect::<Vec<_>>(), ["libz.so.1"]);
    }

    #[test]
    fn the_launcher_starts_what_the_recipe_keeps() {
        for path in [PROGRAM, LOADER, LIBRARIES] {
            assert!(SCRIPT.contains(&format!("$root/{path}\"")), "{path}");
        }
    }
}
