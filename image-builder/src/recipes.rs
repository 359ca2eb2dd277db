//! How each part of the appliance's images is made. A recipe names its inputs, and the cache decides
//! whether it runs; it must never depend on anything it did not name.

use std::path::PathBuf;

use crate::archive::ArchiveError;
use crate::cache::{Cache, CacheError};
use crate::debian::{Apt, DebianError};
use crate::files::FileError;
use crate::kconfig::KconfigError;
use crate::tool::ToolError;

pub(crate) mod disks;
pub(crate) mod emulator;
pub(crate) mod guest_kernel;
pub(crate) mod guest_root;
pub(crate) mod host_kernel;
pub(crate) mod initramfs;
mod modules;
pub(crate) mod peer;
mod resolved;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecipeError {
    /// The guest kernel grew too large.
    #[error(
        "the guest kernel has {bytes} bytes, more than the {limit} it may have; take options out of guest-kernel.config"
    )]
    KernelTooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A package does not hold what it should.
    #[error("{package} holds no {what}")]
    NotInPackage {
        /// The package.
        package: String,
        /// The missing file.
        what: String,
    },
    /// Modules were asked for that this kernel does not have.
    #[error("the host kernel {release} has no module for: {}", .patterns.join(", "))]
    NoModules {
        /// The kernel's release.
        release: String,
        /// What matched nothing.
        patterns: Vec<&'static str>,
    },
    /// dpkg is not content with the guest root.
    #[error("dpkg --audit found problems in the guest root:\n{0}")]
    Audit(String),
    /// A template's description could not be written.
    #[error("cannot write template.toml: {0}")]
    Template(#[from] toml::ser::Error),
    /// See [`ArchiveError`].
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// See [`CacheError`].
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// See [`DebianError`].
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// See [`FileError`].
    #[error(transparent)]
    File(#[from] FileError),
    /// See [`KconfigError`].
    #[error(transparent)]
    Kconfig(#[from] KconfigError),
    /// See [`ToolError`].
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// What all recipes use.
pub(crate) struct Kitchen {
    /// Where finished parts are kept.
    pub(crate) cache: Cache,
    apt: std::cell::OnceCell<Apt>,
}

impl Kitchen {
    /// The user's.
    pub(crate) fn of_user() -> Result<Self, RecipeError> {
        Ok(Self {
            cache: Cache::of_user()?,
            apt: std::cell::OnceCell::new(),
        })
    }

    /// apt, asked once for everything any recipe takes from it.
    fn apt(&self) -> Result<&Apt, RecipeError> {
        if let Some(apt) = self.apt.get() {
            return Ok(apt);
        }
        let names = [
            guest_kernel::SOURCE,
            host_kernel::meta_package()?,
            host_kernel::FIRMWARE,
        ];
        let apt = Apt::look_up(&self.cache, &names)?;
        Ok(self.apt.get_or_init(|| apt))
    }

    /// A fresh log for an artifact's build.
    fn log(&self, artifact: &str) -> PathBuf {
        let log = self.cache.log_path(artifact);
        // An old log that stays is only longer than need be.
        let _ = std::fs::remove_file(&log);
        log
    }
}
