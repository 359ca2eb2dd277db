//! The staging directory: VMs and templates are made here and moved to their place by one rename;
//! deleted ones are moved here by one rename and then removed.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use protocol::id::VmId;

use super::atomic::{died, fsync_dir, write_new};
use super::disk::{self, Copied};
use super::record::VmRecord;
use super::{Store, StoreError, step};

impl Store {
    /// Makes a VM's directory: disk, record, one rename. When this returns it is durable; when it
    /// fails nothing is left.
    pub(crate) fn make_vm(
        &self,
        record: &VmRecord,
        template_disk: &Path,
    ) -> Result<Copied, StoreError> {
        let staged = self.staging().join(format!("new-{}", record.id));
        let made = self.fill_vm(record, template_disk, &staged);
        if made.is_err() && !died(&made) {
            remove_all(&staged);
        }
        made
    }

    fn fill_vm(
        &self,
        record: &VmRecord,
        template_disk: &Path,
        staged: &Path,
    ) -> Result<Copied, StoreError> {
        make_directory(staged)?;
        step("make: directory")?;
        let disk = staged.join("disk.img");
        let copied = disk::copy(template_disk, &disk)?;
        step("make: disk copied")?;
        let file = File::options()
            .write(true)
            .open(&disk)
            .map_err(StoreError::io("open", &disk))?;
        let length = file
            .metadata()
            .map_err(StoreError::io("read", &disk))?
            .len();
        let wanted = u64::from(record.disk_mib) << 20;
        if wanted > length {
            file.set_len(wanted)
                .map_err(StoreError::io("grow", &disk))?;
        }
        file.sync_all().map_err(StoreError::io("sync", &disk))?;
        step("make: disk synced")?;
        let path = staged.join("record");
        write_new(&path, &record.encode()?, 0o600).map_err(StoreError::io("write", &path))?;
        step("make: record written")?;
        fsync_dir(staged)?;
        step("make: directory synced")?;
        let place = self.vm(&record.id);
        fs::rename(staged, &place).map_err(StoreError::io("move", &place))?;
        step("make: renamed")?;
        fsync_dir(&self.vms())?;
        fsync_dir(&self.staging())?;
        step("make: durable")?;
        Ok(copied)
    }

    /// Deletes a VM's directory. When this returns the VM is gone for good; a crash in between
    /// leaves it whole or leaves remains that the next start removes.
    pub(crate) fn remove_vm(&self, id: &VmId) -> Result<(), StoreError> {
        let place = self.vm(id);
        let staged = self.staging().join(format!("old-{id}"));
        step("remove: begun")?;
        fs::rename(&place, &staged).map_err(StoreError::io("move", &place))?;
        step("remove: renamed")?;
        fsync_dir(&self.vms())?;
        fsync_dir(&self.staging())?;
        step("remove: durable")?;
        remove_all(&staged);
        Ok(())
    }

    /// Removes whatever a create that failed left of a VM, wherever it got to.
    pub(crate) fn clear_vm(&self, id: &VmId) -> Result<(), StoreError> {
        remove_all(&self.staging().join(format!("new-{id}")));
        match self.vm(id).exists() {
            true => self.remove_vm(id),
            false => Ok(()),
        }
    }

    /// Makes a directory of `templates/` by one rename. `fill` writes and syncs its files.
    pub(crate) fn make_template(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let staged = self.staging().join(format!("template-{name}"));
        let place = self.templates().join(name);
        let made = make_directory(&staged)
            .and_then(|()| fill(&staged))
            .and_then(|()| fsync_dir(&staged))
            .and_then(|()| {
                step("template: synced")?;
                fs::rename(&staged, &place).map_err(StoreError::io("move", &place))
            });
        if made.is_err() && !died(&made) {
            remove_all(&staged);
        }
        made?;
        fsync_dir(&self.templates())
    }

    /// Removes what a crash left.
    pub(super) fn sweep_staging(&self) -> Result<(), StoreError> {
        let staging = self.staging();
        for entry in fs::read_dir(&staging).map_err(StoreError::io("list", &staging))? {
            let path = entry.map_err(StoreError::io("list", &staging))?.path();
            tracing::info!(path = %path.display(), "removing what was left half-made");
            remove_all(&path);
        }
        Ok(())
    }
}

fn make_directory(path: &Path) -> Result<(), StoreError> {
    remove_all(path);
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(StoreError::io("make", path))
}

/// Removes a file or directory. What cannot be removed is logged and tried again at the next start.
fn remove_all(path: &Path) {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "cannot remove; the next start tries again");
    }
}
