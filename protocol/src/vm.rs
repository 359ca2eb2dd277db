//! Lifecycle: what clients ask of control. Every request has a stream of its own and exactly one
//! answer, a message or an error; after `OPENED` the stream belongs to the VM's agent.

use serde::{Deserialize, Serialize};

use crate::id::{IdempotencyKey, Subdomain, TemplateName, TemplateVersion, VmId, VmName};
use crate::message::messages;
use crate::network::{Egress, Publication};
use crate::wire_enum::wire_enum;

/// Most labels of one VM.
pub const MAX_LABELS: usize = 64;
/// Longest label key or value, in bytes.
pub const MAX_LABEL_LEN: usize = 256;
/// Most environment variables of one VM.
pub const MAX_ENV: usize = 256;
/// The longest body of a request in this module, in bytes: control's sockets carry no more.
pub const MAX_REQUEST: usize = 60 << 10;

/// Makes a VM, starts it and answers when it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateVm {
    /// A create repeated with the same key and arguments answers with the first one's VM.
    pub key: IdempotencyKey,
    /// The template; none means the appliance's default.
    pub template: Option<TemplateName>,
    /// A name for people, unique among the owner's VMs.
    pub name: Option<VmName>,
    /// Virtual CPUs; none means 2.
    pub cpus: Option<u16>,
    /// Memory in MiB; none means 1024.
    pub memory_mib: Option<u32>,
    /// Disk in MiB; none means 10240. The template's size is the least.
    pub disk_mib: Option<u32>,
    /// Keys and values for the caller's own use, at most [`MAX_LABELS`].
    pub labels: Vec<(String, String)>,
    /// Environment variables for every process in the VM, at most [`MAX_ENV`].
    pub env: Vec<(String, String)>,
    /// What the VM may reach.
    pub egress: Egress,
    /// How it can be reached.
    pub publication: Publication,
}

/// Asks for one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetVm {
    /// Which VM.
    pub vm: VmRef,
}

/// Names a VM by its identifier or by the name its owner gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmRef {
    /// By identifier.
    Id(VmId),
    /// By name.
    Name(VmName),
}

impl VmRef {
    /// The text that names the VM.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Id(id) => id.as_str(),
            Self::Name(name) => name.as_str(),
        }
    }
}

impl std::fmt::Display for VmRef {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::str::FromStr for VmRef {
    type Err = crate::id::IdError;

    /// Whatever has the form of an identifier is one; everything else is a name. A VM's name never
    /// has the form of an identifier: control refuses such names.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl Serialize for VmRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for VmRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <heapless::String<63> as Deserialize>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Asks for the caller's VMs in the order of their identifiers, a page at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListVms {
    /// Begin after this one; none means at the beginning.
    pub after: Option<VmId>,
    /// At most so many; the appliance may give fewer. Zero means as many as fit.
    pub limit: u16,
}

/// Stops a VM: its processes are asked to end, its disk is synced, it powers off. Answered when it
/// is off. A VM that is stopped already is answered at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopVm {
    /// Which VM.
    pub vm: VmRef,
    /// After so many milliseconds the machine is switched off hard; none means 30,000. Zero
    /// switches off at once.
    pub deadline_ms: Option<u32>,
}

/// Starts a stopped VM and answers when it is ready. A running one is answered at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartVm {
    /// Which VM.
    pub vm: VmRef,
}

/// Switches a VM off and deletes its disk. Answered when nothing of it is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteVm {
    /// Which VM.
    pub vm: VmRef,
}

/// Answer to [`DeleteVm`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The VM that is gone.
    pub id: VmId,
}

/// Turns this stream into one to the VM's agent, starting the VM first when it is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenVm {
    /// Which VM.
    pub vm: VmRef,
}

/// Answer to [`OpenVm`]; every later byte on the stream is between client and agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The VM that was opened.
    pub id: VmId,
    /// Counts the VM's starts, so that a client can tell that it was restarted in between.
    pub generation: u64,
}

/// The most of a VM's console that an answer holds, in bytes.
pub const MAX_CONSOLE: usize = 48 << 10;

/// Asks for the end of what a VM's kernel and agent have said on its console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadConsole {
    /// Which VM.
    pub vm: VmRef,
}

/// Answer to [`ReadConsole`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// The last bytes, at most [`MAX_CONSOLE`]: a guest's, so they may be anything.
    pub bytes: Vec<u8>,
}

wire_enum! {
    /// What a VM is doing.
    VmState: u8 {
        /// Off; its disk is kept.
        Stopped = 0,
        /// On its way up.
        Starting = 1,
        /// Up, and its agent answers.
        Running = 2,
        /// On its way down.
        Stopping = 3,
    }
}

wire_enum! {
    /// How a VM's last run ended.
    EndReason: u8 {
        /// It has not ended since it was made or last started.
        None = 0,
        /// It powered itself off (ACPI S5).
        PoweredOff = 1,
        /// It was stopped by request.
        Stopped = 2,
        /// It asked for a reset. Control starts it again.
        Rebooted = 3,
        /// Its kernel panicked (pvpanic).
        GuestPanic = 4,
        /// Its CPU shut down after a triple fault.
        TripleFault = 5,
        /// It was switched off at the deadline of a stop.
        Killed = 6,
        /// It did not come up within its boot deadline.
        BootTimeout = 7,
        /// It broke the rules of a device.
        DeviceFault = 8,
        /// Its monitor failed.
        MonitorFailed = 9,
        /// The host went down or was switched off.
        HostRestarted = 10,
    }
}

