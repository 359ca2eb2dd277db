//! What a snapshot keeps of vsock beyond its registers and queues. Connections are not among it: a
//! restored guest is told that they are gone.

use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Whether the agent had rung.
    pub agent_rang: bool,
    /// The next host port to try.
    pub next_port: u32,
}
