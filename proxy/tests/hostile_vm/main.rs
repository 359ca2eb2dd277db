//! A hostile VM beside another one, as they are on an appliance: proxy is a process of its own, control
//! attaches both VMs to it, and hostile frames enter by the Unix socket of the one while the other, a
//! network namespace, fetches what must come whole. Rates and memory are printed (`--nocapture`); what
//! is asserted of them is a bound.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
#[allow(dead_code)]
mod common;
mod frames;
mod house;
#[path = "../net/mod.rs"]
mod net;
#[path = "../browsers/offload.rs"]
mod offload;

use std::net::SocketAddr;

use frames::{Random, damaged, ip, syn};
use house::{Hostile, House};
use net::{WORLD_V4, world};
use proxy::gateway::address::{GATEWAY_V4, GUEST_V4};
use smoltcp::wire::IpProtocol;

/// Not a test: the process that the tests start.
#[test]
#[ignore = "the proxy of the other tests"]
fn proxy_process() {
    house::proxy_process();
}

#[test]
fn damaged_frames_are_felt_by_nobody_else() {
    world(|| async {
        let mut house = House::start().await;
        let mut random = Random(7);
        let flood = move |hostile: &mut Hostile| {
            let to = SocketAddr::from(([9, 9, 9, 9], 80));
            let frames = (0..500).map(|_| damaged(&mut random, to));
            hostile.send(frames)
        };
        let counters = house.beside("damaged frames", flood).await;
        assert!(counters.dropped > 500, "{counters:?}");
        assert!(house.answers().await, "it was cut off for nothing");
    });
}

#[test]
fn a_hundred_thousand_connections_that_nobody_answers_are_felt_by_nobody_else() {
    world(|| async {
        let mut house = House::start().await;
        let silent = house::silent().await;
        let mut number = 0_u32;
        let flood = move |hostile: &mut Hostile| {
            let mut next = || {
                number += 1;
                syn(1024 + (number % 60_000) as u16, silent.address)
            };
            hostile.send((0..1000).map(|_| next()))
        };
        house.at_least(100_000);
        let counters = house.beside("connections to nobody", flood).await;
        assert!(counters.limited > 90_000, "{counters:?}");
        assert!(counters.open <= 256, "{counters:?}");
    });
}

#[test]
fn a_hundred_thousand_connections_that_the_vm_does_not_take_are_felt_by_nobody_else() {
    world(|| async {
        let mut house = House::start().await;
        let listener = tokio::net::TcpListener::bind((WORLD_V4, 0)).await.unwrap();
        let to = listener.local_addr().unwrap();
        // The world is there; the guest does not say that it has heard so.
        let accepting = tokio::spawn(async move {
            let mut taken = Vec::new();
            loop {
                taken.push(listener.accept().await.unwrap());
            }
        });
        let mut number = 0_u32;
        let flood = move |hostile: &mut Hostile| {
            let mut next = || {
                number += 1;
                syn(1024 + (number % 60_000) as u16, to)
            };
            hostile.send((0..1000).map(|_| next()))
        };
        house.at_least(100_000);
        let counters = house.beside("half-open connections", flood).await;
        assert!(counters.open <= 1024, "{counters:?}");
        assert!(counters.limited > 50_000, "{counters:?}");
        accepting.abort();
    });
}

#[test]
fn names_that_never_end_are_felt_by_nobody_else() {
    world(|| async {
        let mut house = House::start().await;
        let question = |name: &[u8]| {
            let mut bytes = vec![0, 9, 0, 53, 0, 0, 0, 0];
            // One question (RFC 1035, 4.1.1).
            bytes.extend([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            bytes.extend(name);
            bytes.extend([0, 1, 0, 1]);
            let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            bytes[4..6].copy_from_slice(&length);
            ip(
                GUEST_V4.into(),
                GATEWAY_V4.into(),
                IpProtocol::Udp,
                64,
                &bytes,
            )
        };
        let long: Vec<u8> = [&[63][..], &[b'a'; 63]].concat().repeat(900);
        // Pointers to themselves, to each other, forward, and names beyond every limit.
        let bad = [
            question(&[0xc0, 12]),
            question(&[1, b'a', 0xc0, 12]),
            question(&[0xc0, 14, 0xc0, 12]),
            question(&[0xff, 0xff]),
            question(&long),
        ];
        let flood = move |hostile: &mut Hostile| {
            let frames = bad.iter().cycle().take(500).cloned();
            hostile.send(frames)
        };
        house.beside("questions without end", flood).await;
        assert!(house.answers().await, "it was cut off for nothing");
    });
}

#[test]
fn channels_with_impossible_frames_end_alone() {
    world(|| async {
        let mut house = House::start().await;
        let mut lengths = [0_u32, 65_551, u32::MAX].into_iter().cycle();
        let rate = house.transfer().await;
        let before = house.memory();
        for _ in 0..100 {
            let length = lengths.next().unwrap();
            house.violate(&length.to_be_bytes()).await;
        }
        // The rest of a frame that is never sent.
        house.violate_by_leaving(&60_000_u32.to_be_bytes()).await;
        let beside = house.transfer().await;
        house::report(
            "impossible frames, 100 channels",
            rate,
            beside,
            house.grown(before),
        );
        house.attach().await;
        assert!(house.answers().await, "a new channel works");
    });
}

#[test]
fn the_fuzzers_corpus_is_felt_by_nobody_else() {
    world(|| async {
        let mut house = House::start().await;
        let corpus = house::corpus();
        assert!(corpus.len() > 20, "{} files", corpus.len());
        let before = house.memory();
        let alone = house.transfer().await;
        for bytes in &corpus {
            // As a frame of the guest's, then as whatever the channel takes it for.
            house.attach().await;
            house.play(bytes).await;
            house.attach().await;
            house.violate_by_leaving(bytes).await;
        }
        let beside = house.transfer().await;
        house::report("the corpus", alone, beside, house.grown(before));
        house.attach().await;
        assert!(house.answers().await);
    });
}
