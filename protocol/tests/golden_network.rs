//! The bytes of the messages about a VM's network: once released, these never change.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use protocol::encode;
use protocol::frame::HEADER_LEN;
use protocol::message::{Message, decode_body};
use protocol::network::{
    CreateLink, Destination, Egress, GetNetwork, LinkCreated, NetworkCounters, NetworkInfo,
    Publication, Rule, RuleAction, RuleProtocol, SetNetwork,
};
use protocol::vm::VmRef;

/// The frame is these bytes, and these bytes are the message.
#[track_caller]
fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, bytes: &[u8]) {
    assert_eq!(
        encode(message).unwrap().escape_ascii().to_string(),
        bytes.escape_ascii().to_string()
    );
    assert_eq!(&decode_body::<M>(&bytes[HEADER_LEN..]).unwrap(), message);
}

#[test]
fn golden_networks() {
    let vm: VmRef = "web".parse().unwrap();
    golden(
        &GetNetwork { vm: vm.clone() },
        b"\x04\0\0\0\x00\x04\0\x03web",
    );
    let to = [
        Destination::Everything,
        "192.0.2.0/24".parse().unwrap(),
        "2001:db8::1".parse().unwrap(),
        "example.org".parse().unwrap(),
        "*.example.org".parse().unwrap(),
    ];
    let rules = to.map(|to| Rule {
        action: RuleAction::Deny,
        to,
        protocol: RuleProtocol::Udp,
        ports: (53, 300),
    });
    let egress = Egress {
        offline: true,
        rules: rules.to_vec(),
        bytes_per_second: 300,
        packets_per_second: 2,
        max_connections: 3,
    };
    let publication = Publication {
        autostart: false,
        token: Some([7; 32]),
    };
    let set = SetNetwork {
        vm: vm.clone(),
        egress: Some(egress),
        publication: Some(publication),
    };
    golden(
        &set,
        b"\x80\0\0\0\x01\x04\0\x03web\x01\x01\x05\
          \x01\x01*\x02\x35\xac\x02\
          \x01\x0c192.0.2.0/24\x02\x35\xac\x02\
          \x01\x0f2001:db8::1/128\x02\x35\xac\x02\
          \x01\x0bexample.org\x02\x35\xac\x02\
          \x01\x0d*.example.org\x02\x35\xac\x02\
          \xac\x02\x02\x03\
          \x01\0\x01\
          \x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\
          \x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07",
    );
    let nothing = SetNetwork {
        vm: vm.clone(),
        egress: None,
        publication: None,
    };
    golden(&nothing, b"\x06\0\0\0\x01\x04\0\x03web\0\0");
    golden(&CreateLink { vm }, b"\x04\0\0\0\x02\x04\0\x03web");
    let link = LinkCreated {
        url: "https://a.b/".into(),
        lifetime_s: 300,
    };
    golden(&link, b"\x0f\0\0\0\x11\x04\0\x0chttps://a.b/\xac\x02");
    let info = NetworkInfo {
        egress: Egress::default(),
        publication: Publication::default(),
        counters: NetworkCounters {
            frames_out: 1,
            bytes_out: 2,
            frames_in: 3,
            bytes_in: 4,
            dropped: 5,
            connections: 6,
            open: 7,
            denied: 8,
            limited: 9,
            names: 10,
            requests: 300,
        },
    };
    golden(
        &info,
        b"\x13\0\0\0\x10\x04\0\0\0\0\0\0\x01\0\
          \x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\xac\x02",
    );
}
