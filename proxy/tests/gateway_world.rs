//! What the world and the rules say of an address, as a guest hears it; and a tool that people use.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod net;

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use net::{LIMIT, Link, WORLD_V4, run, world};
use protocol::host::proxy::ServeGateway;
use protocol::network::{Egress, Rule, RuleAction, RuleProtocol};
use proxy::gateway::{Common, Stack};
use tokio::net::TcpListener;

fn dial(address: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, LIMIT)
}

#[test]
fn hosts_that_cannot_be_reached_are_told_apart_as_the_world_tells_them() {
    world(|| async {
        for line in [
            "ip route add unreachable 7.7.7.0/24",
            "ip route add prohibit 7.7.8.0/24",
            "ip -6 route add unreachable 2600:7::/32",
            "ip -6 route add prohibit 2600:8::/32",
        ] {
            run(line);
        }
        let link = net::link();
        // Linux hears "host unreachable" from either ICMP message; ICMPv6's it tells apart.
        for (address, expected) in [
            ("7.7.7.7:80", ErrorKind::HostUnreachable),
            ("7.7.8.8:80", ErrorKind::HostUnreachable),
            ("[2600:7::7]:80", ErrorKind::HostUnreachable),
            ("[2600:8::8]:80", ErrorKind::PermissionDenied),
        ] {
            let dialled = link.guest.run(move || dial(address.parse().unwrap()));
            assert_eq!(dialled.await.unwrap_err().kind(), expected, "{address}");
        }
        assert_eq!(link.stack.counters().open, 0);
    });
}

/// A name server that knows one name, with a lifetime of an hour; what it was asked.
async fn name_server(name: &'static [u8], is: Ipv4Addr) -> (SocketAddr, Arc<Mutex<usize>>) {
    let socket = tokio::net::UdpSocket::bind((WORLD_V4, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    let asked = Arc::<Mutex<usize>>::default();
    let counted = Arc::clone(&asked);
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            *counted.lock().unwrap() += 1;
            let mut answer = buffer[..length].to_vec();
            // An answer, recursive (RFC 1035, 4.1.1); no such name, unless it is the one.
            answer[2..4].copy_from_slice(&[0x81, 0x83]);
            answer[8..12].fill(0);
            if answer[12..].to_ascii_lowercase().starts_with(name) {
                answer.truncate(12 + name.len() + 4);
                answer[3] = 0x80;
                answer[7] = 1;
                answer[10..12].fill(0);
                // The name of the question, A, IN, an hour, four bytes.
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0x0e, 0x10, 0, 4]);
                answer.extend(is.octets());
            }
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    (address, asked)
}

/// What the gateway answers a guest's question for the addresses of a name: the code and the bytes.
fn resolve(name: &[u8]) -> (u8, Vec<u8>) {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(name);
    query.extend([0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send_to(&query, "10.213.0.1:53").unwrap();
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..2], query[..2]);
    (buffer[3] & 15, buffer[..length].to_vec())
}

#[test]
fn a_rule_for_a_name_opens_the_address_that_the_vm_was_given_for_it_and_no_other() {
    world(|| async {
        const OPEN: &[u8] = b"\x05fetch\x07example\x00";
        const SHUT: &[u8] = b"\x05other\x07example\x00";
        run("ip address add 5.5.5.6/32 dev lo");
        let rule = |action, to: &str| Rule {
            action,
            to: to.parse().unwrap(),
            protocol: RuleProtocol::Any,
            ports: (0, 65_535),
        };
        let (server, asked) = name_server(OPEN, WORLD_V4.parse().unwrap()).await;
        let common = Common::new();
        common.set(ServeGateway {
            name_servers: vec![server.to_string()],
            ..ServeGateway::default()
        });
        let (guest, channel) = net::Guest::new(net::Impairment::default());
        let egress = Egress {
            rules: vec![
                rule(RuleAction::Allow, "fetch.example"),
                rule(RuleAction::Deny, "*"),
            ],
            ..Egress::default()
        };
        let stack = Stack::start(net::settings(egress), channel, Arc::clone(&common)).unwrap();
        let link = Link {
            stack,
            guest,
            common,
        };
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepting = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                held.push(listener.accept().await.unwrap());
            }
        });
        let kind = async |address: Ipv4Addr| {
            let dialled = link.guest.run(move || dial((address, port).into()));
            dialled.await.map(drop).map_err(|error| error.kind())
        };
        let open = WORLD_V4.parse().unwrap();
        let refused = Err(ErrorKind::ConnectionRefused);
        assert_eq!(kind(open).await, refused, "before it was asked for");
        let (code, answer) = link.guest.run(|| resolve(OPEN)).await;
        assert_eq!(code, 0);
        assert!(answer.ends_with(&open.octets()), "{answer:?}");
        assert_eq!(kind(open).await, Ok(()));
        assert_eq!(kind(Ipv4Addr::new(5, 5, 5, 6)).await, refused, "another");
        // A name that no rule opens is not even asked for.
        let before = *asked.lock().unwrap();
        let (code, _) = link.guest.run(|| resolve(SHUT)).await;
        assert_ne!(code, 0);
        assert_eq!(*asked.lock().unwrap(), before);
        assert_eq!(link.stack.counters().denied, 2);
        accepting.abort();
    });
}

fn iperf3(arguments: &[&str]) -> Output {
    let mut command = Command::new("iperf3");
    let output = command.args(arguments).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("iperf3: {error}; run ./setup.sh"))
}

#[test]
fn iperf3_measures_in_both_directions() {
    const BYTES: u64 = 32 << 20;
    world(|| async {
        let link = net::link();
        for more in ["", "--reverse"] {
            let mut server = Command::new("iperf3")
                .args(["--server", "--one-off", "--forceflush", "--bind", WORLD_V4])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .expect("iperf3 is missing; run ./setup.sh");
            let mut out = server.stdout.take().unwrap();
            let waiting = tokio::task::spawn_blocking(move || {
                let mut said = String::new();
                while !said.contains("listening") {
                    let mut piece = [0; 256];
                    let length = out.read(&mut piece).unwrap();
                    assert!(length > 0, "{said}");
                    said += &String::from_utf8_lossy(&piece[..length]);
                }
                out
            });
            let _out = waiting.await.unwrap();
            let bytes = BYTES.to_string();
            let client = link.guest.run(move || {
                let mut arguments = vec!["--client", WORLD_V4, "--json", "--bytes", &bytes];
                arguments.extend((!more.is_empty()).then_some(more));
                iperf3(&arguments)
            });
            let output = client.await;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{more}: {said}");
            let report: serde_json::Value = serde_json::from_str(&said).unwrap();
            let received = report["end"]["sum_received"]["bytes"].as_u64().unwrap();
            // It counts when the sender has sent all: the rest is in the buffers on the way.
            assert!(received >= BYTES / 2, "{more}: {received} bytes");
            let _ = server.kill();
            server.wait().unwrap();
        }
    });
}
