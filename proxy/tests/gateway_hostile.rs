//! What a hostile guest can do to the gateway: frames written by hand into its channel.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "hostile_vm/frames.rs"]
mod frames;
mod net;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use frames::{Random, arp, damaged, ip, ping, solicit, syn};
use net::{WORLD_V4, settings, world};
use protocol::network::Egress;
use proxy::gateway::address::{
    GATEWAY_LINK_LOCAL, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_V4, GUEST_V6, MTU,
};
use proxy::gateway::{Common, Stack};
use smoltcp::wire::{ArpPacket, Icmpv6Packet, IpProtocol, Ipv4Packet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A stack whose guest is the test.
struct Raw {
    stack: Stack,
    channel: UnixStream,
    common: Arc<Common>,
}

impl Raw {
    fn new() -> Self {
        let common = Common::new();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let settings = settings(Egress::default());
        let stack = Stack::start(settings, ours.into(), Arc::clone(&common)).unwrap();
        Self {
            stack,
            channel: UnixStream::from_std(theirs).unwrap(),
            common,
        }
    }

    async fn send(&mut self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.channel.write_all(&length).await.unwrap();
        self.channel.write_all(frame).await.unwrap();
    }

    async fn next(&mut self) -> Vec<u8> {
        let length = self.channel.read_u32().await.unwrap();
        let mut frame = vec![0; length.try_into().unwrap()];
        self.channel.read_exact(&mut frame).await.unwrap();
        frame
    }

    /// Frames are looked at in their order, so the answer to this comes after all others.
    async fn until_arp(&mut self) -> Vec<Vec<u8>> {
        self.send(&arp(GATEWAY_V4)).await;
        let mut frames = Vec::new();
        loop {
            let frame = self.next().await;
            if frame[12..14] == [8, 6] {
                return frames;
            }
            frames.push(frame);
        }
    }
}

#[test]
fn arp_and_neighbour_discovery_are_answered_for_the_gateways_addresses_alone() {
    world(|| async {
        let mut raw = Raw::new();
        for other in [
            GUEST_V4,
            Ipv4Addr::new(10, 213, 0, 3),
            Ipv4Addr::new(8, 8, 8, 8),
        ] {
            raw.send(&arp(other)).await;
        }
        raw.send(&arp(GATEWAY_V4)).await;
        let answer = raw.next().await;
        let reply = ArpPacket::new_checked(&answer[14..]).unwrap();
        assert_eq!(reply.source_protocol_addr(), GATEWAY_V4.octets());
        assert_eq!(reply.source_hardware_addr(), GATEWAY_MAC.0);
        for other in ["fd73:7570::3", "fd73:7570::2", "fe80::2", "2600::5"] {
            raw.send(&solicit(other.parse().unwrap())).await;
        }
        for own in [GATEWAY_V6, GATEWAY_LINK_LOCAL] {
            raw.send(&solicit(own)).await;
            let answer = raw.next().await;
            let message = Icmpv6Packet::new_checked(&answer[54..]).unwrap();
            assert_eq!(message.target_addr(), own);
        }
        assert_eq!(raw.stack.counters().dropped, 7);
    });
}

#[test]
fn what_is_not_understood_is_thrown_away_counted_and_not_answered() {
    world(|| async {
        let mut raw = Raw::new();
        let good = ping(b"data");
        raw.send(&good).await;
        raw.next().await;
        let changed = |change: fn(&mut Ipv4Packet<&mut [u8]>)| {
            let mut bytes = good.clone();
            let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
            change(&mut packet);
            packet.fill_checksum();
            bytes
        };
        let to_world: IpAddr = WORLD_V4.parse().unwrap();
        let mut long_header = good.clone();
        long_header[14] = 0x4f;
        let mut vlan = good.clone();
        vlan.splice(12..12, [0x81, 0, 0, 5]);
        let hop_by_hop = {
            let payload = [58, 0, 5, 2, 0, 0, 1, 0, 128, 0, 0, 0, 0, 0, 0, 0];
            ip(
                GUEST_V6.into(),
                GATEWAY_V6.into(),
                IpProtocol::HopByHop,
                1,
                &payload,
            )
        };
        let bad = [
            vec![1],
            good[..14].to_vec(),
            good[..30].to_vec(),
            vlan,
            hop_by_hop,
            changed(|packet| packet.set_more_frags(true)),
            changed(|packet| packet.set_frag_offset(64)),
            changed(|packet| packet.set_src_addr(Ipv4Addr::new(10, 213, 0, 9))),
            changed(|packet| packet.set_src_addr(GATEWAY_V4)),
            changed(|packet| packet.set_version(5)),
            long_header,
            changed(|packet| packet.set_total_len(65535)),
            changed(|packet| packet.set_next_header(IpProtocol::Unknown(99))),
            ip(GUEST_V4.into(), to_world, IpProtocol::Tcp, 64, &[0; 20]),
            ip(
                GUEST_V4.into(),
                to_world,
                IpProtocol::Udp,
                64,
                &[0, 9, 0, 9, 0, 99, 0, 0],
            ),
            ip(
                GUEST_V4.into(),
                "224.0.0.251".parse().unwrap(),
                IpProtocol::Tcp,
                1,
                &[9; 20],
            ),
        ];
        for frame in &bad {
            raw.send(frame).await;
        }
        assert_eq!(raw.until_arp().await, Vec::<Vec<u8>>::new());
        assert_eq!(raw.stack.counters().dropped, bad.len() as u64);
    });
}

#[test]
fn damaged_frames_hurt_nobody() {
    world(|| async {
        let mut raw = Raw::new();
        let listener = tokio::net::TcpListener::bind((WORLD_V4, 0)).await.unwrap();
        let to = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            loop {
                listener.accept().await.unwrap();
            }
        });
        let mut random = Random(42);
        for _ in 0..200 {
            for _ in 0..100 {
                raw.send(&damaged(&mut random, to)).await;
            }
            raw.until_arp().await;
        }
        assert_eq!(raw.common.panics(), 0);
        server.abort();
    });
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn connections_that_the_world_does_not_answer_are_bounded() {
    world(|| async {
        let mut raw = Raw::new();
        // A full queue: the world does not answer.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket
            .bind((WORLD_V4.parse::<Ipv4Addr>().unwrap(), 0).into())
            .unwrap();
        let to = socket.local_addr().unwrap();
        let _listener = socket.listen(1).unwrap();
        let mut queued = Vec::new();
        let wait = Duration::from_millis(500);
        while let Ok(Ok(stream)) =
            tokio::time::timeout(wait, tokio::net::TcpStream::connect(to)).await
        {
            queued.push(stream);
        }
        let before = resident_bytes();
        let mut resets = 0;
        for round in 0..100_u16 {
            for number in 0..1000_u16 {
                // 50,000 ports, each one twice.
                raw.send(&syn(1000 + (round % 50) * 1000 + number, to))
                    .await;
            }
            resets += raw.until_arp().await.len();
        }
        // 256 are waited for, in both rounds; all others were refused at once.
        assert_eq!(resets, 100_000 - 2 * 256);
        assert_eq!(raw.stack.counters().limited, 100_000 - 2 * 256);
        assert_eq!(raw.stack.counters().open, 256);
        assert!(resident_bytes() < before + (32 << 20));
    });
}