/// A VM as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its identifier.
    pub id: VmId,
    /// Its name, if it has one.
    pub name: Option<VmName>,
    /// What it is doing.
    pub state: VmState,
    /// How its last run ended.
    pub end_reason: EndReason,
    /// The same for a person; empty when there is nothing to say.
    pub end_message: String,
    /// The template its disk was made from.
    pub template: TemplateName,
    /// The template's version.
    pub template_version: TemplateVersion,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Disk in MiB.
    pub disk_mib: u32,
    /// The caller's own keys and values.
    pub labels: Vec<(String, String)>,
    /// Milliseconds since 1970-01-01T00:00:00Z at which it was made.
    pub created_unix_ms: u64,
    /// Counts its starts.
    pub generation: u64,
    /// The secret label of its public address.
    pub subdomain: Subdomain,
    /// Its public address, without a trailing slash.
    pub url: String,
}

/// Answer to [`ListVms`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPage {
    /// The VMs, ordered by identifier.
    pub vms: Vec<VmInfo>,
    /// There are more after the last one here.
    pub more: bool,
}

messages! {
    CREATE_VM => CreateVm,
    GET_VM => GetVm,
    LIST_VMS => ListVms,
    STOP_VM => StopVm,
    START_VM => StartVm,
    DELETE_VM => DeleteVm,
    OPEN_VM => OpenVm,
    READ_CONSOLE => ReadConsole,
    VM => VmInfo,
    VM_PAGE => VmPage,
    DELETED => Deleted,
    OPENED => Opened,
    CONSOLE => Console,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    fn id() -> VmId {
        "vm-1234abcd".parse().unwrap()
    }

    fn name() -> VmRef {
        "web".parse().unwrap()
    }

    #[test]
    fn golden_create() {
        let create = CreateVm {
            key: IdempotencyKey([7; 16]),
            template: Some("debian".parse().unwrap()),
            name: None,
            cpus: Some(4),
            memory_mib: Some(2048),
            disk_mib: None,
            labels: vec![("a".into(), "b".into())],
            env: Vec::new(),
            egress: Egress::default(),
            publication: Publication::default(),
        };
        golden(
            &create,
            b"\x2c\0\0\0\x00\x01\0\
              \x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\
              \x01\x06debian\0\x01\x04\x01\x80\x10\0\x01\x01a\x01b\0\0\0\0\0\0\x01\0",
        );
    }

    #[test]
    fn golden_requests() {
        let by_id = GetVm {
            vm: VmRef::Id(id()),
        };
        golden(&by_id, b"\x0c\0\0\0\x01\x01\0\x0bvm-1234abcd");
        golden(&GetVm { vm: name() }, b"\x04\0\0\0\x01\x01\0\x03web");
        let list = ListVms {
            after: Some(id()),
            limit: 300,
        };
        golden(&list, b"\x0f\0\0\0\x02\x01\0\x01\x0bvm-1234abcd\xac\x02");
        let stop = StopVm {
            vm: name(),
            deadline_ms: Some(30_000),
        };
        golden(&stop, b"\x08\0\0\0\x03\x01\0\x03web\x01\xb0\xea\x01");
        golden(&StartVm { vm: name() }, b"\x04\0\0\0\x04\x01\0\x03web");
        golden(&DeleteVm { vm: name() }, b"\x04\0\0\0\x05\x01\0\x03web");
        golden(&OpenVm { vm: name() }, b"\x04\0\0\0\x06\x01\0\x03web");
        golden(&ReadConsole { vm: name() }, b"\x04\0\0\0\x07\x01\0\x03web");
    }

    #[test]
    fn golden_answers() {
        let info = VmInfo {
            id: id(),
            name: Some("web".parse().unwrap()),
            state: VmState::Running,
            end_reason: EndReason::GuestPanic,
            end_message: "x".into(),
            template: "debian".parse().unwrap(),
            template_version: "13".parse().unwrap(),
            cpus: 2,
            memory_mib: 1024,
            disk_mib: 10_240,
            labels: Vec::new(),
            created_unix_ms: 1_700_000_000_000,
            generation: 1,
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
            url: "u".into(),
        };
        golden(
            &info,
            b"\x43\0\0\0\x10\x01\0\
              \x0bvm-1234abcd\x01\x03web\x02\x04\x01x\x06debian\x0213\
              \x02\x80\x08\x80\x50\0\x80\xd0\x95\xff\xbc\x31\x01\
              \x14abcdefghijklmnopqrst\x01u",
        );
        let page = VmPage {
            vms: Vec::new(),
            more: true,
        };
        golden(&page, b"\x02\0\0\0\x11\x01\0\0\x01");
        golden(
            &Deleted { id: id() },
            b"\x0c\0\0\0\x12\x01\0\x0bvm-1234abcd",
        );
        let opened = Opened {
            id: id(),
            generation: 300,
        };
        golden(&opened, b"\x0e\0\0\0\x13\x01\0\x0bvm-1234abcd\xac\x02");
        let console = Console {
            bytes: b"ok".to_vec(),
        };
        golden(&console, b"\x03\0\0\0\x14\x01\0\x02ok");
    }

    #[test]
    fn numbers_that_are_not_known_yet_survive() {
        assert_eq!(VmState::from_wire(200).to_wire(), 200);
        assert_eq!(EndReason::from_wire(200), EndReason::Other(200));
    }
}
