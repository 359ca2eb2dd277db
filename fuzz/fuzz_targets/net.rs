//! A guest whose network driver says what it likes, over a frame channel that carries what its other
//! end likes: nothing panics, the channel stays in step whatever the guest does, and what reaches an
//! orderly guest are frames that were sent, whole and in order.

#![no_main]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use fuzz::driver::{DATA, Driver, Input};
use libfuzzer_sys::fuzz_target;
use vmm::virtio::fuzz::Hands;
use vmm::virtio::net::NetHost;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const RX_DATA: u64 = DATA;
const SLOT: u64 = 0x1000;
const TX_DATA: u64 = DATA + 0x2_0000;
const MERGE: u64 = 1 << 15;

struct Guest {
    driver: Driver,
    net: Hands,
    host: NetHost,
    /// The channel's other end, and what it got that is no whole frame yet.
    ours: UnixStream,
    got: Vec<u8>,
    /// Lengths of the frames on their way to the guest; None once nobody knows.
    sent: Option<VecDeque<usize>>,
    /// How many chains it looked at.
    seen: u16,
    /// Its rings and buffers are as it left them.
    orderly: bool,
}

impl Guest {
    fn connect(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        self.host.attach(theirs);
        // Frames of the one before may come until it is replaced.
        self.net.stir();
        self.look();
        self.ours = ours;
        self.got.clear();
        self.sent = Some(VecDeque::new());
    }

    fn restart(&mut self, how: u8) {
        self.driver.forget();
        self.seen = 0;
        self.orderly = true;
        let mask = if how & 2 == 0 { u64::MAX } else { !MERGE };
        let mask = if how & 4 == 0 { mask } else { mask & !2 };
        self.net.restart_with(how & 1 == 1, mask);
    }

    /// What came over the channel is frames and nothing else.
    fn read(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = self.ours.read(&mut bytes) {
            self.got.extend(&bytes[..count]);
        }
        while let Some((prefix, rest)) = self.got.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*prefix) as usize;
            assert!((14..=65_550).contains(&length), "{length} bytes");
            if rest.len() < length {
                break;
            }
            self.got.drain(..4 + length);
        }
    }

    /// A frame for the guest, mostly an IP packet of some kind.
    fn deliver(&mut self, input: &mut Input<'_>) {
        let length = 14 + input.number() as usize % 3000;
        let mut frame = vec![0; length];
        let content = input.take(64.min(length));
        frame[..content.len()].copy_from_slice(content);
        let start: &[u8] = match input.byte() % 4 {
            0 => &[8, 0, 0x45],
            1 => &[0x86, 0xdd, 0x60],
            _ => &[],
        };
        for (at, byte) in frame.iter_mut().skip(12).zip(start) {
            *at = *byte;
        }
        let mut bytes = (length as u32).to_be_bytes().to_vec();
        bytes.extend(&frame);
        match self.ours.write(&bytes) {
            Ok(count) if count == bytes.len() => {
                if let Some(sent) = &mut self.sent {
                    sent.push_back(length);
                }
            }
            // The channel is out of step from here on, by our own fault.
            Ok(_) => self.sent = None,
            Err(_) => {}
        }
    }

    fn buffers(&mut self, input: &mut Input<'_>) {
        let length = match input.byte() {
            short @ ..=0x20 => HEADER as u32 + u32::from(short),
            _ => SLOT as u32,
        };
        for _ in 0..input.byte() % 16 {
            // No more than there are chains for, each where its head says.
            let head = self.driver.offered(RX);
            if head.wrapping_sub(self.seen) >= 16 {
                break;
            }
            let at = RX_DATA + SLOT * u64::from(head % 16);
            self.driver.chain(RX, head % 16, &[(at, length, true)]);
        }
    }

    /// Looks at what came in.
    fn look(&mut self) {
        while self.orderly && self.driver.used(RX) != self.seen {
            let (head, length) = self.driver.used_entry(RX, self.seen);
            let header = self.driver.get(RX_DATA + SLOT * u64::from(head), HEADER);
            let chains = u16::from_le_bytes([header[10], header[11]]);
            assert!((1..=16).contains(&chains), "{chains} chains");
            assert!(header[0] <= 1 && header[1..6] == [0; 5]);
            let mut total = length as usize;
            for number in 1..chains {
                let next = self.seen.wrapping_add(number);
                assert_ne!(next, self.driver.used(RX), "all chains appear at once");
                total += self.driver.used_entry(RX, next).1 as usize;
            }
            self.seen = self.seen.wrapping_add(chains);
            let frame = total - HEADER;
            if header[0] == 1 {
                let start = usize::from(u16::from_le_bytes([header[6], header[7]]));
                let offset = usize::from(u16::from_le_bytes([header[8], header[9]]));
                assert!(start + offset + 2 <= frame, "a checksum outside the frame");
            }
            if let Some(sent) = &mut self.sent {
                // Some that were too long for the buffers are missing.
                let known = std::iter::from_fn(|| sent.pop_front()).any(|sent| sent == frame);
                assert!(known, "a frame of {frame} bytes that nobody sent");
            }
        }
    }

    /// A frame of the guest's, in pieces.
    fn send(&mut self, input: &mut Input<'_>) {
        let head = u16::from(input.byte() % 16);
        let mut buffers = Vec::new();
        for number in 0..1 + input.byte() % 5 {
            let length = match input.byte() {
                small @ ..=0xf0 => u32::from(small),
                0xf1..=0xf8 => 20_000,
                _ => input.number() as u32 % 0x1_0000,
            };
            buffers.push((TX_DATA + 0x100 * u64::from(number), length, false));
        }
        self.driver.chain(TX, head, &buffers);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let driver = Driver::new();
    let (net, host) = Hands::net(driver.memory.clone()).expect("a network interface");
    let mut guest = Guest {
        driver,
        net,
        host,
        ours: UnixStream::pair().expect("a pair").0,
        got: Vec::new(),
        sent: None,
        seen: 0,
        orderly: true,
    };
    guest.restart(input.byte());
    while !input.is_empty() {
        match input.byte() % 16 {
            0 | 1 => guest.send(&mut input),
            2 => guest.buffers(&mut input),
            3 | 4 => guest.deliver(&mut input),
            5 => {
                let count = usize::from(input.byte());
                let _ = guest.ours.write(input.take(count));
                guest.sent = None;
            }
            6 => guest.connect(),
            7 => guest.restart(input.byte()),
            8 => {
                let queue = usize::from(input.byte() & 1);
                guest.driver.odd_descriptor(queue, &mut input);
                guest.orderly = false;
            }
            9 => {
                let queue = usize::from(input.byte() & 1);
                guest.driver.offer(queue, u16::from(input.byte()));
                guest.orderly = false;
            }
            10 => {
                let queue = usize::from(input.byte() & 1);
                guest.driver.claim(queue, input.u16());
                guest.orderly = false;
            }
            11 => {
                let at = TX_DATA + 16 * u64::from(input.byte());
                let length = usize::from(input.byte());
                guest.driver.put(at, input.take(length));
            }
            12 => guest.read(),
            13 => guest.net.stir(),
            14 => guest.net.kick(RX),
            _ => guest.net.kick(TX),
        }
        guest.look();
    }
    guest.net.kick(TX);
    guest.net.kick(RX);
    guest.net.stir();
    guest.look();
    guest.read();
});
