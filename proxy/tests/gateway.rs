//! The gateway's promises to a guest, seen from a real kernel's TCP/IP.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod net;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use net::{Impairment, LIMIT, WORLD_V4, WORLD_V6, link, link_with, world};
use protocol::network::{Egress, Rule, RuleAction, RuleProtocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const MIB: usize = 1 << 20;

/// Bytes that are never the same at two places near each other.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut reader = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

async fn listen(address: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn dial(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Both directions at once, each ended by half a close; both ends get all bytes.
async fn both_ways(link: &net::Link, address: &str, size: usize) {
    let (listener, to) = listen(address).await;
    let (up, down) = (pattern(size, 1), pattern(size, 2));
    let expected = (blake3::hash(&up), blake3::hash(&down));
    let server = async {
        let (stream, _) = listener.accept().await.unwrap();
        let (mut reader, mut writer) = stream.into_split();
        let send = async {
            writer.write_all(&down).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let receive = reader.read_to_end(&mut got);
        let ((), received) = tokio::join!(send, receive);
        received.unwrap();
        blake3::hash(&got)
    };
    let guest = link.guest.run(move || {
        let mut stream = dial(to).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&up).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        blake3::hash(&got)
    });
    let (at_server, at_guest) = tokio::join!(server, guest);
    assert_eq!((at_server, at_guest), expected);
}

#[test]
fn tcp_carries_every_byte_both_ways_at_once_and_ends_each_way_by_itself() {
    world(|| async {
        let link = link();
        both_ways(&link, WORLD_V4, 100 * MIB).await;
        both_ways(&link, WORLD_V6, 10 * MIB).await;
    });
}

#[test]
fn every_byte_arrives_over_a_channel_that_loses_repeats_and_reorders() {
    for seed in [1, 2, 3] {
        world(move || async move {
            let impairment = Impairment {
                seed,
                lost: 20,
                repeated: 20,
                delay: 3,
            };
            let link = link_with(impairment, Egress::default());
            both_ways(&link, WORLD_V4, MIB).await;
        });
    }
}

#[test]
fn one_half_of_a_connection_goes_on_after_the_other_has_ended() {
    world(|| async {
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        let guest = link.guest.run(move || {
            let mut stream = dial(to).unwrap();
            stream.write_all(b"question").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut question = String::new();
            stream.read_to_string(&mut question).await.unwrap();
            // The guest's end has come; the answer has not gone yet.
            stream.write_all(question.as_bytes()).await.unwrap();
            stream.write_all(b" and answer").await.unwrap();
        };
        let (answer, ()) = tokio::join!(guest, server);
        assert_eq!(answer, "question and answer");
        // And the other way round: the world ends first.
        let guest = link.guest.run(move || {
            let mut stream = dial(to).unwrap();
            let mut greeting = String::new();
            stream.read_to_string(&mut greeting).unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
        });
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"greeting").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut echo = String::new();
            stream.read_to_string(&mut echo).await.unwrap();
            echo
        };
        let ((), echo) = tokio::join!(guest, server);
        assert_eq!(echo, "greeting");
    });
}

#[test]
fn nothing_is_left_of_connections_that_ended() {
    world(|| async {
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        });
        link.guest
            .run(move || {
                for _ in 0..300 {
                    let mut stream = dial(to).unwrap();
                    stream.write_all(b"x").unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).unwrap();
                    assert_eq!(bytes, b"x");
                }
            })
            .await;
        let counters = link.stack.counters();
        assert_eq!(counters.connections, 300);
        // The last acknowledgement may be under way.
        while link.stack.counters().open != 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(link.common.open(), 0);
        server.abort();
    });
}

