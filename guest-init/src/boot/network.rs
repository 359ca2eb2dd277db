//! The network of a virtual machine: one interface, whose addresses, routes and gateway every machine
//! has alike. Nothing is asked of anybody, so there is nothing to wait for. What fails is logged and
//! lived with: a machine without a network still serves its agent.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::netlink::Netlink;
use crate::log;

const INTERFACE: &str = "eth0";
const ADDRESSES: [(IpAddr, u8); 2] = [
    (IpAddr::V4(Ipv4Addr::new(10, 213, 0, 2)), 24),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 2)),
        64,
    ),
];
const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 213, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 1)),
];
const GATEWAY_HARDWARE: [u8; 6] = [0x02, 0x73, 0x75, 0x70, 0x00, 0x01];

/// What could not be set.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetworkError {
    /// The machine has no such device.
    #[error("there is no interface {INTERFACE}: {0}; the machine has no network")]
    Missing(Errno),
    /// The kernel refused.
    #[error("cannot {what}: {errno}")]
    Refused {
        /// What was tried.
        what: String,
        /// Why not.
        errno: Errno,
    },
    /// A setting was refused.
    #[error("cannot set {path} to {value}: {cause}")]
    Setting {
        /// The setting.
        path: String,
        /// What it was to be.
        value: &'static str,
        /// Why not.
        cause: std::io::Error,
    },
}

/// Brings the interface up; logs what failed.
pub(super) fn bring_up() {
    let problems = configure();
    for problem in &problems {
        log::warn(format_args!(
            "event=network_setting_failed error=\"{problem}\""
        ));
    }
    if problems.is_empty() {
        log::info(format_args!("event=network_up interface={INTERFACE}"));
    }
}

fn configure() -> Vec<NetworkError> {
    let mut problems = Vec::new();
    // Whoever may run a program may ask whether a host answers.
    set(
        &mut problems,
        "ipv4/ping_group_range".to_owned(),
        "0 2147483647",
    );
    let interface = match if_nametoindex(INTERFACE) {
        Ok(interface) => interface,
        Err(errno) => {
            problems.push(NetworkError::Missing(errno));
            return problems;
        }
    };
    // Nothing is taken from announcements, and addresses are used without asking whether somebody
    // else has them: that would delay the first connection.
    for key in ["accept_ra", "autoconf", "accept_dad", "dad_transmits"] {
        set(&mut problems, format!("ipv6/conf/{INTERFACE}/{key}"), "0");
    }
    let mut done = |what: String, result: Result<(), Errno>| {
        if let Err(errno) = result {
            problems.push(NetworkError::Refused { what, errno });
        }
    };
    let mut netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(errno) => {
            done("open a netlink socket".to_owned(), Err(errno));
            return problems;
        }
    };
    done(format!("bring {INTERFACE} up"), netlink.set_up(interface));
    for (address, prefix) in ADDRESSES {
        done(
            format!("add the address {address}/{prefix}"),
            netlink.add_address(interface, address, prefix),
        );
    }
    for gateway in GATEWAYS {
        done(
            format!("name the gateway {gateway}"),
            netlink.add_router(interface, gateway, GATEWAY_HARDWARE),
        );
        done(
            format!("add the default route by {gateway}"),
            netlink.add_default_route(interface, gateway),
        );
    }
    problems
}

