//! Control and a monitor. The monitor listens on the socket it was started with; control connects,
//! asks who is there, and hands it one end of a socket pair for each stream into the guest. How a
//! run ended is the monitor's exit code, an [`Ending`], which its parent keeps.

use serde::{Deserialize, Serialize};

use super::supervisor::Run;
use crate::frame::Kind;
use crate::message::messages;
use crate::wire_enum::wire_enum;

/// Kinds of this module.
impl Kind {
    /// [`Identify`], answered by [`Kind::IDENTITY`].
    pub const IDENTIFY: Self = Self(0x8200);
    /// [`Identity`].
    pub const IDENTITY: Self = Self(0x8201);
    /// [`Connect`], answered by [`Kind::CONNECTED`] or [`Kind::NOT_CONNECTED`].
    pub const CONNECT: Self = Self(0x8202);
    /// [`Connected`].
    pub const CONNECTED: Self = Self(0x8203);
    /// [`NotConnected`].
    pub const NOT_CONNECTED: Self = Self(0x8204);
    /// [`SwitchOff`], unanswered: the monitor exits with [`Ending::SwitchedOff`].
    pub const SWITCH_OFF: Self = Self(0x8205);
    /// [`AttachFrames`], unanswered.
    pub const ATTACH_FRAMES: Self = Self(0x8206);
}

/// The names of the descriptors that a monitor is started with.
pub mod descriptor {
    /// Its listening control socket (`SOCK_SEQPACKET`).
    pub const LISTEN: &str = "listen";
    /// A memory file holding the body of a [`VmmConfig`](super::VmmConfig).
    pub const CONFIG: &str = "config";
    /// /dev/kvm.
    pub const KVM: &str = "kvm";
    /// A memory file of the guest memory's size.
    pub const MEMORY: &str = "memory";
    /// The disk image, open for reading and writing.
    pub const DISK: &str = "disk";
    /// The guest kernel, an ELF vmlinux.
    pub const KERNEL: &str = "kernel";
    /// The guest's initramfs.
    pub const INITRAMFS: &str = "initramfs";
    /// The console log, open for reading and writing.
    pub const LOG: &str = "log";
}

/// What kind of machine to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmConfig {
    /// Which run it is.
    pub run: Run,
    /// The machine model's number.
    pub model: u32,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// Asks a monitor who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identify {}

/// Answer to [`Identify`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Which run it is.
    pub run: Run,
    /// The machine model's number.
    pub model: u32,
    /// What the machine is doing.
    pub state: MachineState,
}

wire_enum! {
    /// What a machine is doing, as its monitor sees it.
    MachineState: u8 {
        /// Its vCPUs run, its agent has not rung yet.
        Booting = 0,
        /// Its agent has rung.
        Running = 1,
    }
}

/// Opens a stream to a vsock port of the guest. Carries one end of a socket pair, the stream's host
/// side. The attempt waits until the guest accepts, refuses or control closes its end of the pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// Chosen by control, given back in the answer.
    pub ticket: u64,
    /// The guest's vsock port.
    pub port: u32,
    /// While the guest's agent has not rung yet, wait for it instead of failing.
    pub wait_for_agent: bool,
}

/// The guest accepted; bytes flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connected {
    /// The [`Connect`]'s.
    pub ticket: u64,
}

/// The guest refused, or has too many connections; the socket is closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotConnected {
    /// The [`Connect`]'s.
    pub ticket: u64,
    /// Why.
    pub message: String,
}

/// Ends the run at once, as if the machine's power were cut after its disk writes were done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchOff {}

/// Connects the network device. Carries one end of a pair of Unix stream sockets; on it each
/// Ethernet frame goes behind its length (32 bits, big-endian), at most
/// [`MAX_ETHERNET_FRAME`](super::MAX_ETHERNET_FRAME) bytes. It takes the place of the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachFrames {}

wire_enum! {
    /// A monitor's exit code.
    Ending: u8 {
        /// ACPI S5.
        PoweredOff = 0,
        /// The guest asked for a reset.
        Reset = 10,
        /// pvpanic.
        GuestPanic = 11,
        /// KVM_EXIT_SHUTDOWN.
        TripleFault = 12,
        /// Control sent [`SwitchOff`].
        SwitchedOff = 13,
        /// The guest broke a device's rules so that the machine cannot go on; the log says how.
        DeviceFault = 14,
        /// The monitor could not set the machine up or run it; the log says why.
        Failed = 20,
    }
}

messages! {
    IDENTIFY => Identify,
    IDENTITY => Identity,
    CONNECT => Connect,
    CONNECTED => Connected,
    NOT_CONNECTED => NotConnected,
    SWITCH_OFF => SwitchOff,
    ATTACH_FRAMES => AttachFrames,
}
