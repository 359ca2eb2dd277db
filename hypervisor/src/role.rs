//! The arguments of the roles that are started with some. What a role may touch beyond them comes
//! as descriptors.

use std::path::PathBuf;

/// Arguments of `supvm control`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct ControlArgs {
    /// State directory: templates, VMs, keys.
    #[arg(long)]
    pub state: PathBuf,
    /// Run directory: the sockets `proxy.sock` and `vmm/<vm-id>.sock`.
    #[arg(long)]
    pub run: PathBuf,
    /// Where the system slot is mounted, when there is one.
    #[arg(long)]
    pub system: Option<PathBuf>,
    /// Settings file. Without it, or when it does not exist, the defaults hold.
    #[arg(long)]
    pub config: Option<PathBuf>,
}
