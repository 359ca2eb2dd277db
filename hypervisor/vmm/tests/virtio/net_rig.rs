//! A network device on the rig: the driver's half of its queues, and the other end of its frame
//! channel.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm::virtio::net::{NetHost, net as make};

use crate::rig::{DATA, EVENT_IDX, Faults, NEEDS_RESET, Rig, STATUS, memory};

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const MERGE: u64 = 1 << 15;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const SLOT: u64 = 0x1_1000;
pub(crate) const RX_DATA: u64 = DATA;
pub(crate) const TX_DATA: u64 = DATA + 0x100_0000;
pub(crate) const MAC: [u8; 6] = [2, 0x73, 0x75, 0x70, 0, 2];
pub(crate) const MOST: usize = 65_550;

pub(crate) struct Net {
    pub(crate) rig: Rig,
    pub(crate) host: NetHost,
    pub(crate) faults: Faults,
    /// The other end of the channel.
    pub(crate) ours: UnixStream,
    pub(crate) tx: u16,
}

/// A frame that says which one it is, of a type that nobody knows.
pub(crate) fn frame(number: usize, length: usize) -> Vec<u8> {
    let mut frame = vec![0x88; length];
    for (i, byte) in frame.iter_mut().enumerate().skip(14) {
        *byte = (i * 7 + number * 31) as u8;
    }
    frame[0] = number as u8;
    frame[1] = (number >> 8) as u8;
    frame
}

pub(crate) fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // An answer that does not come is a failure, not a hang.
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    ours.set_write_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    (ours, theirs)
}

/// Waits for what must come; fails the test after a deadline that no healthy run comes near.
pub(crate) fn eventually(mut has_come: impl FnMut() -> bool) {
    let start = Instant::now();
    while !has_come() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
}

pub(crate) fn on_wire(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

pub(crate) fn take(ours: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    ours.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    ours.read_exact(&mut frame).unwrap();
    frame
}

impl Net {
    pub(crate) fn new() -> Self {
        Self::with(!EVENT_IDX)
    }

    /// With those of the features that are in `mask`.
    pub(crate) fn with(mask: u64) -> Self {
        let mut net = Self::unconnected(mask);
        net.connect();
        net
    }

    pub(crate) fn unconnected(mask: u64) -> Self {
        let (memory, faults) = (memory(), Faults::default());
        let (device, host) = make(memory.clone(), MAC, 65_520, faults.sink()).unwrap();
        let mut rig = Rig::new(device, memory);
        rig.bring_up(&[256, 256], mask);
        Self {
            rig,
            host,
            faults,
            ours: pair().0,
            tx: 0,
        }
    }

    /// A new channel; the other end of the one before.
    pub(crate) fn connect(&mut self) -> UnixStream {
        let (ours, theirs) = pair();
        self.host.attach(theirs);
        // The device knows of it when it carried a frame.
        let before = std::mem::replace(&mut self.ours, ours);
        self.ours.set_nonblocking(true).unwrap();
        loop {
            self.send(&frame(9999, 60));
            self.used(TX);
            let mut bytes = [0; 64];
            match self.ours.read(&mut bytes) {
                Ok(count) => {
                    assert_eq!((count, &bytes[4..]), (64, &frame(9999, 60)[..]));
                    break;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        self.ours.set_nonblocking(false).unwrap();
        before
    }

    /// Offers a frame behind a header that asks for things.
    pub(crate) fn queue(&mut self, frame: &[u8]) {
        let slot = self.tx % 256;
        self.tx = self.tx.wrapping_add(1);
        let at = TX_DATA + SLOT * u64::from(slot);
        self.rig.put(at, &[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0]);
        self.rig.put(at + 12, frame);
        let length = 12 + frame.len() as u32;
        self.rig.chain(TX, slot, &[(at, length, false)]);
        self.rig.offer(TX, slot);
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.queue(frame);
        self.rig.kick(TX);
    }

    pub(crate) fn post(&mut self, slots: std::ops::Range<u16>, length: u32) {
        for slot in slots {
            let at = RX_DATA + SLOT * u64::from(slot);
            self.rig.chain(RX, slot, &[(at, length, true)]);
            self.rig.offer(RX, slot);
        }
        self.rig.kick(RX);
    }

    /// The next completed chain, whether it came with an interrupt or not.
    pub(crate) fn used(&mut self, queue: usize) -> (u16, u32) {
        let mut used = None;
        eventually(|| {
            used = self.rig.used_now(queue);
            used.is_some()
        });
        used.unwrap()
    }

    /// The next frame for the driver: header, frame, and the chains it took.
    pub(crate) fn receive(&mut self) -> (Vec<u8>, Vec<u8>, Vec<u16>) {
        let mut heads = Vec::new();
        let mut bytes = Vec::new();
        let (head, length) = self.used(RX);
        heads.push(head);
        bytes.extend(
            self.rig
                .bytes(RX_DATA + SLOT * u64::from(head), length as usize),
        );
        let frame = bytes.split_off(12);
        let (header, mut bytes) = (bytes, frame);
        for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
            let (head, length) = self.rig.used_now(RX).expect("all chains appear at once");
            heads.push(head);
            bytes.extend(
                self.rig
                    .bytes(RX_DATA + SLOT * u64::from(head), length as usize),
            );
        }
        (header, bytes, heads)
    }

    /// The next frame on the channel.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        take(&mut self.ours)
    }

    /// Writes a frame to the channel.
    pub(crate) fn deliver(&mut self, frame: &[u8]) {
        self.ours.write_all(&on_wire(frame)).unwrap();
    }

    pub(crate) fn other_end(&self) -> UnixStream {
        self.ours.try_clone().unwrap()
    }

    /// The driver resets the device and sets it up anew.
    pub(crate) fn start_again(&mut self) {
        self.rig.bring_up(&[256, 256], !EVENT_IDX);
        self.tx = 0;
        self.faults = Faults::default();
    }

    pub(crate) fn is_healthy(&mut self) {
        assert_eq!(
            self.rig.get(STATUS) & NEEDS_RESET,
            0,
            "{}",
            self.rig.reason()
        );
        assert!(self.faults.heard().is_empty(), "{:?}", self.faults.heard());
        self.send(&frame(77, 100));
        self.used(TX);
        assert_eq!(take(&mut self.ours), frame(77, 100));
    }
}
