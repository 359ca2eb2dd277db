//! Everything the appliance boots from, in one directory. What has not changed is not written again,
//! so a second run costs about a second; the directory must never hold a mixture of two builds for
//! longer than it takes to replace each file.

use std::path::Path;

use crate::cache::Inputs;
use crate::exists;
use crate::files;
use crate::recipes::{
    Kitchen, RecipeError, disks, emulator, guest_kernel, guest_root, host_kernel, initramfs,
};

/// Fills `out`: `vmlinuz`, `initramfs.cpio`, `guest-vmlinux`, `guest-initramfs.cpio`,
/// `system.squashfs`, `data.qcow2`; and `emulator`, which boots them in tests.
pub(crate) fn make(
    kitchen: &Kitchen,
    supvm: &Path,
    guest_init: &Path,
    out: &Path,
) -> Result<(), RecipeError> {
    exists(supvm)?;
    exists(guest_init)?;
    let guest_kernel = guest_kernel::make(kitchen)?;
    guest_root::make(kitchen)?;
    let host_kernel = host_kernel::make(kitchen)?;
    let system = disks::system(kitchen)?;
    let data = disks::data(kitchen)?;
    let emulator = emulator::make(kitchen)?;

    files::make_dir(out)?;
    let guest_vmlinux = guest_kernel.join("vmlinux");
    for (target, name) in [
        (host_kernel.join("vmlinuz"), "vmlinuz"),
        (guest_vmlinux.clone(), "guest-vmlinux"),
        (system.join("system.squashfs"), "system.squashfs"),
        (data.join("data.qcow2"), "data.qcow2"),
        (emulator, "emulator"),
    ] {
        files::replace_link(&target, &out.join(name))?;
    }

    let guest_initramfs = out.join("guest-initramfs.cpio");
    let mut inputs = Inputs::new("guest-initramfs 1");
    inputs.add("guest-init", files::read(guest_init)?);
    unless_made(&guest_initramfs, &inputs, || {
        initramfs::guest(guest_init, &guest_initramfs)
    })?;

    let host_initramfs = out.join("initramfs.cpio");
    let parts = initramfs::Host {
        supvm,
        guest_vmlinux: &guest_vmlinux,
        guest_initramfs: &guest_initramfs,
        modules: &host_kernel.join("host-modules.cpio"),
    };
    let mut inputs = Inputs::new("host-initramfs 1");
    inputs
        .add("supvm", files::read(supvm)?)
        .add("guest-initramfs", files::read(&guest_initramfs)?)
        .add("guest-kernel", guest_kernel.as_os_str().as_encoded_bytes())
        .add("host-kernel", host_kernel.as_os_str().as_encoded_bytes());
    unless_made(&host_initramfs, &inputs, || {
        initramfs::host(&parts, &host_initramfs)
    })
}

/// Makes `path` unless the note beside it says that it was made from the same inputs. The note is
/// taken away first and written last: a note never stands beside a file it does not describe.
fn unless_made(
    path: &Path,
    inputs: &Inputs,
    make: impl FnOnce() -> Result<(), RecipeError>,
) -> Result<(), RecipeError> {
    let note = path.with_added_extension("inputs");
    let key = inputs.key().to_string();
    if path.exists() && std::fs::read_to_string(&note).is_ok_and(|old| old == key) {
        return Ok(());
    }
    match std::fs::remove_file(&note) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            use files::AtPath as _;
            Err(error).at("remove", &note)?;
        }
        _ => {}
    }
    make()?;
    files::replace(&note, key.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_file_is_made_again_only_when_an_input_changed_or_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.cpio");
        let made = Cell::new(0);
        let run = |input: &str, fail: bool| {
            let mut inputs = Inputs::new("1");
            inputs.add("input", input);
            let _ = unless_made(&path, &inputs, || {
                made.set(made.get() + 1);
                files::replace(&path, input.as_bytes())?;
                if fail {
                    files::read(&dir.path().join("missing"))?;
                }
                Ok(())
            });
            made.get()
        };
        assert_eq!(run("a", false), 1);
        assert_eq!(run("a", false), 1);
        assert_eq!(run("b", false), 2);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(run("b", false), 3);
        assert_eq!(run("c", true), 4);
        assert_eq!(run("b", false), 5, "a failed build left no note behind");
    }
}
