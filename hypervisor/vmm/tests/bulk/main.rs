//! Hundreds of megabytes through vsock, in a process of its own so that its memory can be watched.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "../virtio/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../virtio/rig.rs"]
#[allow(dead_code)]
mod rig;

use std::collections::HashMap;
use std::io::{Read as _, Write as _};

use crate::guest::{CREDIT_REQUEST, CREDIT_UPDATE, Guest, Packet, Peer, RW, WINDOW};

const EACH: u64 = 300 << 20;
const STREAMS: u64 = 3;

/// KiB of private memory; guest memory is touched before the first measurement.
fn private_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn touch_all(guest: &Guest) {
    for at in (rig::DATA + (20 << 20)..rig::MEMORY_SIZE).step_by(4096) {
        guest.rig.put(at, &[1]);
    }
    for at in (0..20 << 20).step_by(4096) {
        let byte = guest.rig.bytes(rig::DATA + at, 1);
        guest.rig.put(rig::DATA + at, &byte);
    }
}

/// Bytes that tell where in the stream they are; it repeats after 251.
fn pattern() -> Vec<u8> {
    (0..80_000).map(|i| (i % 251) as u8).collect()
}

/// One after the other: each looks at the memory of the whole process.
#[test]
fn memory_stays_flat_while_hundreds_of_megabytes_flow_in_both_directions() {
    host_to_guest();
    guest_to_host();
}

fn host_to_guest() {
    let mut guest = Guest::new();
    touch_all(&guest);
    let mut streams = HashMap::new();
    let mut ends = Vec::new();
    for ticket in 0..STREAMS {
        let (peer, ours) = guest.open(ticket);
        streams.insert(peer.host_port, (peer, 0_u64, 0_u64));
        ends.push(ours);
    }
    let mut writers = Vec::new();
    for mut ours in ends {
        writers.push(std::thread::spawn(move || {
            let chunk = &pattern()[..251 * 256];
            let mut left = EACH;
            while left > 0 {
                let now = left.min(chunk.len() as u64);
                ours.write_all(&chunk[..now as usize]).unwrap();
                left -= now;
            }
        }));
    }
    let pattern = pattern();
    let before = private_memory();
    let mut most = before;
    let mut done = 0;
    while done < STREAMS {
        let (packet, data) = guest.receive();
        let (peer, got, told) = streams.get_mut(&packet.source_port).unwrap();
        if packet.op == RW {
            let from = (*got % 251) as usize;
            assert!(data == pattern[from..from + data.len()], "at {got}");
            *got += data.len() as u64;
            done += u64::from(*got == EACH);
        }
        if packet.op == CREDIT_REQUEST || *got - *told > 120 * 1024 {
            *told = *got;
            let (peer, forwarded) = (*peer, *got as u32);
            let update = Packet {
                forwarded,
                ..guest.packet(peer, CREDIT_UPDATE)
            };
            guest.send_raw(update, &[]);
            most = most.max(private_memory());
        }
    }
    writers
        .into_iter()
        .for_each(|writer| writer.join().unwrap());
    assert!(most < before + 8 * 1024, "{before} KiB -> {most} KiB");
}

fn guest_to_host() {
    let mut guest = Guest::new();
    touch_all(&guest);
    let mut streams: Vec<(Peer, u64, u64)> = Vec::new();
    let mut readers = Vec::new();
    for ticket in 0..STREAMS {
        let (peer, mut ours) = guest.open(ticket);
        streams.push((peer, 0, 0));
        readers.push(std::thread::spawn(move || {
            let pattern = pattern();
            let mut chunk = vec![0; 64 * 1024];
            let mut got = 0_u64;
            while got < EACH {
                let count = ours.read(&mut chunk).unwrap();
                assert_ne!(count, 0, "ended at {got}");
                let from = (got % 251) as usize;
                assert!(chunk[..count] == pattern[from..from + count], "at {got}");
                got += count as u64;
            }
        }));
    }
    let pattern = pattern();
    let before = private_memory();
    let mut most = before;
    while streams.iter().any(|(_, sent, _)| *sent < EACH) {
        let mut sent_any = false;
        for (peer, sent, taken) in &mut streams {
            let room = u64::from(WINDOW) - (*sent - *taken);
            let now = room.min(EACH - *sent).min(64 * 1024);
            if now > 0 {
                let from = (*sent % 251) as usize;
                guest.send_data(*peer, 0, &pattern[from..from + now as usize]);
                *sent += now;
                sent_any = true;
            }
        }
        // With every window full, the next credit is worth waiting for.
        let mut news = if sent_any {
            guest.receive_now()
        } else {
            Some(guest.receive())
        };
        while let Some((packet, _)) = news {
            let entry = streams
                .iter_mut()
                .find(|(p, _, _)| p.host_port == packet.source_port);
            let (_, _, taken) = entry.unwrap();
            *taken += u64::from(packet.forwarded.wrapping_sub(*taken as u32));
            news = guest.receive_now();
        }
        most = most.max(private_memory());
    }
    readers
        .into_iter()
        .for_each(|reader| reader.join().unwrap());
    // Three windows, and nothing that grows with what flows.
    assert!(most < before + 8 * 1024, "{before} KiB -> {most} KiB");
}
