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

/// Asks how the machine does; answered by [`HealthReport`]. Clients may ask, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {}

/// How the machine does. What cannot be found out is zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthReport {
    /// Milliseconds since the kernel started.
    pub uptime_ms: u64,
    /// Load averages over 1, 5 and 15 minutes, in thousandths.
    pub load_milli: [u32; 3],
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Memory that programs could still have.
    pub memory_available_bytes: u64,
    /// Size of the root file system in bytes.
    pub disk_bytes: u64,
    /// What is free of it.
    pub disk_available_bytes: u64,
    /// Files that can still be made on it.
    pub disk_free_files: u64,
    /// Processes, without the kernel's own threads.
    pub processes: u32,
    /// Nanoseconds since 1970 by the machine's clock.
    pub unix_ns: u64,
    /// Memory of the agent in bytes.
    pub agent_bytes: u64,
    /// Streams that the agent serves, this one included.
    pub streams: u32,
}

/// Sets the clock, after the machine was paused for example; answered by [`TimeSet`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetTime {
    /// Nanoseconds since 1970-01-01T00:00:00Z.
    pub unix_ns: u64,
}

/// Answer to [`SetTime`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeSet {
    /// By how many nanoseconds the clock was put forward.
    pub step_ns: i64,
}

/// Connects to a TCP port of the machine's loopback interface; answered by [`Dialed`]. From there
/// on the stream is the connection's own bytes, either way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Which port; never [`AGENT_PORT`].
    pub port: u16,
}

/// The connection is there. Raw bytes follow, no frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialed {}

messages! {
    CONFIGURE => Configure,
    CONFIGURED => Configured,
    POWER_OFF => PowerOff,
    POWERING_OFF => PoweringOff,
    HEALTH => Health,
    HEALTH_REPORT => HealthReport,
    SET_TIME => SetTime,
    TIME_SET => TimeSet,
    DIAL => Dial,
    DIALED => Dialed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::testing::golden;

    #[test]
    fn golden_configure() {
        let configure = Configure {
            vm: "v".into(),
            generation: 2,
            hostname: "h".into(),
            machine_id: [1; 16],
            unix_ns: 128,
            entropy: [2; 32],
            dns: vec!["d".into()],
            env: vec![("k".into(), "v".into())],
            grow_disk: true,
        };
        let mut bytes = b"\x40\0\0\0\x80\x01\0\x01v\x02\x01h".to_vec();
        bytes.extend_from_slice(&[1; 16]);
        bytes.extend_from_slice(b"\x80\x01");
        bytes.extend_from_slice(&[2; 32]);
        bytes.extend_from_slice(b"\x01\x01d\x01\x01k\x01v\x01");
        golden(&configure, &bytes);
    }

    #[test]
    fn golden_answers_and_power_off() {
        let configured = Configured {
            agent_version: "1".into(),
            boot_id: "b".into(),
            disk_bytes: 300,
        };
        golden(&configured, b"\x06\0\0\0\x81\x01\0\x011\x01b\xac\x02");
        golden(&PowerOff { grace_ms: 300 }, b"\x02\0\0\0\x82\x01\0\xac\x02");
        golden(&PoweringOff {}, b"\0\0\0\0\x83\x01\0");
    }

    #[test]
    fn golden_housekeeping() {
        golden(&Health {}, b"\0\0\0\0\x84\x01\0");
        let report = HealthReport {
            uptime_ms: 300,
            load_milli: [1, 2, 3],
            memory_bytes: 4,
            memory_available_bytes: 5,
            disk_bytes: 6,
            disk_available_bytes: 7,
            disk_free_files: 8,
            processes: 9,
            unix_ns: 10,
            agent_bytes: 11,
            streams: 12,
        };
        golden(
            &report,
            b"\x0e\0\0\0\x85\x01\0\xac\x02\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c",
        );
        golden(&SetTime { unix_ns: 300 }, b"\x02\0\0\0\x86\x01\0\xac\x02");
        golden(&TimeSet { step_ns: -1 }, b"\x01\0\0\0\x87\x01\0\x01");
        golden(&Dial { port: 300 }, b"\x02\0\0\0\x88\x01\0\xac\x02");
        golden(&Dialed {}, b"\0\0\0\0\x89\x01\0");
    }
}
