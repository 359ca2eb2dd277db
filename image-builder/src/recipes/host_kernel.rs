//! The host kernel: Debian's signed image as shipped, the modules a server needs (still compressed
//! and signed), and the firmware of Debian main. Nothing of it is built or changed here.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Kitchen, RecipeError, modules};
use crate::archive::Archive;
use crate::cache::Inputs;
use crate::debian::{self, DebianError, Package};
use crate::files::{self, AtPath as _};
use crate::progress::Progress;
use crate::tool::Tool;

/// The firmware package of Debian main.
pub(crate) const FIRMWARE: &str = "firmware-linux-free";

const ARTIFACT: &str = "host-kernel";

/// The package that stands for the newest 6.12 image on this release of Debian.
pub(crate) fn meta_package() -> Result<&'static str, DebianError> {
    Ok(match debian::release()? {
        12 => "linux-image-6.12-amd64",
        _ => "linux-image-amd64",
    })
}

/// The directory with `vmlinuz`, `host-modules.cpio`, `modules.txt` and `release`.
pub(crate) fn make(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let apt = kitchen.apt()?;
    let image = apt.resolve_through(meta_package()?, "linux-image-")?;
    let firmware = apt.resolve(FIRMWARE)?;
    let mut inputs = Inputs::new("host-kernel 1");
    inputs
        .add("image", format!("{}={}", image.name, image.version))
        .add("firmware", &firmware.version)
        .add("modules", modules::SERVER.join("\n"))
        .add("kmod", debian::installed_version("kmod"));
    kitchen.cache.ensure(ARTIFACT, &inputs.key(), |out| {
        build(kitchen, &image, &firmware, out)
    })
}

fn build(
    kitchen: &Kitchen,
    image: &Package,
    firmware: &Package,
    out: &Path,
) -> Result<(), RecipeError> {
    let log = kitchen.log(ARTIFACT);
    let mut progress = Progress::start(ARTIFACT);
    let work = out.join("work");
    let package = work.join("package");

    for wanted in [image, firmware] {
        progress.phase(&format!("fetching {} {}", wanted.name, wanted.version));
        let deb = kitchen
            .apt()?
            .download(wanted, &work.join("deb"), &log, &mut progress)?;
        debian::unpack(&deb, &package, &log, &mut progress)?;
    }

    progress.phase("choosing modules");
    let release = image
        .name
        .strip_prefix("linux-image-")
        .unwrap_or(&image.name);
    let all = below(&package, &format!("lib/modules/{release}"), image)?;
    let module_root = all
        .parent()
        .and_then(Path::parent)
        .and_then(Path::parent)
        .unwrap_or(&package);
    depmod(module_root, release, &log, &mut progress)?;
    let read = |name: &str| files::read_text(&all.join(name));
    let choice = modules::choose(
        modules::SERVER,
        &read("modules.dep")?,
        &read("modules.softdep")?,
        &read("modules.builtin")?,
    );
    if !choice.unmatched.is_empty() {
        return Err(RecipeError::NoModules {
            release: release.to_owned(),
            patterns: choice.unmatched,
        });
    }

    let chosen_root = work.join("chosen");
    let chosen = chosen_root.join("lib/modules").join(release);
    for module in &choice.modules {
        let to = chosen.join(module);
        if let Some(parent) = to.parent() {
            files::make_dir(parent)?;
        }
        files::link_or_copy(&all.join(module), &to)?;
    }
    for index in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        files::copy(&all.join(index), &chosen.join(index))?;
    }
    depmod(&chosen_root, release, &log, &mut progress)?;

    progress.phase("packing");
    let mut archive = Archive::default();
    archive.tree(format!("lib/modules/{release}"), &chosen)?;
    let from = below(&package, "lib/firmware", firmware)?;
    archive.tree("lib/firmware", &from)?;
    let packed = out.join("host-modules.cpio");
    archive.write_to(&packed)?;

    let vmlinuz = below(&package, &format!("boot/vmlinuz-{release}"), image)?;
    files::copy(&vmlinuz, &out.join("vmlinuz"))?;
    let list: Vec<&str> = choice.modules.iter().map(String::as_str).collect();
    files::replace(
        &out.join("modules.txt"),
        (list.join("\n") + "\n").as_bytes(),
    )?;
    files::replace(&out.join("release"), format!("{release}\n").as_bytes())?;
    fs::remove_dir_all(&work).at("remove", &work)?;
    let bytes = fs::metadata(&packed).at("look at", &packed)?.len();
    progress.done(&format!(
        "{release} with {} modules packed, {} MiB",
        list.len(),
        bytes >> 20
    ));
    Ok(())
}

/// A path of the package, which may keep it below `usr` (merged /usr).
fn below(root: &Path, path: &str, package: &Package) -> Result<PathBuf, RecipeError> {
    [root.join(path), root.join("usr").join(path)]
        .into_iter()
        .find(|path| path.exists())
        .ok_or_else(|| RecipeError::NotInPackage {
            package: package.name.clone(),
            what: path.to_owned(),
        })
}

fn depmod(
    root: &Path,
    release: &str,
    log: &Path,
    progress: &mut Progress,
) -> Result<(), RecipeError> {
    Tool::new("depmod")
        .arg("-b")
        .arg(root)
        .arg(release)
        .run(log, progress)?;
    Ok(())
}
