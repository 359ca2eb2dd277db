//! What a snapshot keeps of the network beyond its registers and queues: nothing. A restored machine
//! waits for a new frame channel, and what was under way between guest and gateway is lost, as on
//! any network.

use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}
