//! Kernel modules: those that devices ask for, and those that the appliance needs anyway. A module
//! that cannot be loaded is told once and done without.

mod alias;
mod deps;
pub(super) mod loader;

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::alias::Aliases;
use self::deps::Dependencies;

/// How deep the device tree is followed.
const DEEPEST: usize = 32;

/// What the kernel's modules are called and need.
#[derive(Debug, Default)]
struct Tables {
    directory: PathBuf,
    aliases: Aliases,
    dependencies: Dependencies,
}

/// The running kernel's modules. Copies share the tables and nothing else; the kernel itself sees to
/// it that a module is loaded once.
#[derive(Clone, Debug, Default)]
pub(super) struct Modules {
    tables: Arc<Tables>,
    /// Files that were tried, with whatever result.
    tried: HashSet<String>,
    /// Devices that were served.
    served: HashSet<String>,
}

impl Modules {
    /// Reads the tables of the running kernel's modules.
    pub(super) fn of_running_kernel() -> io::Result<Self> {
        let release = nix::sys::utsname::uname()?;
        let directory = Path::new("/lib/modules").join(release.release());
        let table = |name: &str| fs::read_to_string(directory.join(name));
        // Modules that are built in have their aliases in another table and need no loading.
        let aliases = Aliases::parse(&table("modules.alias")?);
        let tables = Tables {
            dependencies: Dependencies::parse(
                &table("modules.dep")?,
                &table("modules.softdep").unwrap_or_default(),
                &aliases,
            ),
            aliases,
            directory,
        };
        Ok(Self {
            tables: Arc::new(tables),
            ..Self::default()
        })
    }

    /// Loads a module by name, after what it needs. One that is built in is no file and no error.
    pub(super) fn load(&mut self, module: &str) {
        let tables = self.tables.clone();
        for file in tables.dependencies.order(&name(module)) {
            if self.tried.insert(file.clone()) {
                match insert(&tables.directory.join(&file)) {
                    Ok(()) => tracing::debug!(module = name_of_file(&file), "loaded"),
                    Err(error) => {
                        tracing::warn!(module = name_of_file(&file), %error, "not loaded");
                    }
                }
            }
        }
    }

    /// Loads what a device asks for.
    pub(super) fn serve(&mut self, modalias: &str) {
        if self.served.insert(modalias.to_owned()) {
            let tables = self.tables.clone();
            let modules = tables.aliases.modules(modalias);
            modules.for_each(|module| self.load(module));
        }
    }

    /// Loads what those of the devices that `look` finds ask for that are `wanted`, and those that
    /// appear by it.
    pub(super) fn coldplug(&mut self, look: fn() -> Vec<String>, wanted: fn(&str) -> bool) {
        loop {
            let mut found = look();
            found.retain(|modalias| wanted(modalias) && !self.served.contains(modalias));
            if found.is_empty() {
                return;
            }
            found.iter().for_each(|modalias| self.serve(modalias));
        }
    }
}

/// What all devices ask for.
fn of_all() -> Vec<String> {
    let mut found = Vec::new();
    modaliases(Path::new("/sys/devices"), DEEPEST, &mut found);
    found
}

/// What the devices on the buses of disks and network cards ask for, without a walk through all.
fn of_buses() -> Vec<String> {
    let mut found = Vec::new();
    for bus in ["pci", "virtio"] {
        let devices = fs::read_dir(Path::new("/sys/bus").join(bus).join("devices"));
        for device in devices.into_iter().flatten().flatten() {
            modaliases(&device.path(), 0, &mut found);
        }
    }
    found
}

/// Collects what the devices below `directory` ask for.
fn modaliases(directory: &Path, depth: usize, found: &mut Vec<String>) {
    if let Ok(text) = fs::read_to_string(directory.join("modalias")) {
        let modalias = text.trim_end();
        if !modalias.is_empty() {
            found.push(modalias.to_owned());
        }
    }
    let (Ok(entries), Some(depth)) = (fs::read_dir(directory), depth.checked_sub(1)) else {
        return;
    };
    for entry in entries.flatten() {
        // Links lead elsewhere in the tree; only directories are followed.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            modaliases(&entry.path(), depth, found);
        }
    }
}

/// Hands a module file to the kernel, which unpacks it by itself.
fn insert(path: &Path) -> io::Result<()> {
    const COMPRESSED_FILE: libc::c_int = 4;
    let file = File::open(path)?;
    let flags = match path.extension() {
        Some(extension) if extension != "ko" => COMPRESSED_FILE,
        _ => 0,
    };
    let none: &CStr = c"";
    // SAFETY: finit_module(2) reads the file by its descriptor and an empty parameter string.
    let done = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            none.as_ptr(),
            flags,
        )
    };
    match nix::Error::result(done) {
        // There already: built in or loaded by the kernel.
        Ok(_) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A module's name as the kernel writes it.
fn name(text: &str) -> String {
    text.replace('-', "_")
}

/// The name of the module in a file such as `kernel/fs/xfs/xfs.ko.xz`.
fn name_of_file(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    name(base.split(".ko").next().unwrap_or(base))
}
