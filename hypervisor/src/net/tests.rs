//! Net against a small DHCP server of the test's, on a pair of virtual interfaces in a network
//! namespace of its own. Needs root and the `ip` program.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use protocol::host::channel::receive;
use protocol::message::decode;

use super::*;
use crate::init::Links;

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_ascii_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Answers two requests: an offer to the first, an acknowledgement to the second.
fn serve_one_lease(server: &UdpSocket) {
    const DISCOVER: u8 = 1;
    const REQUEST: u8 = 3;
    let mut packet = [0; 1500];
    loop {
        let (length, _) = server.recv_from(&mut packet).unwrap();
        let request = &packet[..length];
        let at = 240
            + request[240..]
                .windows(2)
                .position(|two| two == [53, 1])
                .unwrap();
        let kind = request[at + 2];
        let mut reply = vec![0; 236];
        reply[..8].copy_from_slice(&[2, 1, 6, 0, request[4], request[5], request[6], request[7]]);
        reply[16..20].copy_from_slice(&[10, 9, 0, 7]);
        reply[28..44].copy_from_slice(&request[28..44]);
        reply.extend([99, 130, 83, 99]);
        reply.extend([53, 1, if kind == DISCOVER { 2 } else { 5 }]);
        reply.extend([54, 4, 10, 9, 0, 1, 51, 4, 0, 0, 14, 16]);
        reply.extend([1, 4, 255, 255, 255, 0, 3, 4, 10, 9, 0, 1]);
        reply.extend([6, 8, 10, 9, 0, 2, 10, 9, 0, 3, 255]);
        server.send_to(&reply, "255.255.255.255:68").unwrap();
        if kind == REQUEST {
            return;
        }
    }
}

#[test]
fn an_address_is_learned_set_and_taken_away_with_the_carrier() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "run this test as root: it makes a network namespace"
    );
    // This thread and those that it starts; no other test notices.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link add ours type veth peer name theirs");
    ip("addr add 10.9.0.1/24 dev theirs");
    ip("link set theirs up");
    let mut links = Links::default();
    links.bring_up();
    let index = Netlink::open()
        .unwrap()
        .links()
        .unwrap()
        .into_iter()
        .find(|link| link.name == "ours")
        .map(|link| {
            assert!(link.up);
            link.index
        })
        .unwrap();
    let server = UdpSocket::bind("0.0.0.0:67").unwrap();
    server.set_broadcast(true).unwrap();
    setsockopt(&server, sockopt::BindToDevice, &"theirs".into()).unwrap();
    let served = std::thread::spawn(move || serve_one_lease(&server));
    let (ours, theirs) = crate::supervisor::pair().unwrap();
    // The test waits.
    nix::fcntl::fcntl(
        &ours,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
    )
    .unwrap();
    let net = std::thread::spawn(move || {
        run(Descriptors::from_named([(
            crate::supervisor::SUPERVISOR,
            theirs,
        )]))
    });
    let lease_of = |wanted: fn(&Lease) -> bool| loop {
        let packet = receive(ours.as_fd()).unwrap().unwrap();
        let lease: Lease = decode(&packet.frame).unwrap();
        if lease.interface == index && wanted(&lease) {
            break lease;
        }
    };
    let lease = lease_of(|lease| lease.address.is_some());
    served.join().unwrap();
    assert_eq!(lease.address, Some(([10, 9, 0, 7], 24)));
    assert_eq!(lease.gateway, Some([10, 9, 0, 1]));
    assert_eq!(lease.name_servers, [[10, 9, 0, 2], [10, 9, 0, 3]]);
    links.apply(&lease);
    // Said twice, it is set once.
    links.apply(&lease);
    assert!(ip("-4 addr show dev ours").contains("inet 10.9.0.7/24"));
    assert!(ip("route show default").contains("via 10.9.0.1 dev ours"));
    ip("link set theirs down");
    let none = lease_of(|lease| lease.address.is_none());
    links.apply(&none);
    assert!(!ip("-4 addr show dev ours").contains("inet "));
    assert!(ip("route show default").is_empty());
    drop(ours);
    net.join().unwrap().unwrap();
}
