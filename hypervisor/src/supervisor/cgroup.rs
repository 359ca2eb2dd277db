//! One control group per monitor: its memory is bounded and nothing of it is left behind. Where
//! control groups cannot be made, monitors run without, and that is said once.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use protocol::id::VmId;

const ROOT: &str = "/sys/fs/cgroup";

/// Which controllers a monitor's group has: memory and processes are bounded, and processors are
/// shared by VM, so that one with many busy vCPUs does not keep another waiting.
const CONTROLLERS: &str = "+cpu +memory +pids";

/// The weight of all monitors together against one thread of control or proxy, which weighs 100.
const WEIGHT: &str = "1000";

/// The group that holds the monitors' groups.
#[derive(Debug)]
pub(super) struct Groups {
    directory: PathBuf,
}

/// The group of one monitor.
#[derive(Debug)]
pub(super) struct Group {
    directory: PathBuf,
    /// `cgroup.procs`, open for writing.
    pub(super) join: File,
}

impl Groups {
    /// Makes the group, with its members' controllers.
    pub(super) fn make() -> io::Result<Self> {
        let root = Path::new(ROOT);
        let directory = root.join("supvm");
        fs::write(root.join("cgroup.subtree_control"), CONTROLLERS)?;
        match fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        fs::write(directory.join("cpu.weight"), WEIGHT)?;
        fs::write(directory.join("cgroup.subtree_control"), CONTROLLERS)?;
        Ok(Self { directory })
    }

    /// Makes a monitor's group; `memory_max` of zero means no limit.
    pub(super) fn group(&self, vm: &VmId, memory_max: u64) -> io::Result<Group> {
        let directory = self.directory.join(vm.as_str());
        match fs::create_dir(&directory) {
            // Left by a run whose group could not be removed at once.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let limit = match memory_max {
            0 => "max".to_owned(),
            bytes => bytes.to_string(),
        };
        fs::write(directory.join("memory.max"), limit)?;
        // A monitor has no children; its threads are its vCPUs and devices.
        fs::write(directory.join("pids.max"), "1024")?;
        let join = OpenOptions::new()
            .write(true)
            .open(directory.join("cgroup.procs"))?;
        Ok(Group { directory, join })
    }
}

impl Drop for Groups {
    /// Leaves nothing behind; another supervisor's groups in it keep it.
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.directory);
    }
}

impl Group {
    /// Ends whatever is left in it and removes it.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.kill"), "1")?;
        fs::remove_dir(&self.directory)
    }
}
