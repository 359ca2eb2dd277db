//! Chooses which of Debian's kernel modules a server needs: whole folders of the module tree by name,
//! and whatever those depend on. It must never leave a chosen module without one it needs.

use std::collections::{BTreeMap, BTreeSet};

/// Beginnings of module paths below `kernel/`. Each must match something, in the tree or built in.
pub(super) const SERVER: &[&str] = &[
    // virtual machines
    "arch/x86/kvm/",
    "virt/",
    // every Ethernet card, their transceivers, USB adapters
    "drivers/net/ethernet/",
    "drivers/net/mdio",
    "drivers/net/pcs/",
    "drivers/net/phy/",
    "drivers/net/usb/",
    "drivers/net/virtio_net",
    "drivers/net/vmxnet3/",
    // disks: NVMe (also behind Intel VMD), SATA, SCSI and RAID controllers, USB sticks
    "drivers/nvme/host/",
    "drivers/pci/controller/vmd",
    "drivers/ata/ahci",
    "drivers/ata/ata_generic",
    "drivers/ata/ata_piix",
    "drivers/ata/sata_",
    "drivers/message/fusion/",
    "drivers/scsi/",
    "drivers/usb/storage/",
    "drivers/block/loop",
    "drivers/block/virtio_blk",
    "drivers/virtio/",
    // consoles: USB controllers and keyboards
    "drivers/usb/common/",
    "drivers/usb/core/",
    "drivers/usb/host/",
    "drivers/hid/hid-generic",
    "drivers/hid/hid.",
    "drivers/hid/usbhid/",
    // health: watchdogs, IPMI, heat and clock rates, entropy, power button
    "drivers/acpi/",
    "drivers/input/evdev",
    "drivers/char/hw_random/",
    "drivers/char/ipmi/",
    "drivers/cpufreq/",
    "drivers/hwmon/coretemp",
    "drivers/hwmon/k10temp",
    "drivers/mfd/lpc_ich",
    "drivers/powercap/",
    "drivers/thermal/",
    "drivers/watchdog/",
    // file systems of the data disk, the system disk and the EFI partition, with their checksums
    "arch/x86/crypto/crc32",
    "crypto/crc32c",
    "fs/efivarfs/",
    "fs/fat/",
    "fs/nls/",
    "fs/squashfs/",
    "fs/xfs/",
];

/// Never wanted, although a folder above has them.
const UNWANTED: &[&str] = &["drivers/scsi/scsi_debug"];

/// The chosen modules, as paths relative to the release's directory, and the patterns that matched
/// neither a module nor a built-in one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) modules: BTreeSet<String>,
    pub(super) unmatched: Vec<&'static str>,
}

/// Chooses from what depmod wrote about the whole tree: `modules.dep`, `modules.softdep` and the
/// kernel's `modules.builtin`.
pub(super) fn choose(patterns: &[&'static str], dep: &str, softdep: &str, builtin: &str) -> Choice {
    let needs: BTreeMap<&str, Vec<&str>> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let by_name: BTreeMap<String, &str> = needs.keys().map(|path| (name(path), *path)).collect();
    let mut soft: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for line in softdep.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("softdep")
            && let Some(module) = words.next()
        {
            let wanted = words.filter(|word| !word.ends_with(':'));
            let paths = wanted.filter_map(|word| by_name.get(&name(word)).copied());
            soft.entry(name(module)).or_default().extend(paths);
        }
    }
    let matches = |path: &str, pattern: &str| {
        path.strip_prefix("kernel/")
            .is_some_and(|path| path.starts_with(pattern))
    };

    let mut unmatched = Vec::new();
    let mut pending: Vec<&str> = Vec::new();
    for pattern in patterns {
        let before = pending.len();
        pending.extend(needs.keys().filter(|path| {
            matches(path, pattern) && !UNWANTED.iter().any(|unwanted| matches(path, unwanted))
        }));
        if pending.len() == before && !builtin.lines().any(|path| matches(path, pattern)) {
            unmatched.push(*pattern);
        }
    }
    let mut modules = BTreeSet::new();
    while let Some(path) = pending.pop() {
        if modules.insert(path.to_owned()) {
            pending.extend(needs.get(path).into_iter().flatten());
            pending.extend(soft.get(&name(path)).into_iter().flatten());
        }
    }
    Choice { modules, unmatched }
}

/// A module's name: its file without folder and endings, with the kernel's spelling.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
                       kernel/lib/libcrc32c.ko.xz:\n\
                       kernel/crypto/crc32c-generic.ko.xz: kernel/lib/deep.ko.xz\n\
                       kernel/lib/deep.ko.xz:\n\
                       kernel/drivers/scsi/scsi_debug.ko.xz: kernel/lib/only-debug.ko.xz\n\
                       kernel/drivers/scsi/sd_mod.ko.xz:\n\
                       kernel/lib/only-debug.ko.xz:\n\
                       kernel/sound/snd.ko.xz:\n";
    const SOFT: &str = "# Soft dependencies\nsoftdep libcrc32c pre: crc32c_generic missing\n";

    fn chosen(patterns: &[&'static str]) -> Vec<String> {
        choose(patterns, DEP, SOFT, "")
            .modules
            .into_iter()
            .collect()
    }

    #[test]
    fn hard_and_soft_dependencies_come_along() {
        assert_eq!(
            chosen(&["fs/xfs/"]),
            [
                "kernel/crypto/crc32c-generic.ko.xz",
                "kernel/fs/xfs/xfs.ko.xz",
                "kernel/lib/deep.ko.xz",
                "kernel/lib/libcrc32c.ko.xz",
            ]
        );
    }

    #[test]
    fn what_is_unwanted_stays_out_with_its_dependencies() {
        assert_eq!(
            chosen(&["drivers/scsi/"]),
            ["kernel/drivers/scsi/sd_mod.ko.xz"]
        );
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_told_unless_it_is_built_in() {
        let builtin = "kernel/drivers/usb/core/usbcore.ko\n";
        let choice = choose(&["drivers/usb/core/", "fs/nope/"], DEP, SOFT, builtin);
        assert_eq!(choice.unmatched, ["fs/nope/"]);
        assert!(choice.modules.is_empty());
    }
}
