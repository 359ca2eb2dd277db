//! virtio-net: one Ethernet interface. Its frames go over a frame channel, a Unix stream socket that
//! control hands over and may replace at any time, with back-pressure in both directions. The link is
//! always up: without a channel what the guest sends is dropped, so that the guest never waits for
//! one.
//!
//! Checksums of TCP and UDP are neither made nor checked on the channel. The guest is told so: each
//! such packet reaches it with a partial checksum, which its kernel trusts, and fills in where it
//! forwards the packet.

mod channel;
mod checksum;
mod device;
mod host;
mod receive;
mod state;
mod transmit;

use std::io;
use std::sync::Arc;

pub use self::host::NetHost;
pub use self::state::NetState;

use self::device::NetDevice;
use self::host::Inbox;
use super::fault::{DeviceKind, FaultSink};
use super::{GuestMemory, VirtioMmio};

/// A network interface with this address and maximum packet size.
pub fn net(
    memory: GuestMemory,
    mac: [u8; 6],
    mtu: u16,
    faults: FaultSink,
) -> io::Result<(VirtioMmio, NetHost)> {
    let inbox = Arc::new(Inbox::new()?);
    let device = NetDevice::new(mac, mtu, Arc::clone(&inbox));
    let mmio = VirtioMmio::new(DeviceKind::Net, memory, Box::new(device), faults)?;
    Ok((mmio, NetHost(inbox)))
}

/// The device alone, for a fuzz target.
#[cfg(fuzzing)]
pub(super) fn net_without_thread(
    mac: [u8; 6],
    mtu: u16,
) -> io::Result<(Box<dyn super::worker::Device>, NetHost)> {
    let inbox = Arc::new(Inbox::new()?);
    let device = NetDevice::new(mac, mtu, Arc::clone(&inbox));
    Ok((Box::new(device), NetHost(inbox)))
}
