//! The peer of the benchmark: the emulator's QEMU as an archive that is put behind the host's first
//! root, so that `qemu-system-x86_64 -M microvm` runs in the same appliance. It is in no image that
//! is shipped.

use std::path::PathBuf;

use super::{Kitchen, RecipeError, emulator};
use crate::archive::Archive;
use crate::cache::Inputs;
use crate::files::AtPath as _;
use crate::progress::Progress;

const ARTIFACT: &str = "peer-qemu";

/// The directory with `peer-qemu.cpio`.
pub(crate) fn make(kitchen: &Kitchen) -> Result<PathBuf, RecipeError> {
    let emulator = emulator::make(kitchen)?;
    let mut inputs = Inputs::new("peer-qemu 2");
    inputs.add("emulator", emulator.as_os_str().as_encoded_bytes());
    kitchen.cache.ensure(ARTIFACT, &inputs.key(), |out| {
        let mut progress = Progress::start(ARTIFACT);
        progress.phase("packing QEMU");
        let mut archive = Archive::default();
        for part in ["usr", "lib64"] {
            archive.tree(part, &emulator.join(emulator::ROOT).join(part))?;
        }
        let packed = out.join("peer-qemu.cpio");
        archive.write_to(&packed)?;
        let bytes = std::fs::metadata(&packed).at("look at", &packed)?.len();
        progress.done(&format!("packed, {} MiB", bytes >> 20));
        Ok(())
    })
}
