//! virtio-vsock: streams between the host and programs in the guest. The host connects, the guest
//! listens; a connection that the guest tries to make is reset, and one to port 1024 of the host is
//! taken as the agent's doorbell. Bytes go between the guest and a socket that the machine was
//! handed, with back-pressure in both directions.

mod connection;
mod credit;
mod device;
mod events;
mod host;
mod link;
mod packet;
mod state;
mod table;

use std::io;
use std::sync::Arc;

pub use self::events::{VsockEvent, VsockEventReceiver, VsockEvents};
pub use self::host::VsockHost;
pub use self::state::VsockState;

use self::device::VsockDevice;
use self::host::Inbox;
use super::fault::{DeviceKind, FaultSink};
use super::{GuestMemory, VirtioMmio};

/// The port of the guest's agent, and of the doorbell it rings on the host.
pub const AGENT_PORT: u32 = 1024;

/// Most connections at a time.
pub const MOST_CONNECTIONS: usize = 1024;

/// vsock for the guest with this CID.
pub fn vsock(
    memory: GuestMemory,
    guest_cid: u64,
    faults: FaultSink,
    events: VsockEvents,
) -> io::Result<(VirtioMmio, VsockHost)> {
    let inbox = Arc::new(Inbox::new(events)?);
    let device = VsockDevice::new(guest_cid, Arc::clone(&inbox));
    let mmio = VirtioMmio::new(DeviceKind::Vsock, memory, Box::new(device), faults)?;
    Ok((mmio, VsockHost(inbox)))
}

/// The device alone, for a fuzz target.
#[cfg(fuzzing)]
pub(super) fn vsock_without_thread(
    guest_cid: u64,
    events: VsockEvents,
) -> io::Result<(Box<dyn super::worker::Device>, VsockHost)> {
    let inbox = Arc::new(Inbox::new(events)?);
    let device = VsockDevice::new(guest_cid, Arc::clone(&inbox));
    Ok((Box::new(device), VsockHost(inbox)))
}
