//! The two disks of the appliance: the read-only system disk that carries the templates compressed,
//! and a prepared XFS data disk that has them imported. Only the data disk needs root, for one loop
//! mount in a mount namespace of its own; it must never touch another mount or disk of the machine.

use std::fs;
use std::path::{Path, PathBuf};

use super::guest_root::{self, GuestRoot};
use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::debian;
use crate::files::{self, AtPath as _};
use crate::progress::Progress;
use crate::tool::{self, Tool};

const SYSTEM: &str = "system-disk";
const DATA: &str = "data-disk";
const DATA_BYTES: u64 = 40 << 30;
const DATA_UUID: &str = "73757076-6d00-4000-8000-000000000003";
const DATA_LABEL: &str = "supvm-data";

/// Mounts `$1` on `$2` and copies the template directory `$3` to `templates/$4`, holes kept.
const IMPORT: &str = r#"
set -eu
mount -t xfs -o loop "$1" "$2"
mkdir -p -m 755 "$2/templates/$4"
cp --sparse=always "$3/disk.img" "$3/template.toml" "$2/templates/$4/"
chmod 644 "$2/templates/$4/"*
umount "$2"
"#;

/// The directory with `system.squashfs`: `/templates/debian@…/{disk.img,template.toml}`.
pub(crate) fn system(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let root = guest_root::make(kitchen)?;
    let mut inputs = Inputs::new("system-disk 1");
    inputs
        .add("root", name_of(&root.directory))
        .add("label", &root.label)
        .add(
            "squashfs-tools",
            debian::installed_version("squashfs-tools"),
        );
    kitchen.cache.ensure(SYSTEM, &inputs.key(), |out| {
        let log = kitchen.log(SYSTEM);
        let mut progress = Progress::start(SYSTEM);
        progress.phase("compressing the templates");
        let tree = out.join("tree");
        let template = tree.join("templates").join(&root.label);
        files::make_dir(&template)?;
        for file in ["disk.img", "template.toml"] {
            files::link_or_copy(&root.directory.join(file), &template.join(file))?;
        }
        let squashfs = out.join("system.squashfs");
        Tool::new("mksquashfs")
            .arg(&tree)
            .arg(&squashfs)
            .args(["-noappend", "-no-progress", "-all-root", "-no-xattrs"])
            .args(["-comp", "zstd", "-Xcompression-level", "6", "-b", "256K"])
            .args(["-mkfs-time", "0", "-all-time", "0"])
            .run(&log, &mut progress)?;
        fs::remove_dir_all(&tree).at("remove", &tree)?;
        let bytes = fs::metadata(&squashfs).at("look at", &squashfs)?.len();
        progress.done(&format!("built, {} MiB", bytes >> 20));
        Ok(())
    })
}

/// The directory with `data.qcow2`.
pub(crate) fn data(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let root = guest_root::make(kitchen)?;
    let mut inputs = Inputs::new("data-disk 1");
    inputs
        .add("root", name_of(&root.directory))
        .add("label", &root.label)
        .add("import", IMPORT)
        .add("bytes", DATA_BYTES.to_string())
        .add("identity", [DATA_UUID, DATA_LABEL].join(","))
        .add("xfsprogs", debian::installed_version("xfsprogs"));
    kitchen
        .cache
        .ensure(DATA, &inputs.key(), |out| build_data(kitchen, &root, out))
}

fn build_data(kitchen: &Kitchen, root: &GuestRoot, out: &Path) -> Result<(), RecipeError> {
    if !tool::is_root() {
        eprintln!("{DATA}: root is needed, by sudo, to mount the new file system (once)");
        // Before the spinner starts: this is where sudo may ask for a password.
        Tool::new("sudo").arg("true").read()?;
    }
    let log = kitchen.log(DATA);
    let mut progress = Progress::start(DATA);
    let raw = out.join("data.raw");

    progress.phase("making the XFS file system");
    fs::File::create(&raw)
        .and_then(|file| file.set_len(DATA_BYTES))
        .at("create", &raw)?;
    Tool::new("mkfs.xfs")
        .args(["-q", "-L", DATA_LABEL])
        .args(["-m", &format!("reflink=1,uuid={DATA_UUID}")])
        .arg(&raw)
        .run(&log, &mut progress)?;

    progress.phase("importing the template");
    let mount_point = out.join("mnt");
    files::make_dir(&mount_point)?;
    // The mount lives in a namespace of its own: it is gone when the script ends, however it ends.
    let import = if tool::is_root() {
        Tool::new("unshare")
    } else {
        Tool::new("sudo").arg("unshare")
    };
    import
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg(IMPORT)
        .arg("import")
        .arg(&raw)
        .arg(&mount_point)
        .arg(&root.directory)
        .arg(&root.label)
        .run(&log, &mut progress)?;

    progress.phase("packing as qcow2");
    let packed = out.join("data.qcow2");
    Tool::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(&packed)
        .run(&log, &mut progress)?;
    fs::remove_file(&raw).at("remove", &raw)?;
    fs::remove_dir(&mount_point).at("remove", &mount_point)?;
    let bytes = fs::metadata(&packed).at("look at", &packed)?.len();
    progress.done(&format!("built, {} MiB", bytes >> 20));
    Ok(())
}

/// A cache entry's name: it holds the hash of what it was made from.
fn name_of(entry: &Path) -> Vec<u8> {
    entry
        .file_name()
        .map(|name| name.as_encoded_bytes().to_vec())
        .unwrap_or_default()
}
