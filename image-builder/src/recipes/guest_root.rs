//! The guest root: Debian 13 with the promised programs, as a sparse ext4 image that grows online.
//! Nothing of the building machine may be in it: no name, no resolver, no log, no list.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::resolved::{self, Selection};
use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::debian;
use crate::files::{self, AtPath as _};
use crate::progress::Progress;
use crate::tool::{self, Tool};

/// The template's name and the first part of its version: part of its directory's name on every
/// appliance. The second part is the day of its packages' versions, so that a new one is imported
/// beside the old.
const NAME: &str = "debian";
const RELEASE: &str = "13";

const ARTIFACT: &str = "guest-root";
const FINISH: &str = include_str!("guest_root.sh");

/// Identity of the file system and date of everything in it: 2025-08-09, the day of Debian 13.
const UUID: &str = "73757076-6d00-4000-8000-000000000001";
const HASH_SEED: &str = "73757076-6d00-4000-8000-000000000002";
const EPOCH: &str = "1754697600";

const SELECTION: Selection = Selection {
    artifact: "guest-root-versions",
    about: "the guest root",
    suite: "trixie",
    packages: PACKAGES,
    options: &["--variant=minbase"],
    sources: &[],
};

const PACKAGES: &[&str] = &[
    "bash",
    "build-essential",
    "ca-certificates",
    "coreutils",
    "curl",
    "ffmpeg",
    "file",
    "git",
    "imagemagick",
    "iproute2",
    "iputils-ping",
    "jq",
    "less",
    "nodejs",
    "npm",
    "openssh-client",
    "procps",
    "python3",
    "python3-pip",
    "python3-venv",
    "sqlite3",
    "sudo",
    "unzip",
    "vim-tiny",
    "wget",
    "xz-utils",
    "zip",
    "zstd",
];

/// Run by mmdebstrap with the new root as `$1`, before it clears apt's lists away.
const CHECKS: [&str; 2] = [
    r#"chroot "$1" apt-get check"#,
    r#"chroot "$1" dpkg --audit > "$1/tmp/audit" && chroot "$1" dpkg-query -W > "$1/tmp/packages""#,
];

/// What the appliance reads beside the image.
#[derive(Serialize)]
struct Template<'a> {
    name: &'a str,
    version: &'a str,
    disk_bytes: u64,
    description: &'a str,
}

/// A finished guest root.
pub(crate) struct GuestRoot {
    /// The directory with `disk.img`, `template.toml` and `packages.txt`.
    pub(crate) directory: PathBuf,
    /// Its name as a template, like `debian@13.20260131`.
    pub(crate) label: String,
}

/// Makes it, unless the one with today's packages is there.
pub(crate) fn make(kitchen: &Kitchen) -> Result<GuestRoot, RecipeError> {
    let resolved = resolved::resolve(kitchen, &SELECTION)?;
    let version = format!("{RELEASE}.{}", resolved.since);
    let mut inputs = Inputs::new("guest-root 2");
    inputs
        .add("finish", FINISH)
        .add("suite", SELECTION.suite)
        .add("version", &version)
        .add("resolved", &resolved.packages)
        .add("packages", PACKAGES.join(","))
        .add("checks", CHECKS.join(";"))
        .add("identity", [UUID, HASH_SEED, EPOCH].join(","));
    for tool in ["mmdebstrap", "e2fsprogs"] {
        inputs.add(tool, debian::installed_version(tool));
    }
    let directory = kitchen
        .cache
        .ensure(ARTIFACT, &inputs.key(), |out| build(kitchen, &version, out))?;
    Ok(GuestRoot {
        directory,
        label: format!("{NAME}@{version}"),
    })
}

fn build(kitchen: &Kitchen, version: &str, out: &Path) -> Result<(), RecipeError> {
    let log = kitchen.log(ARTIFACT);
    let mut progress = Progress::start(ARTIFACT);
    let tar = out.join("root.tar");
    let (audit, packages) = (out.join("audit.txt"), out.join("packages.txt"));

    progress.phase("installing Debian 13 with mmdebstrap");
    let mut install = SELECTION
        .mmdebstrap()
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["--format=tar", "--skip=output/dev"])
        .arg(if tool::is_root() {
            "--mode=root"
        } else {
            "--mode=unshare"
        });
    for check in CHECKS {
        install = install.arg(format!("--customize-hook={check}"));
    }
    install
        .arg(format!(
            "--customize-hook=download /tmp/audit {}",
            audit.display()
        ))
        .arg(format!(
            "--customize-hook=download /tmp/packages {}",
            packages.display()
        ))
        .arg(SELECTION.suite)
        .arg(&tar)
        .run(&log, &mut progress)?;
    let complaints = files::read_text(&audit)?;
    if !complaints.trim().is_empty() {
        return Err(RecipeError::Audit(complaints));
    }

    progress.phase("writing the ext4 image");
    let script = out.join("finish.sh");
    files::replace(&script, FINISH.as_bytes())?;
    let disk = out.join("disk.img");
    // Files keep their owners in it: root of this machine, or root of a user namespace.
    let finish = if tool::is_root() {
        Tool::new("sh")
    } else {
        Tool::new("unshare").args(["--map-root-user", "--map-auto", "--", "sh"])
    };
    finish
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .env("UUID", UUID)
        .env("HASH_SEED", HASH_SEED)
        .arg(&script)
        .arg(&tar)
        .arg(out.join("work"))
        .arg(&disk)
        .run(&log, &mut progress)?;

    let disk_bytes = std::fs::metadata(&disk).at("look at", &disk)?.len();
    let template = toml::to_string(&Template {
        name: NAME,
        version,
        disk_bytes,
        description: "Debian 13 (trixie) with Python, Node.js, a C compiler, git, ImageMagick, FFmpeg",
    })?;
    files::replace(&out.join("template.toml"), template.as_bytes())?;
    for done in [&tar, &script, &audit] {
        std::fs::remove_file(done).at("remove", done)?;
    }
    progress.done(&format!("built, {} MiB", disk_bytes >> 20));
    Ok(())
}
