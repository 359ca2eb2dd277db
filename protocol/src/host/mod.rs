//! What the processes of one host say to each other. Each message is one packet of a
//! `SOCK_SEQPACKET` Unix socket, holding one frame, with descriptors attached where its
//! documentation says so. Kinds here begin at 0x8000, so that none can be taken for a public one.
//!
//! The sockets of vmm and proxy outlive the control process that connects to them, so the bodies
//! obey the same rule as the public ones: a changed body is a new kind.

#[cfg(feature = "channel")]
pub mod channel;
pub mod proxy;
pub mod supervisor;
pub mod vmm;

/// The longest packet, frame header included.
pub const MAX_PACKET: usize = 64 << 10;

/// Most descriptors in one packet.
pub const MAX_DESCRIPTORS: usize = 16;

/// Environment variable of a role's process: the names, separated by commas, of the descriptors
/// that it was started with, the first of which is number [`FIRST_DESCRIPTOR`].
pub const DESCRIPTORS_VARIABLE: &str = "SUPVM_DESCRIPTORS";

/// Number of the first descriptor that a role's process is handed.
pub const FIRST_DESCRIPTOR: i32 = 3;