#[test]
fn refused_and_unreachable_look_to_the_guest_as_they_are() {
    world(|| async {
        let link = link();
        for address in [WORLD_V4, WORLD_V6] {
            let (listener, to) = listen(address).await;
            drop(listener);
            let error = link.guest.run(move || dial(to).unwrap_err()).await;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        // There is no route to these in the world's namespace.
        for address in ["9.9.9.9:80", "[2620:fe::fe]:80"] {
            let error = link
                .guest
                .run(move || dial(address.parse().unwrap()).unwrap_err())
                .await;
            assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{address}");
        }
        assert_eq!(link.stack.counters().open, 0);
    });
}

#[test]
fn the_guest_is_connected_only_when_the_world_has_accepted() {
    world(|| async {
        let link = link();
        // A queue of one that is full drops further SYNs, as a host does that does not answer.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket
            .bind((WORLD_V4.parse::<Ipv4Addr>().unwrap(), 0).into())
            .unwrap();
        let to = socket.local_addr().unwrap();
        let listener = socket.listen(1).unwrap();
        let mut queued = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(
            Duration::from_millis(500),
            tokio::net::TcpStream::connect(to),
        )
        .await
        {
            queued.push(stream);
        }
        let error = link
            .guest
            .run(move || TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap_err())
            .await;
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        // With room in the queue the same address answers.
        for _ in 0..queued.len() {
            listener.accept().await.unwrap();
        }
        let guest = link.guest.run(move || dial(to).unwrap());
        let (_stream, _) = tokio::join!(guest, listener.accept());
    });
}

#[test]
fn a_reset_passes_through_in_both_directions() {
    world(|| async {
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        // From the world.
        let guest = link.guest.run(move || {
            let mut stream = dial(to).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read(&mut [0; 10]).unwrap_err()
        });
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            #[allow(deprecated)]
            stream.set_linger(Some(Duration::ZERO)).unwrap();
        };
        let (error, ()) = tokio::join!(guest, server);
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        // From the guest: a socket that is closed with bytes unread resets.
        let guest = link.guest.run(move || {
            let mut stream = dial(to).unwrap();
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
        });
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"many bytes").await.unwrap();
            stream.read(&mut [0; 10]).await.unwrap_err()
        };
        let ((), error) = tokio::join!(guest, server);
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn who_does_not_read_makes_the_other_side_wait() {
    world(|| async {
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        let guest = link.guest.run(move || {
            let mut stream = dial(to).unwrap();
            stream.set_nonblocking(true).unwrap();
            let mut sent = 0_usize;
            let mut quiet = 0;
            // Until nothing is taken for a while.
            while quiet < 20 {
                match stream.write(&[7; 65536]) {
                    Ok(length) => {
                        sent += length;
                        quiet = 0;
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::WouldBlock);
                        std::thread::sleep(Duration::from_millis(20));
                        quiet += 1;
                    }
                }
                assert!(sent < 64 * MIB, "taken without end");
            }
            (stream, sent)
        });
        let ((stream, sent), (mut server, _)) =
            tokio::join!(guest, async { listener.accept().await.unwrap() });
        let reader = tokio::spawn(async move {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            got.len()
        });
        // Reading lets everything come that was taken.
        link.guest.run(move || drop(stream)).await;
        assert_eq!(reader.await.unwrap(), sent);
    });
}

#[test]
fn the_edge_reaches_a_port_of_the_guest_and_learns_what_happens_there() {
    world(|| async {
        let link = link();
        let listener = link
            .guest
            .run(|| std::net::TcpListener::bind("10.213.0.2:3000").unwrap())
            .await;
        let guest = link.guest.run(move || {
            let (mut stream, from) = listener.accept().unwrap();
            let mut question = String::new();
            stream.read_to_string(&mut question).unwrap();
            stream.write_all(question.as_bytes()).unwrap();
            drop(stream);
            // The second connection is reset: closed with a byte unread.
            let (stream, _) = listener.accept().unwrap();
            stream.peek(&mut [0]).unwrap();
            drop(stream);
            from
        });
        let edge = async {
            let mut stream = link.stack.connect(3000).await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "hello");
            let mut stream = link.stack.connect(3000).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read(&mut [0; 10]).await.unwrap_err()
        };
        let (from, error) = tokio::join!(guest, edge);
        assert_eq!(from.ip().to_string(), "10.213.0.1");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let refused = link.stack.connect(3001).await.unwrap_err();
        assert_eq!(refused, proxy::gateway::ConnectError::Refused);
        assert_eq!(link.stack.counters().open, 0);
    });
}

