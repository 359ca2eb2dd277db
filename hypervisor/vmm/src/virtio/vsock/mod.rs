//! virtio-vsock: streams between the host and programs in the guest. The host connects, the guest
//! listens; a connection that the guest tries to make is reset, and one to port 1024 of the host is
//! taken as the agent's doorbell. Bytes go between the guest and a socket that the machine was
//! handed, with back-pressure in both directions.

mod events;
mod state;

use std::io;
use std::os::unix::net::UnixStream;

pub use self::events::{VsockEvent, VsockEventReceiver, VsockEvents};
pub use self::state::VsockState;

use super::fault::FaultSink;
use super::{GuestMemory, VirtioMmio};

/// The port of the guest's agent, and of the doorbell it rings on the host.
pub const AGENT_PORT: u32 = 1024;

/// The host's end of vsock: opens streams into the guest.
#[derive(Debug)]
pub struct VsockHost {}

impl VsockHost {
    /// Opens a stream to the guest's `port` and joins it to `stream`, which must not block. What
    /// became of it comes as an event with the same `ticket`.
    pub fn connect(&self, ticket: u64, port: u32, wait_for_agent: bool, stream: UnixStream) {
        let _ = (ticket, port, wait_for_agent, stream);
    }
}

/// vsock for the guest with this CID.
pub fn vsock(
    memory: GuestMemory,
    guest_cid: u64,
    faults: FaultSink,
    events: VsockEvents,
) -> io::Result<(VirtioMmio, VsockHost)> {
    let _ = (memory, guest_cid, faults, events);
    Err(io::ErrorKind::Unsupported.into())
}
