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

/// The longest Ethernet frame on a VM's frame channel, in bytes: an IP packet of the MTU, 65,520
/// bytes, its header of 14 and room for a VLAN tag.
pub const MAX_ETHERNET_FRAME: usize = 65_550;

/// Most descriptors in one packet.
pub const MAX_DESCRIPTORS: usize = 16;

/// Environment variable of a role's process: the names, separated by commas, of the descriptors
/// that it was started with, the first of which is number [`FIRST_DESCRIPTOR`].
pub const DESCRIPTORS_VARIABLE: &str = "SUPVM_DESCRIPTORS";

/// Number of the first descriptor that a role's process is handed.
pub const FIRST_DESCRIPTOR: i32 = 3;

#[cfg(test)]
mod tests {
    use super::proxy::*;
    use super::supervisor::*;
    use super::vmm::*;
    use crate::frame::HEADER_LEN;
    use crate::message::{Message, decode_body, encode};
    use crate::network::{Egress, NetworkCounters, Publication, Rule, RuleAction, RuleProtocol};

    /// The frame is these bytes, and these bytes are the message.
    #[track_caller]
    fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, bytes: &str) {
        let encoded = encode(message).unwrap();
        assert_eq!(encoded.escape_ascii().to_string(), bytes);
        assert_eq!(&decode_body::<M>(&encoded[HEADER_LEN..]).unwrap(), message);
    }

    fn run() -> Run {
        Run {
            vm: "vm-1234abcd".parse().unwrap(),
            generation: 300,
        }
    }

    #[test]
    fn golden_supervisor() {
        let spawn = SpawnVmm {
            run: run(),
            uid: 200_000,
            memory_max: 1 << 30,
            descriptors: vec!["kvm".try_into().unwrap()],
        };
        golden(
            &spawn,
            "\\x1b\\x00\\x00\\x00\\x00\\x81\\x00\\x0bvm-1234abcd\\xac\\x02\\xc0\\x9a\\x0c\\x80\\x80\\x80\\x80\\x04\\x01\\x03kvm",
        );
        golden(
            &VmmSpawned { run: run(), pid: 7 },
            "\\x0f\\x00\\x00\\x00\\x01\\x81\\x00\\x0bvm-1234abcd\\xac\\x02\\x07",
        );
        let message = "no".to_owned();
        golden(
            &VmmNotSpawned {
                run: run(),
                message,
            },
            "\\x11\\x00\\x00\\x00\\x02\\x81\\x00\\x0bvm-1234abcd\\xac\\x02\\x02no",
        );
        golden(
            &KillVmm { run: run() },
            "\\x0e\\x00\\x00\\x00\\x03\\x81\\x00\\x0bvm-1234abcd\\xac\\x02",
        );
        let ended = VmmEnded {
            run: run(),
            exit_code: None,
            signal: Some(9),
        };
        golden(
            &ended,
            "\\x11\\x00\\x00\\x00\\x04\\x81\\x00\\x0bvm-1234abcd\\xac\\x02\\x00\\x01\\t",
        );
        golden(
            &ForgetVmm { run: run() },
            "\\x0e\\x00\\x00\\x00\\x05\\x81\\x00\\x0bvm-1234abcd\\xac\\x02",
        );
        golden(&ListVmms {}, "\\x00\\x00\\x00\\x00\\x06\\x81\\x00");
        golden(
            &VmmListed { run: run(), pid: 7 },
            "\\x0f\\x00\\x00\\x00\\x07\\x81\\x00\\x0bvm-1234abcd\\xac\\x02\\x07",
        );
        golden(&VmmsListed {}, "\\x00\\x00\\x00\\x00\\x08\\x81\\x00");
        golden(
            &ShutDown {
                deadline_ms: 30_000,
            },
            "\\x03\\x00\\x00\\x00\\t\\x81\\x00\\xb0\\xea\\x01",
        );
        let lease = Lease {
            interface: 2,
            address: Some(([10, 0, 2, 15], 24)),
            gateway: None,
            name_servers: vec![[10, 0, 2, 3]],
        };
        golden(
            &lease,
            "\\r\\x00\\x00\\x00\\n\\x81\\x00\\x02\\x01\\n\\x00\\x02\\x0f\\x18\\x00\\x01\\n\\x00\\x02\\x03",
        );
    }

    #[test]
    fn golden_vmm() {
        golden(&Identify {}, "\\x00\\x00\\x00\\x00\\x00\\x82\\x00");
        let identity = Identity {
            run: run(),
            model: 1,
            state: MachineState::Running,
        };
        golden(
            &identity,
            "\\x10\\x00\\x00\\x00\\x01\\x82\\x00\\x0bvm-1234abcd\\xac\\x02\\x01\\x01",
        );
        let connect = Connect {
            ticket: 5,
            port: 1024,
            wait_for_agent: true,
        };
        golden(
            &connect,
            "\\x04\\x00\\x00\\x00\\x02\\x82\\x00\\x05\\x80\\x08\\x01",
        );
        golden(
            &Connected { ticket: 5 },
            "\\x01\\x00\\x00\\x00\\x03\\x82\\x00\\x05",
        );
        let message = "no".to_owned();
        golden(
            &NotConnected { ticket: 5, message },
            "\\x04\\x00\\x00\\x00\\x04\\x82\\x00\\x05\\x02no",
        );
        golden(&SwitchOff {}, "\\x00\\x00\\x00\\x00\\x05\\x82\\x00");
        golden(&AttachFrames {}, "\\x00\\x00\\x00\\x00\\x06\\x82\\x00");
        let config = VmmConfig {
            run: run(),
            model: 1,
            cpus: 2,
            memory_mib: 1024,
        };
        let bytes = postcard::to_allocvec(&config).unwrap();
        assert_eq!(
            bytes.escape_ascii().to_string(),
            "\\x0bvm-1234abcd\\xac\\x02\\x01\\x02\\x80\\x08"
        );
    }

    #[test]
    fn golden_proxy() {
        let serve = Serve {
            api_address: "[::]:7443".into(),
            certificates: vec![vec![1, 2], vec![3]],
            key: vec![4],
            max_streams: 256,
            max_connections: 1024,
            edge: ServeEdge {
                https_address: "[::]:443".into(),
                http_address: "[::]:80".into(),
                domain: "d".into(),
                public_port: 443,
                authority: vec![5],
                named: vec![NamedCertificate {
                    name: "d".into(),
                    certificates: vec![vec![6], vec![7]],
                    key: vec![8],
                }],
                custom: vec![CustomDomain {
                    name: "c".into(),
                    subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
                    port: 80,
                }],
            },
            gateway: ServeGateway {
                name_servers: vec!["[::1]:53".into()],
                rules: vec![rule()],
                max_connections: 300,
            },
        };
        golden(
            &serve,
            "m\\x00\\x00\\x00\\x00\\x83\\x00\\t[::]:7443\\x02\\x02\\x01\\x02\\x01\\x03\\x01\\x04\\x80\\x02\\x80\\x08\\x08[::]:443\\x07[::]:80\\x01d\\xbb\\x03\\x01\\x05\\x01\\x01d\\x02\\x01\\x06\\x01\\x07\\x01\\x08\\x01\\x01c\\x14abcdefghijklmnopqrstP\\x01\\x08[::1]:53\\x01\\x01\\n10.0.0.0/8\\x01P\\xbb\\x03\\xac\\x02",
        );
        let serving = Serving {
            api_address: "[::]:7443".into(),
            https_address: "[::]:443".into(),
            http_address: String::new(),
            message: "m".into(),
        };
        golden(
            &serving,
            "\\x16\\x00\\x00\\x00\\x01\\x83\\x00\\t[::]:7443\\x08[::]:443\\x00\\x01m",
        );
        let request = ApiRequest {
            ticket: 5,
            token: "t".into(),
            kind: 0x0101,
            body: vec![9],
        };
        golden(
            &request,
            "\\x07\\x00\\x00\\x00\\x02\\x83\\x00\\x05\\x01t\\x81\\x02\\x01\\t",
        );
        let reply = ApiReply {
            ticket: 5,
            kind: 0x0110,
            body: vec![9],
        };
        golden(
            &reply,
            "\\x05\\x00\\x00\\x00\\x03\\x83\\x00\\x05\\x90\\x02\\x01\\t",
        );
        golden(
            &ApiAbandoned { ticket: 5 },
            "\\x01\\x00\\x00\\x00\\x04\\x83\\x00\\x05",
        );
    }

    fn rule() -> Rule {
        Rule {
            action: RuleAction::Deny,
            to: "10.0.0.0/8".parse().unwrap(),
            protocol: RuleProtocol::Tcp,
            ports: (80, 443),
        }
    }

    #[test]
    fn golden_networks() {
        let vm = run().vm;
        let egress = Egress {
            offline: true,
            rules: vec![rule()],
            bytes_per_second: 300,
            packets_per_second: 2,
            max_connections: 3,
        };
        let publication = Publication {
            autostart: false,
            token: Some([7; 32]),
        };
        let attach = AttachVm {
            vm: vm.clone(),
            generation: 300,
            hostname: "h".into(),
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
            egress: egress.clone(),
            publication: publication.clone(),
        };
        golden(
            &attach,
            "]\\x00\\x00\\x00\\x05\\x83\\x00\\x0bvm-1234abcd\\xac\\x02\\x01h\\x14abcdefghijklmnopqrst\\x01\\x01\\x01\\n10.0.0.0/8\\x01P\\xbb\\x03\\xac\\x02\\x02\\x03\\x00\\x01\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07",
        );
        let update = UpdateVm {
            vm: vm.clone(),
            egress,
            publication,
        };
        golden(
            &update,
            "D\\x00\\x00\\x00\\x06\\x83\\x00\\x0bvm-1234abcd\\x01\\x01\\x01\\n10.0.0.0/8\\x01P\\xbb\\x03\\xac\\x02\\x02\\x03\\x00\\x01\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07\\x07",
        );
        let detach = DetachVm {
            vm: vm.clone(),
            generation: 300,
        };
        golden(
            &detach,
            "\\x0e\\x00\\x00\\x00\\x07\\x83\\x00\\x0bvm-1234abcd\\xac\\x02",
        );
        let list = ListAttached {
            after: Some(vm.clone()),
        };
        golden(
            &list,
            "\\r\\x00\\x00\\x00\\x0e\\x83\\x00\\x01\\x0bvm-1234abcd",
        );
        let attached = Attached {
            vms: vec![(vm.clone(), 300)],
            more: true,
        };
        golden(
            &attached,
            "\\x10\\x00\\x00\\x00\\x0f\\x83\\x00\\x01\\x0bvm-1234abcd\\xac\\x02\\x01",
        );
        let lost = FramesLost {
            vm,
            generation: 300,
        };
        golden(
            &lost,
            "\\x0e\\x00\\x00\\x00\\x10\\x83\\x00\\x0bvm-1234abcd\\xac\\x02",
        );
    }

    #[test]
    fn golden_certificates() {
        let order = OrderCertificate {
            ticket: 5,
            directory: "https://a/d".into(),
            contact: String::new(),
            account_key: vec![1],
            names: vec!["a.b".into(), "*.a.b".into()],
            request: vec![2],
            update_server: "192.0.2.1:53".into(),
            zone: "b".into(),
            key_name: "k".into(),
            key_secret: vec![3],
            propagation_s: 300,
            name_servers: vec!["192.0.2.2:53".into()],
            roots: vec![vec![4]],
        };
        golden(
            &order,
            "C\\x00\\x00\\x00\\x11\\x83\\x00\\x05\\x0bhttps://a/d\\x00\\x01\\x01\\x02\\x03a.b\\x05*.a.b\\x01\\x02\\x0c192.0.2.1:53\\x01b\\x01k\\x01\\x03\\xac\\x02\\x01\\x0c192.0.2.2:53\\x01\\x01\\x04",
        );
        let ordered = CertificateOrdered {
            ticket: 5,
            chain: "PEM".into(),
            message: String::new(),
        };
        golden(
            &ordered,
            "\\x06\\x00\\x00\\x00\\x12\\x83\\x00\\x05\\x03PEM\\x00",
        );
    }

    #[test]
    fn golden_edge() {
        let vm = run().vm;
        let request = EdgeRequest {
            ticket: 5,
            kind: 0x8309,
            body: vec![9],
        };
        golden(
            &request,
            "\\x06\\x00\\x00\\x00\\x08\\x83\\x00\\x05\\x89\\x86\\x02\\x01\\t",
        );
        let look_up = LookUp {
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
        };
        golden(
            &look_up,
            "\\x15\\x00\\x00\\x00\\x18\\x83\\x00\\x14abcdefghijklmnopqrst",
        );
        let looked_up = LookedUp {
            publication: Publication {
                autostart: true,
                token: Some([b'a'; 32]),
            },
        };
        golden(
            &looked_up,
            "\\\"\\x00\\x00\\x00\\x19\\x83\\x00\\x01\\x01aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        );
        let admit = AdmitLink {
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
            secret: [b's'; 32],
            token: [b'a'; 32],
            lifetime_s: 300,
        };
        golden(
            &admit,
            "W\\x00\\x00\\x00\\x1a\\x83\\x00\\x14abcdefghijklmnopqrstssssssssssssssssssssssssssssssssaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\\xac\\x02",
        );
        let wake = Wake {
            subdomain: "abcdefghijklmnopqrst".parse().unwrap(),
        };
        golden(
            &wake,
            "\\x15\\x00\\x00\\x00\\t\\x83\\x00\\x14abcdefghijklmnopqrst",
        );
        let awake = Awake {
            vm: vm.clone(),
            generation: 300,
        };
        golden(
            &awake,
            "\\x0e\\x00\\x00\\x00\\n\\x83\\x00\\x0bvm-1234abcd\\xac\\x02",
        );
        golden(
            &DialAgent { vm: vm.clone() },
            "\\x0c\\x00\\x00\\x00\\x0b\\x83\\x00\\x0bvm-1234abcd",
        );
        let count = Count {
            ticket: 5,
            vm: vm.clone(),
        };
        golden(
            &count,
            "\\r\\x00\\x00\\x00\\x0c\\x83\\x00\\x05\\x0bvm-1234abcd",
        );
        let counters = NetworkCounters {
            frames_out: 1,
            requests: 300,
            ..NetworkCounters::default()
        };
        let counted = Counted {
            ticket: 5,
            counters: Some(counters),
        };
        golden(
            &counted,
            "\\x0e\\x00\\x00\\x00\\r\\x83\\x00\\x05\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\xac\\x02",
        );
    }
}
