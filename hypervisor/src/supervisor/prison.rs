//! What confined processes are locked into: an empty directory, a network namespace with nothing in
//! it, a control group. What the host does not allow is done without, and that is said once.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::cgroup::Groups;
use super::confinement::empty_network;

/// Made once, shared by all.
#[derive(Debug, Default)]
pub(crate) struct Prison {
    /// Whether processes may be given users of their own.
    pub(super) privileged: bool,
    /// The empty directory.
    pub(super) root: Option<CString>,
    /// The empty network namespace.
    pub(super) network: Option<OwnedFd>,
    /// The monitors' control groups.
    pub(super) groups: Option<Groups>,
}

impl Prison {
    /// Makes what this process may make, the empty directory inside `run`.
    pub(crate) fn make(run: &Path) -> Self {
        if !nix::unistd::geteuid().is_root() {
            tracing::warn!(
                "not root: monitors and proxy run without users, namespaces and control groups of their own"
            );
            return Self::default();
        }
        let network = empty_network()
            .inspect_err(
                |error| tracing::warn!(%error, "monitors share the host's network namespace"),
            )
            .ok();
        let groups = Groups::make()
            .inspect_err(|error| tracing::warn!(%error, "monitors run without control groups"))
            .ok();
        Self {
            privileged: true,
            root: empty_directory(run),
            network,
            groups,
        }
    }
}

/// Where a program that needs a loader or libraries is executed, an empty root would stop it.
fn empty_directory(run: &Path) -> Option<CString> {
    if !cfg!(target_feature = "crt-static") {
        tracing::warn!("not a static build: confined processes see the host's file system");
        return None;
    }
    let path = run.join("empty");
    let made = std::fs::create_dir_all(&path).inspect_err(
        |error| tracing::warn!(%error, "confined processes see the host's file system"),
    );
    made.ok()?;
    CString::new(path.as_os_str().as_bytes()).ok()
}