#[test]
fn a_vm_that_takes_nothing_is_asked_for_no_more() {
    world(|| async {
        let mut raw = Raw::new();
        let ping = ping(&vec![3; MTU - 28]);
        let mut message = u32::try_from(ping.len()).unwrap().to_be_bytes().to_vec();
        message.extend(&ping);
        let mut written = 0;
        // Until nothing is taken for a while, wherever in a frame that is.
        loop {
            let part = &message[written % message.len()..];
            let write = tokio::time::timeout(Duration::from_millis(500), raw.channel.write(part));
            match write.await {
                Ok(length) => written += length.unwrap(),
                Err(_) => break,
            }
            assert!(written < 64 << 20, "taken without end");
        }
        // Everything that was asked is answered once it is read.
        let whole = written / message.len();
        let rest = message[written % message.len()..].to_vec();
        for _ in 0..whole {
            assert_eq!(raw.next().await.len(), ping.len());
        }
        if rest.len() < message.len() {
            raw.channel.write_all(&rest).await.unwrap();
            raw.next().await;
        }
        assert!(raw.until_arp().await.is_empty());
    });
}

#[test]
fn what_had_to_wait_for_room_comes_when_there_is_room() {
    world(|| async {
        let mut raw = Raw::new();
        let server = tokio::net::UdpSocket::bind((WORLD_V4, 0)).await.unwrap();
        let to = server.local_addr().unwrap();
        let mut udp = vec![0, 9, 0, 0, 0, 9, 0, 0, 1];
        udp[2..4].copy_from_slice(&to.port().to_be_bytes());
        raw.send(&ip(GUEST_V4.into(), to.ip(), IpProtocol::Udp, 64, &udp))
            .await;
        let (_, flow) = server.recv_from(&mut [0; 10]).await.unwrap();
        // Datagrams until one does not get through, because the guest takes nothing.
        let mut sent = 0;
        loop {
            server.send_to(&[1; 20_000], flow).await.unwrap();
            sent += 1;
            let through = async {
                while raw.stack.counters().frames_in < sent {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            if tokio::time::timeout(Duration::from_millis(500), through)
                .await
                .is_err()
            {
                break;
            }
            assert!(sent < 1000, "no end");
        }
        for _ in 0..sent {
            assert_eq!(raw.next().await.len(), 14 + 28 + 20_000);
        }
    });
}
