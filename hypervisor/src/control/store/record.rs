//! A VM's record: everything control must know about it after a power cut. The body is postcard
//! under a header with its kind and generation, and a BLAKE3 checksum ends the file. A changed body
//! is a new generation; this build reads those it knows and leaves newer ones alone.

use std::path::{Path, PathBuf};

use protocol::id::{IdempotencyKey, Owner, Subdomain, TemplateName, TemplateVersion, VmId, VmName};
use protocol::network::{Egress, Publication};
use protocol::vm::{EndReason, VmInfo, VmState};
use serde::{Deserialize, Serialize};

const MAGIC: [u8; 4] = *b"SUPV";
const KIND: u16 = 1;
const GENERATION: u16 = 1;
const HEADER_LEN: usize = 8;

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// The checksum or the form is wrong.
    #[error("the VM record {} is damaged: {rule}; restore it from a backup or delete the VM's directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        rule: &'static str,
    },
    /// A newer build wrote it.
    #[error("the VM record {} has generation {generation}, this supvm reads {GENERATION}; install the newer supvm again", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its generation.
        generation: u16,
    },
    /// The directory has another VM's name.
    #[error("the VM record {} belongs to {id}; put the directory back under that name", path.display())]
    Misplaced {
        /// The file.
        path: PathBuf,
        /// Whose record it is.
        id: VmId,
    },
    /// The record cannot be encoded.
    #[error("the record of {id} cannot be encoded: {cause}")]
    Encode {
        /// Which VM.
        id: VmId,
        /// What postcard said.
        cause: postcard::Error,
    },
}

/// How far the VM's present run has come, as far as is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RunState {
    /// It is off.
    Off,
    /// A monitor was about to be started.
    Booting,
    /// The agent has its configuration.
    Up,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) id: VmId,
    pub(crate) owner: Owner,
    pub(crate) name: Option<VmName>,
    pub(crate) template: TemplateName,
    pub(crate) template_version: TemplateVersion,
    /// The machine model's number.
    pub(crate) model: u32,
    pub(crate) cpus: u16,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: u32,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) egress: Egress,
    pub(crate) publication: Publication,
    pub(crate) created_unix_ms: u64,
    pub(crate) subdomain: Subdomain,
    pub(crate) machine_id: [u8; 16],
    /// The user of its monitor; zero for control's own.
    pub(crate) uid: u32,
    /// The key of the create that made it, and the hash of that create's arguments.
    pub(crate) key: IdempotencyKey,
    pub(crate) arguments: [u8; 32],
    /// Whether the create was answered. A VM whose create never was is undone at the next start.
    pub(crate) acknowledged: bool,
    /// Counts its starts.
    pub(crate) generation: u64,
    pub(crate) run: RunState,
    pub(crate) end_reason: EndReason,
    pub(crate) end_message: String,
}

impl VmRecord {
    /// The bytes of the record's file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let body = postcard::to_allocvec(self).map_err(|cause| RecordError::Encode {
            id: self.id.clone(),
            cause,
        })?;
        let mut bytes = Vec::with_capacity(body.len().saturating_add(HEADER_LEN + 32));
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&KIND.to_le_bytes());
        bytes.extend_from_slice(&GENERATION.to_le_bytes());
        bytes.extend_from_slice(&body);
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        Ok(bytes)
    }

    /// Reads a record's file.
    pub(crate) fn decode(bytes: &[u8], path: &Path) -> Result<Self, RecordError> {
        let damaged = |rule| RecordError::Damaged {
            path: path.to_owned(),
            rule,
        };
        let (content, checksum) = bytes
            .split_last_chunk::<32>()
            .ok_or(damaged("it is too short"))?;
        if blake3::hash(content) != *checksum {
            return Err(damaged("its checksum is wrong"));
        }
        let (header, body) = content
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(damaged("it is too short"))?;
        let [m0, m1, m2, m3, k0, k1, g0, g1] = *header;
        if [m0, m1, m2, m3] != MAGIC || u16::from_le_bytes([k0, k1]) != KIND {
            return Err(damaged("it is no VM record"));
        }
        let generation = u16::from_le_bytes([g0, g1]);
        if generation > GENERATION {
            return Err(RecordError::Newer {
                path: path.to_owned(),
                generation,
            });
        }
        match postcard::take_from_bytes(body) {
            Ok((record, [])) => Ok(record),
            _ => Err(damaged("its body is no value of its generation")),
        }
    }

    /// The VM as its owner sees it.
    pub(crate) fn info(&self, state: VmState, url: String) -> VmInfo {
        VmInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            state,
            end_reason: self.end_reason,
            end_message: self.end_message.clone(),
            template: self.template.clone(),
            template_version: self.template_version.clone(),
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            disk_mib: self.disk_mib,
            labels: self.labels.clone(),
            created_unix_ms: self.created_unix_ms,
            generation: self.generation,
            subdomain: self.subdomain.clone(),
            url,
        }
    }
}

