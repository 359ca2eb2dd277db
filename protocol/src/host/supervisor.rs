//! Control and init (or `supvm serve`'s supervisor). Init is the parent of every process; control
//! asks it for monitors and learns from it how they ended. An end that no control has forgotten is
//! told again to the next one.

use serde::{Deserialize, Serialize};

use crate::frame::Kind;
use crate::id::VmId;
use crate::message::messages;

/// Kinds of this module.
impl Kind {
    /// [`SpawnVmm`], answered by [`Kind::VMM_SPAWNED`] or [`Kind::VMM_NOT_SPAWNED`].
    pub const SPAWN_VMM: Self = Self(0x8100);
    /// [`VmmSpawned`].
    pub const VMM_SPAWNED: Self = Self(0x8101);
    /// [`VmmNotSpawned`].
    pub const VMM_NOT_SPAWNED: Self = Self(0x8102);
    /// [`KillVmm`], unanswered: the end is told by [`Kind::VMM_ENDED`].
    pub const KILL_VMM: Self = Self(0x8103);
    /// [`VmmEnded`], init to control at any time.
    pub const VMM_ENDED: Self = Self(0x8104);
    /// [`ForgetVmm`], unanswered.
    pub const FORGET_VMM: Self = Self(0x8105);
    /// [`ListVmms`], answered by one [`Kind::VMM_LISTED`] each and then [`Kind::VMMS_LISTED`].
    pub const LIST_VMMS: Self = Self(0x8106);
    /// [`VmmListed`].
    pub const VMM_LISTED: Self = Self(0x8107);
    /// [`VmmsListed`].
    pub const VMMS_LISTED: Self = Self(0x8108);
    /// [`ShutDown`], init to control.
    pub const SHUT_DOWN: Self = Self(0x8109);
    /// [`Lease`], net to init.
    pub const LEASE: Self = Self(0x810a);
}

/// One run of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Run {
    /// Which VM.
    pub vm: VmId,
    /// Counts its starts.
    pub generation: u64,
}

/// Starts a monitor. Carries one descriptor per name, in the same order, which the process finds
/// from [`FIRST_DESCRIPTOR`](super::FIRST_DESCRIPTOR) on; standard input and output are /dev/null.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpawnVmm {
    /// Which run it is.
    pub run: Run,
    /// User and group to run as; zero means not to change them.
    pub uid: u32,
    /// Bytes of memory its control group may use; zero means no limit.
    pub memory_max: u64,
    /// The names of the attached descriptors.
    pub descriptors: Vec<heapless::String<16>>,
}

/// The monitor runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmSpawned {
    /// Which run.
    pub run: Run,
    /// Its process identifier.
    pub pid: u32,
}

/// The monitor could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmNotSpawned {
    /// Which run.
    pub run: Run,
    /// Why.
    pub message: String,
}

/// Ends a monitor with SIGKILL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillVmm {
    /// Which run.
    pub run: Run,
}

/// A monitor is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmEnded {
    /// Which run.
    pub run: Run,
    /// How: the exit code of a monitor that exited.
    pub exit_code: Option<u8>,
    /// How: the signal that ended it.
    pub signal: Option<u8>,
}

/// Control has written down how the monitor ended: init need not keep it any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetVmm {
    /// Which run.
    pub run: Run,
}

/// Asks for every monitor that runs or has ended unforgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListVmms {}

/// A monitor that runs. (One that has ended is told by [`VmmEnded`].)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmListed {
    /// Which run.
    pub run: Run,
    /// Its process identifier.
    pub pid: u32,
}

/// The end of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmsListed {}

/// The host goes down: control stops every VM and exits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShutDown {
    /// How long the VMs have, in milliseconds.
    pub deadline_ms: u32,
}

/// What net learned about an interface; init sets it. An empty one takes the address away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The interface's index.
    pub interface: u32,
    /// Address and prefix length.
    pub address: Option<([u8; 4], u8)>,
    /// Default gateway.
    pub gateway: Option<[u8; 4]>,
    /// Name servers, in the order of preference.
    pub name_servers: Vec<[u8; 4]>,
}

messages! {
    SPAWN_VMM => SpawnVmm,
    VMM_SPAWNED => VmmSpawned,
    VMM_NOT_SPAWNED => VmmNotSpawned,
    KILL_VMM => KillVmm,
    VMM_ENDED => VmmEnded,
    FORGET_VMM => ForgetVmm,
    LIST_VMMS => ListVmms,
    VMM_LISTED => VmmListed,
    VMMS_LISTED => VmmsListed,
    SHUT_DOWN => ShutDown,
    LEASE => Lease,
}
