//! The appliance's disks: the data disk and the system slot, found by name, mounted when they
//! appear. Nothing here formats or repairs.

use std::fs;
use std::path::Path;

use nix::mount::MsFlags;

use super::mounts::{is_mounted, mount_at};

/// Where the data disk is mounted.
pub(super) const DATA: &str = "/data";
/// Where the system slot is mounted.
pub(super) const SYSTEM: &str = "/system";

/// The appliance's disks and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// What was said of the data disk last, so that it is said once.
    complaint: Option<String>,
}

impl Disks {
    /// Mounts what is there and not mounted.
    pub(super) fn mount(&mut self) {
        if !is_mounted(DATA)
            && let Some(device) = find(Path::new("/sys/class/block"), "supvm-data")
        {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
            match mount_at(&device, DATA, "xfs", flags, "") {
                Ok(()) => tracing::info!(device, "data disk mounted"),
                Err(error) => self.complain(format!(
                    "{error}; the data disk must hold an XFS file system: check it with \
                     xfs_repair, or make a new one with `mkfs.xfs -m reflink=1` (which erases it)"
                )),
            }
        }
        if !is_mounted(SYSTEM)
            && let Some(device) = find(Path::new("/sys/class/block"), "supvm-system")
        {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
            match mount_at(&device, SYSTEM, "squashfs", flags, "") {
                Ok(()) => tracing::info!(device, "system slot mounted"),
                Err(error) => tracing::error!(%error, "system slot not mounted"),
            }
        }
    }

    /// Whether the data disk is there.
    pub(super) fn has_data(&self) -> bool {
        is_mounted(DATA)
    }

    /// Whether the system slot is there.
    pub(super) fn has_system(&self) -> bool {
        is_mounted(SYSTEM)
    }

    /// Says that the data disk is missing.
    pub(super) fn complain_of_missing_data(&mut self) {
        self.complain(
            "no data disk: attach a disk whose GPT partition is named `supvm-data` (or a virtio \
             disk with that serial) holding an XFS file system; it is used as soon as it appears"
                .to_owned(),
        );
    }

    fn complain(&mut self, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            tracing::error!("{complaint}");
            self.complaint = Some(complaint);
        }
    }
}

/// The device with this virtio serial or GPT partition name.
fn find(class: &Path, name: &str) -> Option<String> {
    let entries = fs::read_dir(class).ok()?;
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    names.into_iter().find_map(|device| {
        let directory = class.join(&device);
        let serial = fs::read_to_string(directory.join("serial")).unwrap_or_default();
        let facts = fs::read_to_string(directory.join("uevent")).unwrap_or_default();
        let mut partition = facts
            .lines()
            .filter_map(|line| line.strip_prefix("PARTNAME="));
        let found = serial.trim_end() == name || partition.any(|partition| partition == name);
        let device = device.to_str()?;
        found.then(|| format!("/dev/{device}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_serial_or_partition_name() {
        let directory = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("vda/serial", "supvm-data\n");
        write("vdb/serial", "supvm-data2\n");
        write(
            "nvme0n1p2/uevent",
            "DEVTYPE=partition\nPARTNAME=supvm-system\n",
        );
        let find = |name| find(directory.path(), name);
        assert_eq!(find("supvm-data").as_deref(), Some("/dev/vda"));
        assert_eq!(find("supvm-system").as_deref(), Some("/dev/nvme0n1p2"));
        assert_eq!(find("supvm"), None);
    }
}
