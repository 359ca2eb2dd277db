//! One packet of a host channel, with any bytes and up to three descriptors: it is one frame or an
//! error, and no descriptor is left open.

#![no_main]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use protocol::host::{MAX_PACKET, channel};

fn pair() -> &'static (OwnedFd, OwnedFd) {
    static PAIR: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
    PAIR.get_or_init(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair")
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((count, bytes)) = bytes.split_first() else {
        return;
    };
    if bytes.is_empty() || bytes.len() > MAX_PACKET {
        return;
    }
    let (ours, theirs) = pair();
    let attached = vec![ours.as_fd(); usize::from(count % 4)];
    channel::send_bytes(ours.as_fd(), bytes, &attached).expect("a packet goes out");
    if let Ok(packet) = channel::receive(theirs.as_fd()) {
        let packet = packet.expect("the peer has not closed");
        assert_eq!(packet.descriptors.len(), attached.len());
        assert_eq!(
            packet.frame.body.len() + protocol::frame::HEADER_LEN,
            bytes.len()
        );
    }
    // The numbers of descriptors that were closed are given out again.
    let next = ours.try_clone().expect("a descriptor is free");
    assert!(
        std::os::fd::AsRawFd::as_raw_fd(&next) < 512,
        "descriptors leak"
    );
});