fn set(problems: &mut Vec<NetworkError>, name: String, value: &'static str) {
    let path = format!("/proc/sys/net/{name}");
    if let Err(cause) = fs::write(&path, value) {
        problems.push(NetworkError::Setting { path, value, cause });
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::process::Command;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};
    use nix::unistd::gettid;

    use super::*;
    use crate::system::kernel::loopback_up;

    /// Runs `test` in a network of its own.
    fn alone<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
                test()
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn ip(arguments: &str) -> String {
        let run = Command::new("ip")
            .args(arguments.split_whitespace())
            .output()
            .unwrap();
        assert!(
            run.status.success(),
            "ip {arguments}: {}",
            String::from_utf8_lossy(&run.stderr)
        );
        String::from_utf8(run.stdout).unwrap()
    }

    #[test]
    fn the_interface_gets_its_addresses_routes_and_gateway() {
        alone(|| {
            ip("link add eth0 mtu 9000 type veth peer name other");
            ip("link set other up");
            // Twice is as good as once.
            for _ in 0..2 {
                let problems = configure();
                assert!(problems.is_empty(), "{problems:?}");
                let addresses = ip("-o address show dev eth0 scope global");
                assert_eq!(addresses.lines().count(), 2, "{addresses}");
                assert!(addresses.contains("10.213.0.2/24"), "{addresses}");
                assert!(addresses.contains("fd73:7570::2/64"), "{addresses}");
                let all = ip("address show dev eth0");
                assert!(!all.contains("tentative"), "{all}");
                assert!(all.contains("mtu 9000"), "as the device has it: {all}");
                let routes = ip("-4 route show default") + &ip("-6 route show default");
                assert_eq!(routes.lines().count(), 2, "{routes}");
                assert!(
                    routes.contains("default via 10.213.0.1 dev eth0"),
                    "{routes}"
                );
                assert!(
                    routes.contains("default via fd73:7570::1 dev eth0"),
                    "{routes}"
                );
                let known = ip("neighbour show dev eth0 nud permanent");
                assert_eq!(known.lines().count(), 2, "{known}");
                assert_eq!(known.matches("02:73:75:70:00:01").count(), 2, "{known}");
                assert!(
                    known.contains("fd73:7570::1 lladdr 02:73:75:70:00:01 router"),
                    "{known}"
                );
            }
            let setting = |path: &str| fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap();
            for key in ["accept_ra", "autoconf", "accept_dad", "dad_transmits"] {
                assert_eq!(setting(&format!("ipv6/conf/eth0/{key}")), "0\n", "{key}");
            }
            assert_eq!(setting("ipv4/ping_group_range"), "0\t2147483647\n");
        });
    }

    #[test]
    fn the_gateway_is_reached_at_once_over_both_protocols() {
        let (name_thread, gateway_thread) = channel();
        let (ready, is_ready) = channel::<()>();
        let (done, is_done) = channel::<()>();
        let gateway = std::thread::spawn(move || {
            alone(move || {
                name_thread.send(gettid()).unwrap();
                is_ready.recv().unwrap();
                // As the gateway has it, and it knows its guest's hardware address as little.
                ip("link set other address 02:73:75:70:00:01");
                ip("link set other up");
                ip("address add 10.213.0.1/24 dev other");
                ip("address add fd73:7570::1/64 dev other nodad");
                let servers = [
                    TcpListener::bind("10.213.0.1:80").unwrap(),
                    TcpListener::bind("[fd73:7570::1]:80").unwrap(),
                ];
                done.send(()).unwrap();
                for server in servers {
                    let (mut stream, peer) = server.accept().unwrap();
                    stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
                }
            });
        });
        let thread = gateway_thread.recv().unwrap();
        alone(move || {
            ip("link add eth0 type veth peer name other");
            ip(&format!("link set other netns {thread}"));
            ready.send(()).unwrap();
            is_done.recv().unwrap();
            assert!(configure().is_empty());
            for (gateway, own) in [
                ("10.213.0.1:80", "10.213.0.2"),
                ("[fd73:7570::1]:80", "fd73:7570::2"),
            ] {
                let address = gateway.parse().unwrap();
                let mut stream =
                    TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                let mut seen = String::new();
                stream.read_to_string(&mut seen).unwrap();
                assert_eq!(seen, own);
            }
            // The rest of the world is behind the gateway.
            for (from, to) in [
                ("0.0.0.0:0", "93.184.216.34:9"),
                ("[::]:0", "[2001:db8::1]:9"),
            ] {
                let socket = UdpSocket::bind(from).unwrap();
                socket.connect(to).unwrap();
                let own = socket.local_addr().unwrap().ip();
                assert!(
                    ADDRESSES.iter().any(|(address, _)| *address == own),
                    "{own}"
                );
            }
        });
        gateway.join().unwrap();
    }

    #[test]
    fn a_machine_without_the_device_is_told_so_and_has_its_loopback() {
        alone(|| {
            loopback_up().unwrap();
            let problems = configure();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(matches!(problems[0], NetworkError::Missing(_)));
            let server = TcpListener::bind("[::1]:0").unwrap();
            TcpStream::connect(server.local_addr().unwrap()).unwrap();
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            TcpStream::connect(server.local_addr().unwrap()).unwrap();
        });
    }

    #[test]
    fn what_the_kernel_refuses_is_named_and_the_rest_is_set() {
        alone(|| {
            ip("link add eth0 type veth peer name other");
            fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap();
            let problems = configure();
            assert!(!problems.is_empty());
            for problem in &problems {
                assert!(problem.to_string().contains("fd73:7570::"), "{problem}");
            }
            assert!(ip("-4 route show default").contains("via 10.213.0.1"));
        });
    }
}