#[cfg(test)]
pub(crate) fn sample(id: &str) -> VmRecord {
    VmRecord {
        id: id.parse().unwrap(),
        owner: "me".parse().unwrap(),
        name: Some("web".parse().unwrap()),
        template: "debian".parse().unwrap(),
        template_version: "13.1".parse().unwrap(),
        model: 1,
        cpus: 2,
        memory_mib: 1024,
        disk_mib: 10,
        labels: vec![("a".into(), "b".into())],
        env: vec![("K".into(), "V".into())],
        egress: Egress {
            offline: true,
            rules: vec![protocol::network::Rule {
                action: protocol::network::RuleAction::Deny,
                to: "10.0.0.0/8".parse().unwrap(),
                protocol: protocol::network::RuleProtocol::Tcp,
                ports: (80, 443),
            }],
            bytes_per_second: 300,
            packets_per_second: 2,
            max_connections: 3,
        },
        publication: Publication {
            autostart: false,
            token: Some([7; 32]),
        },
        created_unix_ms: 1,
        subdomain: Subdomain::from_random([3; 20]),
        machine_id: [4; 16],
        uid: 0,
        key: IdempotencyKey([5; 16]),
        arguments: [6; 32],
        acknowledged: true,
        generation: 7,
        run: RunState::Off,
        end_reason: EndReason::PoweredOff,
        end_message: "it powered itself off".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_flipped_bit_anywhere_is_noticed() {
        let record = sample("vm-1234abcd");
        let bytes = record.encode().unwrap();
        let path = Path::new("/vms/x/record");
        assert_eq!(VmRecord::decode(&bytes, path).unwrap(), record);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(VmRecord::decode(&bad, path).is_err(), "byte {at}");
            assert!(VmRecord::decode(&bytes[..at], path).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn golden_record() {
        let bytes = sample("vm-1234abcd").encode().unwrap();
        let (body, _checksum) = bytes.split_last_chunk::<32>().unwrap();
        let golden = "SUPV\\x01\\x00\\x01\\x00\\x0bvm-1234abcd\\x02me\\x01\\x03web\\x06debian\\x0413.1\\x01\\x02\\x80\\x08\\n\\x01\\x01a\\x01b\\x01\\x01K\\x01V\\x01\\x01\\x01\\n10.0.0.0/8\\x01P\\xbb\\x03\\xac\\x02\\x02\\x03\\x00\\x01\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x01\\x14dddddddddddddddddddd\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x04\\x00\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x05\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x06\\x01\\x07\\x00\\x01\\x15it powered itself off";
        assert_eq!(body.escape_ascii().to_string(), golden);
    }

    #[test]
    fn golden_header_and_a_newer_generation_is_left_alone() {
        let mut bytes = sample("vm-1234abcd").encode().unwrap();
        assert_eq!(&bytes[..9], b"SUPV\x01\0\x01\0\x0b");
        bytes.truncate(bytes.len() - 32);
        bytes[6] = 2;
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        assert!(matches!(
            VmRecord::decode(&bytes, Path::new("r")),
            Err(RecordError::Newer { generation: 2, .. })
        ));
    }
}
