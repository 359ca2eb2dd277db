//! What control tells proxy of VMs, over the real socket between them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use common::*;
use protocol::host::proxy::{AttachVm, Attached, Count, Counted, DetachVm, ListAttached, UpdateVm};
use protocol::network::{Egress, NetworkCounters, Publication};

fn attach(vm: &str, generation: u64) -> AttachVm {
    AttachVm {
        vm: vm.parse().unwrap(),
        generation,
        hostname: "supvm-1234".into(),
        subdomain: "aaaaaaaaaaaaaaaaaaaa".parse().unwrap(),
        egress: Egress::default(),
        publication: Publication::default(),
    }
}

async fn listed(control: &Control) -> Vec<(String, u64)> {
    control.send(&ListAttached { after: None }, &[]).await;
    let attached: Attached = protocol::decode(&control.packet().await.frame).unwrap();
    assert!(!attached.more);
    let vms = attached.vms.into_iter();
    vms.map(|(vm, generation)| (vm.to_string(), generation))
        .collect()
}

async fn counted(control: &Control, vm: &str) -> Option<NetworkCounters> {
    let vm = vm.parse().unwrap();
    control.send(&Count { ticket: 9, vm }, &[]).await;
    let counted: Counted = protocol::decode(&control.packet().await.frame).unwrap();
    assert_eq!(counted.ticket, 9);
    counted.counters
}

#[tokio::test]
async fn a_vm_stays_attached_over_the_end_of_control_until_it_is_detached() {
    let proxy = Proxy::start();
    let control = proxy.control();
    assert_eq!(listed(&control).await, []);
    let (ours, mut monitors) = UnixStream::pair().unwrap();
    let wanted = attach("vm-00000001", 3);
    control.send(&wanted, &[ours.as_fd()]).await;
    drop(ours);
    let (ours, _other) = UnixStream::pair().unwrap();
    control
        .send(&attach("vm-00000002", 1), &[ours.as_fd()])
        .await;
    // One without a channel is none.
    control.send(&attach("vm-00000003", 1), &[]).await;
    let both = [("vm-00000001".to_owned(), 3), ("vm-00000002".to_owned(), 1)];
    assert_eq!(listed(&control).await, both);
    drop(control);

    let control = proxy.control();
    assert_eq!(listed(&control).await, both);
    monitors.set_nonblocking(true).unwrap();
    let error = monitors.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert!(counted(&control, "vm-00000001").await.is_some());
    assert!(counted(&control, "vm-00000009").await.is_none());
    // Of one that is not there nothing is known; it does no harm.
    let update = UpdateVm {
        vm: "vm-00000009".parse().unwrap(),
        egress: Egress::default(),
        publication: Publication::default(),
    };
    control.send(&update, &[]).await;
    let mut detach = DetachVm {
        vm: wanted.vm.clone(),
        generation: 2,
    };
    control.send(&detach, &[]).await;
    assert_eq!(listed(&control).await, both);
    detach.generation = 3;
    control.send(&detach, &[]).await;
    assert_eq!(listed(&control).await, both[1..]);
    monitors.set_nonblocking(false).unwrap();
    assert_eq!(monitors.read(&mut [0; 1]).unwrap(), 0);
}

#[tokio::test]
async fn a_control_that_asks_without_reading_the_answers_is_heard_all_the_same() {
    let proxy = Proxy::start();
    let control = proxy.control();
    let (ours, mut monitors) = UnixStream::pair().unwrap();
    control
        .send(&attach("vm-00000001", 1), &[ours.as_fd()])
        .await;
    drop(ours);
    // Far more than both sockets hold.
    for ticket in 0..20_000 {
        let vm = "vm-00000001".parse().unwrap();
        let count = Count { ticket, vm };
        tokio::time::timeout(
            std::time::Duration::from_secs(20),
            control.send(&count, &[]),
        )
        .await
        .expect("proxy does not read");
    }
    let detach = DetachVm {
        vm: "vm-00000001".parse().unwrap(),
        generation: 1,
    };
    control.send(&detach, &[]).await;
    tokio::task::spawn_blocking(move || assert_eq!(monitors.read(&mut [0; 1]).unwrap(), 0))
        .await
        .unwrap();
    let first: Counted = protocol::decode(&control.packet().await.frame).unwrap();
    assert_eq!(first.ticket, 0);
}