fn connected(to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    let patience = Some(Duration::from_secs(3));
    socket.set_read_timeout(patience).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Sends a datagram until its like comes back, or word that it cannot: kernels lose datagrams when
/// memory is short, and limit the errors that they send.
fn told(socket: &UdpSocket, length: usize) -> std::io::Result<()> {
    loop {
        socket.send(&vec![5; length])?;
        match socket.recv(&mut [0; 65536]) {
            Ok(back) if back == length => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

#[test]
fn datagrams_go_both_ways_and_a_closed_port_is_told() {
    world(|| async {
        let link = link();
        for address in [WORLD_V4, WORLD_V6] {
            let server = tokio::net::UdpSocket::bind((address, 0)).await.unwrap();
            let to = server.local_addr().unwrap();
            let guest = link.guest.run(move || {
                let socket = connected(to);
                [0, 1, 1500, 60_000].map(|length| told(&socket, length).map_err(|e| e.kind()))
            });
            let echo = async {
                let mut buffer = [0; 65536];
                loop {
                    let (length, from) = server.recv_from(&mut buffer).await.unwrap();
                    server.send_to(&buffer[..length], from).await.unwrap();
                }
            };
            tokio::select! {
                told = guest => assert_eq!(told, [Ok(()); 4], "{address}"),
                () = echo => {}
            }
            drop(server);
            let error = link
                .guest
                .run(move || told(&connected(to), 1).unwrap_err())
                .await;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
    });
}

#[test]
fn pings_reach_the_gateway_and_the_world() {
    world(|| async {
        let link = link();
        for address in ["10.213.0.1", "fd73:7570::1", WORLD_V4, WORLD_V6] {
            for length in [0, 56, 5000] {
                let data = pattern(length, 3);
                let to = address.parse().unwrap();
                let reply = link.guest.ping(to, data.clone()).await;
                assert_eq!(reply.unwrap(), data, "{address}");
            }
        }
        // Each ping to the world has an identifier of its own.
        assert_eq!(link.stack.counters().connections, 6);
    });
}

#[test]
fn rules_refuse_tcp_with_a_reset_and_are_counted() {
    world(|| async {
        let rule = |action, to: &str| Rule {
            action,
            to: to.parse().unwrap(),
            protocol: RuleProtocol::Any,
            ports: (0, 65535),
        };
        let link = link_with(
            Impairment::default(),
            Egress {
                rules: vec![
                    rule(RuleAction::Deny, WORLD_V4),
                    rule(RuleAction::Allow, "192.168.9.0/24"),
                ],
                ..Egress::default()
            },
        );
        for address in ["5.5.5.5:80", "169.254.169.254:80", "10.213.0.1:80"] {
            let error = link
                .guest
                .run(move || dial(address.parse().unwrap()).unwrap_err())
                .await;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
        assert_eq!(link.stack.counters().denied, 2);
        // Allowed, and there is no route.
        let error = link
            .guest
            .run(|| dial("192.168.9.1:80".parse().unwrap()).unwrap_err())
            .await;
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
    });
}

#[test]
fn offline_ends_open_connections_to_the_world_and_no_others() {
    world(|| async {
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        let guest = link.guest.run(move || {
            let inbound = std::net::TcpListener::bind("10.213.0.2:3000").unwrap();
            (dial(to).unwrap(), inbound)
        });
        let ((mut outward, inbound), (mut server, _)) =
            tokio::join!(guest, async { listener.accept().await.unwrap() });
        let accept = link.guest.run(move || inbound.accept().unwrap().0);
        let (edge, mut inward) = tokio::join!(link.stack.connect(3000), accept);
        let mut edge = edge.unwrap();
        link.stack.update(Egress {
            offline: true,
            ..Egress::default()
        });
        let error = server.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let (error, refused) = link
            .guest
            .run(move || {
                (
                    outward.read(&mut [0; 10]).unwrap_err(),
                    dial(to).unwrap_err(),
                )
            })
            .await;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        edge.write_all(b"still").await.unwrap();
        let mut bytes = [0; 5];
        link.guest
            .run(move || {
                inward.read_exact(&mut bytes).unwrap();
                assert_eq!(&bytes, b"still");
            })
            .await;
        assert_eq!(link.stack.counters().open, 0);
    });
}

#[test]
fn connections_beyond_the_limit_are_refused_and_counted() {
    world(|| async {
        let link = link_with(
            Impairment::default(),
            Egress {
                max_connections: 3,
                ..Egress::default()
            },
        );
        let (listener, to) = listen(WORLD_V4).await;
        let server = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                held.push(listener.accept().await.unwrap());
            }
        });
        let (held, error) = link
            .guest
            .run(move || {
                let held: Vec<_> = (0..3).map(|_| dial(to).unwrap()).collect();
                (held, dial(to).unwrap_err())
            })
            .await;
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let counters = link.stack.counters();
        assert_eq!((counters.open, counters.limited), (3, 1));
        // One that ends makes room for another. The server holds it, so it is reset.
        server.abort();
        link.guest.run(move || drop(held)).await;
        while link.stack.counters().open > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn questions_for_names_reach_the_resolver_in_datagrams_and_on_streams() {
    world(|| async {
        let link = link();
        let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x01\x00\x01";
        for gateway in ["10.213.0.1:53", "[fd73:7570::1]:53"] {
            let to: SocketAddr = gateway.parse().unwrap();
            let (datagram, stream) = link
                .guest
                .run(move || {
                    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                    let socket = UdpSocket::bind(any).unwrap();
                    socket.set_read_timeout(Some(LIMIT)).unwrap();
                    socket.connect(to).unwrap();
                    socket.send(query).unwrap();
                    let mut buffer = [0; 512];
                    let length = socket.recv(&mut buffer).unwrap();
                    let mut stream = dial(to).unwrap();
                    stream.write_all(&[0, query.len() as u8]).unwrap();
                    stream.write_all(query).unwrap();
                    let mut prefix = [0; 2];
                    stream.read_exact(&mut prefix).unwrap();
                    let mut answer = vec![0; u16::from_be_bytes(prefix).into()];
                    stream.read_exact(&mut answer).unwrap();
                    (buffer[..length].to_vec(), answer)
                })
                .await;
            for answer in [datagram, stream] {
                // The same number, and an answer.
                assert_eq!(answer[..2], query[..2]);
                assert_eq!(answer[2] & 0x80, 0x80);
            }
        }
        assert_eq!(link.stack.counters().names, 4);
    });
}

#[test]
fn a_limit_on_bandwidth_and_packets_slows_and_loses_nothing() {
    world(|| async {
        let egress = Egress {
            bytes_per_second: 2 << 20,
            packets_per_second: 500,
            ..Egress::default()
        };
        let link = link_with(Impairment::default(), egress);
        both_ways(&link, WORLD_V4, MIB).await;
    });
}

#[test]
fn a_thousand_connections_stay_open_side_by_side() {
    world(|| async {
        const NUMBER: usize = 1024;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 16384, 16384)
            .unwrap();
        let link = link();
        let (listener, to) = listen(WORLD_V4).await;
        let server = tokio::spawn(async move {
            for _ in 0..NUMBER {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).await.is_ok() {
                        stream.write_all(&byte).await.unwrap();
                    }
                });
            }
        });
        link.guest
            .run(move || {
                let mut streams: Vec<_> = (0..NUMBER).map(|_| dial(to).unwrap()).collect();
                assert_eq!(dial(to).unwrap_err().kind(), ErrorKind::ConnectionRefused);
                for round in 0..3_u8 {
                    for stream in &mut streams {
                        stream.write_all(&[round]).unwrap();
                    }
                    for stream in &mut streams {
                        let mut byte = [9];
                        stream.read_exact(&mut byte).unwrap();
                        assert_eq!(byte, [round]);
                    }
                }
            })
            .await;
        server.await.unwrap();
        assert_eq!(link.stack.counters().connections, NUMBER as u64);
    });
}

#[test]
fn the_edge_learns_that_a_connection_did_not_end_but_its_vm_did() {
    world(|| async {
        let net::Link {
            stack,
            guest,
            common: _common,
        } = link();
        let listener = guest
            .run(|| std::net::TcpListener::bind("10.213.0.2:3000").unwrap())
            .await;
        let accept = guest.run(move || listener.accept().unwrap().0);
        let (edge, _inside) = tokio::join!(stack.connect(3000), accept);
        let mut edge = edge.unwrap();
        drop(stack);
        let error = edge.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}
