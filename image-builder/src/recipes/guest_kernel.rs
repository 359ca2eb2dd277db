//! The guest kernel: Debian's source of Linux 6.12 with the options of `guest-kernel.config` and
//! nothing else, as a bare ELF file. It must never come out with an option silently dropped.

use std::path::{Path, PathBuf};

use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::debian::{self, Package};
use crate::files::{self, AtPath as _};
use crate::kconfig;
use crate::progress::Progress;
use crate::tool::Tool;

/// The source package.
pub(crate) const SOURCE: &str = "linux-source-6.12";

const ARTIFACT: &str = "guest-kernel";
const FRAGMENT: &str = include_str!("../../guest-kernel.config");
const MAX_BYTES: u64 = 32 << 20;

/// What goes into the kernel's banner; fixed, so that equal inputs give an equal kernel.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "supvm"),
    ("KBUILD_BUILD_HOST", "supvm"),
];

/// Increased when the way of building changes.
const RECIPE: &str = "guest-kernel 1";

/// The directory with `vmlinux`, `config` and `System.map`.
pub(crate) fn make(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let source = kitchen.apt()?.resolve(SOURCE)?;
    let mut inputs = Inputs::new(RECIPE);
    inputs
        .add("fragment", FRAGMENT)
        .add("source", &source.version);
    for tool in ["gcc", "binutils"] {
        inputs.add(tool, debian::installed_version(tool));
    }
    kitchen
        .cache
        .ensure(ARTIFACT, &inputs.key(), |out| build(kitchen, &source, out))
}

fn build(kitchen: &Kitchen, source: &Package, out: &Path) -> Result<(), RecipeError> {
    let log = kitchen.log(ARTIFACT);
    let mut progress = Progress::start(ARTIFACT);
    let work = out.join("work");

    progress.phase(&format!("fetching {} {}", source.name, source.version));
    let deb = kitchen
        .apt()?
        .download(source, &work.join("deb"), &log, &mut progress)?;
    progress.phase("unpacking the source");
    debian::unpack(&deb, &work.join("package"), &log, &mut progress)?;
    let tarball = work.join(format!("package/usr/src/{SOURCE}.tar.xz"));
    let tree = work.join("tree");
    files::make_dir(&tree)?;
    Tool::new("tar")
        .args(["--strip-components=1", "-xf"])
        .arg(&tarball)
        .arg("-C")
        .arg(&tree)
        .run(&log, &mut progress)?;

    progress.phase("configuring");
    let fragment = work.join("fragment");
    files::replace(&fragment, FRAGMENT.as_bytes())?;
    let objects = work.join("objects");
    files::make_dir(&objects)?;
    make_in(&tree, &objects)
        .env("KCONFIG_ALLCONFIG", &fragment)
        .arg("allnoconfig")
        .run(&log, &mut progress)?;
    let config = objects.join(".config");
    kconfig::check(FRAGMENT, &files::read_text(&config)?)?;

    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    progress.phase(&format!("compiling on {jobs} cores"));
    make_in(&tree, &objects)
        .arg(format!("-j{jobs}"))
        .arg("vmlinux")
        .run(&log, &mut progress)?;

    let vmlinux = out.join("vmlinux");
    Tool::new("strip")
        .arg("--strip-all")
        .arg("-o")
        .arg(&vmlinux)
        .arg(objects.join("vmlinux"))
        .run(&log, &mut progress)?;
    let bytes = std::fs::metadata(&vmlinux).at("look at", &vmlinux)?.len();
    if bytes > MAX_BYTES {
        return Err(RecipeError::KernelTooLarge {
            bytes,
            limit: MAX_BYTES,
        });
    }
    files::copy(&config, &out.join("config"))?;
    files::copy(&objects.join("System.map"), &out.join("System.map"))?;
    std::fs::remove_dir_all(&work).at("remove", &work)?;
    progress.done(&format!("built, {} MiB", bytes >> 20));
    Ok(())
}

fn make_in(tree: &Path, objects: &Path) -> Tool {
    let mut tool = Tool::new("make").arg("-C").arg(tree);
    for (name, value) in ENVIRONMENT {
        tool = tool.env(name, value);
    }
    tool.arg(format!("O={}", objects.display()))
        .arg("ARCH=x86_64")
}
