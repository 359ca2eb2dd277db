//! What control says to a guest's agent on streams of its own: identity at the start of a run and
//! the wish to power off at its end. The same socket serves the streams of clients, who speak
//! [`process`](crate::process).

use serde::{Deserialize, Serialize};

use crate::message::messages;

/// The agent's vsock port.
pub const AGENT_PORT: u32 = 1024;

/// First message after a start. Until it came, the agent answers everything else `NotConfigured`;
/// a second one in the same run is answered `AlreadyConfigured`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// The VM's identifier, as text.
    pub vm: String,
    /// Counts the VM's starts.
    pub generation: u64,
    /// Written to /etc/hostname and set.
    pub hostname: String,
    /// The 128 bits of /etc/machine-id.
    pub machine_id: [u8; 16],
    /// Nanoseconds since 1970-01-01T00:00:00Z when control sent this.
    pub unix_ns: u64,
    /// Credited to the kernel's random number generator.
    pub entropy: [u8; 32],
    /// Addresses of name servers for /etc/resolv.conf.
    pub dns: Vec<String>,
    /// Environment variables for every process.
    pub env: Vec<(String, String)>,
    /// Grow the root file system to the size of its disk if it is smaller.
    pub grow_disk: bool,
}

/// Answer to [`Configure`]: the VM is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configured {
    /// The agent's version, for logs.
    pub agent_version: String,
    /// /proc/sys/kernel/random/boot_id, as text.
    pub boot_id: String,
    /// Size of the root file system in bytes.
    pub disk_bytes: u64,
}

/// Ends all processes, syncs and unmounts the disk, powers off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOff {
    /// How long processes get between SIGTERM and SIGKILL, in milliseconds.
    pub grace_ms: u32,
}

/// Answer to [`PowerOff`], sent before anything is ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoweringOff {}

messages! {
    CONFIGURE => Configure,
    CONFIGURED => Configured,
    POWER_OFF => PowerOff,
    POWERING_OFF => PoweringOff,
}
