//! A guest whose vsock driver says what it likes, and host sockets that come, talk, stall and vanish
//! in between: nothing panics, every packet to the guest is whole and says where it comes from, and
//! nobody gets more bytes than were sent.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use fuzz::driver::{DATA, Driver, Input};
use libfuzzer_sys::fuzz_target;
use vmm::virtio::fuzz::Hands;
use vmm::virtio::vsock::{VsockEvent, VsockEvents};

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const HEADER: usize = 44;
/// Room for each packet to the guest.
const SLOT: u64 = 0x2000;
const RX_DATA: u64 = DATA;
const TX_DATA: u64 = DATA + 0x4_0000;
const RESET: u16 = 3;
const DATA_PACKET: u16 = 5;
const FIRST_PORT: u32 = 1 << 16;
const MOST_SOCKETS: usize = 12;

struct Guest {
    driver: Driver,
    vsock: Hands,
    /// How many packets to it were looked at.
    seen: u16,
    /// The host's ports of which it has heard.
    ports: Vec<u32>,
    /// Bytes of data packets, either way.
    sent: usize,
    got: usize,
    /// Its rings and buffers are as it left them.
    orderly: bool,
}

impl Guest {
    fn buffers(&mut self, count: u8, length: u32) {
        for head in 0..u16::from(count % 16) {
            let at = RX_DATA + SLOT * u64::from(head);
            self.driver.chain(RX, head, &[(at, length, true)]);
        }
    }

    /// Looks at what came.
    fn look(&mut self) {
        while self.orderly && self.driver.used(RX) != self.seen {
            let (head, length) = self.driver.used_entry(RX, self.seen);
            self.seen = self.seen.wrapping_add(1);
            let length = length as usize;
            assert!(
                length >= HEADER && length <= SLOT as usize,
                "{length} bytes"
            );
            let packet = self.driver.get(RX_DATA + SLOT * u64::from(head), length);
            let word = |at: usize| {
                u32::from_le_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
            };
            assert_eq!((word(8), word(12)), (3, 0), "to the guest");
            assert_eq!(word(24) as usize, length - HEADER);
            let op = u16::from_le_bytes([packet[30], packet[31]]);
            assert!((1..=7).contains(&op), "operation {op}");
            // A reset comes from whomever the guest has spoken to.
            assert!(op == RESET || (word(0), word(4)) == (2, 0), "from the host");
            assert!(op == DATA_PACKET || length == HEADER);
            self.got += length - HEADER;
            let port = word(16);
            if port >= FIRST_PORT && !self.ports.contains(&port) {
                self.ports.push(port);
            }
        }
    }

    fn packet(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let host_port = match choice & 3 {
            3 => input.number() as u32,
            2 => 1024,
            _ => *self
                .ports
                .get(usize::from(choice >> 2) % self.ports.len().max(1))
                .unwrap_or(&FIRST_PORT),
        };
        let odd = input.byte();
        let length = usize::from(input.byte()) * if odd & 1 == 1 { 64 } else { 1 };
        let says = if odd & 2 == 2 {
            input.number() as u32
        } else {
            length as u32
        };
        let mut bytes = (if odd & 0x0c == 0x0c {
            input.number()
        } else {
            3
        })
        .to_le_bytes()
        .to_vec();
        bytes.extend(
            (if odd & 0x30 == 0x30 {
                input.number()
            } else {
                2
            })
            .to_le_bytes(),
        );
        bytes.extend((80 + u32::from(odd >> 6)).to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        let op = u16::from(input.byte() % 10);
        bytes.extend((if op == DATA_PACKET { says } else { 0 }).to_le_bytes());
        bytes.extend((if odd == 0xfe { 2_u16 } else { 1 }).to_le_bytes());
        bytes.extend(op.to_le_bytes());
        bytes.extend(u32::from(input.byte() & 7).to_le_bytes());
        bytes.extend((input.number() as u32).wrapping_mul(1024).to_le_bytes());
        bytes.extend((input.number() as u32).to_le_bytes());
        self.driver.put(TX_DATA, &bytes);
        let mut buffers = vec![(TX_DATA, HEADER as u32, false)];
        if op == DATA_PACKET && length > 0 {
            let at = TX_DATA + 0x100;
            let half = (length / 2) as u32;
            buffers.push((at, half, false));
            buffers.push((at + u64::from(half), length as u32 - half, false));
            self.sent += length;
        }
        self.driver.chain(TX, 0, &buffers);
        self.vsock.kick(TX);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let driver = Driver::new();
    let (events, outcomes) = VsockEvents::channel().expect("events");
    let (vsock, host) = Hands::vsock(driver.memory.clone(), events).expect("a device");
    let mut guest = Guest {
        driver,
        vsock,
        seen: 0,
        ports: Vec::new(),
        sent: 0,
        got: 0,
        orderly: true,
    };
    let mut sockets: Vec<UnixStream> = Vec::new();
    let (mut asked, mut told, mut written, mut read) = (0_u64, 0_u64, 0, 0);
    guest.vsock.restart(input.byte() & 1 == 1);
    guest.buffers(15, SLOT as u32);
    while !input.is_empty() {
        let what = input.byte();
        let which = usize::from(what >> 4) % sockets.len().max(1);
        match what % 13 {
            0..=2 => guest.packet(&mut input),
            3 if sockets.len() < MOST_SOCKETS => {
                let (ours, theirs) = UnixStream::pair().expect("a pair");
                ours.set_nonblocking(true).expect("non-blocking");
                theirs.set_nonblocking(true).expect("non-blocking");
                asked += 1;
                host.connect(asked, 80 + u32::from(what >> 6), what & 0x20 != 0, theirs);
                sockets.push(ours);
            }
            4 => {
                if let Some(socket) = sockets.get_mut(which) {
                    let length = usize::from(input.byte()) * 16;
                    written += socket.write(&[7; 4096][..length.min(4096)]).unwrap_or(0);
                }
            }
            5 => {
                if let Some(socket) = sockets.get_mut(which) {
                    read += socket.read(&mut [0; 20_000]).unwrap_or(0);
                }
            }
            6 if !sockets.is_empty() => drop(sockets.swap_remove(which)),
            7 => {
                if let Some(socket) = sockets.get(which) {
                    let how = if what & 0x80 == 0 {
                        Shutdown::Write
                    } else {
                        Shutdown::Read
                    };
                    let _ = socket.shutdown(how);
                }
            }
            8 => {
                let short = what & 0x80 != 0;
                let length = if short {
                    input.number() as u32 % SLOT as u32
                } else {
                    SLOT as u32
                };
                guest.buffers(input.byte(), length);
                guest.vsock.kick(RX);
            }
            9 => {
                guest.orderly = false;
                let queue = usize::from(what >> 4) % 3;
                guest.driver.odd_descriptor(queue, &mut input);
                guest.driver.offer(queue, u16::from(input.byte()));
                guest.vsock.kick(queue);
            }
            10 => guest.vsock.kick(EVENTS),
            11 if what >> 4 == 7 => {
                guest.driver.forget();
                guest.vsock.restart(input.byte() & 1 == 1);
                (guest.seen, guest.orderly) = (0, true);
                guest.buffers(15, SLOT as u32);
            }
            12 if what >> 4 == 7 => {
                guest.orderly = false;
                guest.driver.claim(TX, input.u16());
                guest.vsock.kick(TX);
            }
            _ => guest.vsock.stir(),
        }
        guest.vsock.stir();
        guest.look();
        for outcome in outcomes.take() {
            if !matches!(outcome, VsockEvent::AgentRang) {
                told += 1;
            }
        }
        assert!(told <= asked, "{told} outcomes of {asked} streams");
    }
    assert!(
        guest.got <= written,
        "{} bytes of {written} came",
        guest.got
    );
    for socket in &mut sockets {
        let mut rest = Vec::new();
        // An error is the end of what can be read.
        let _ = socket.read_to_end(&mut rest);
        read += rest.len();
    }
    if guest.orderly {
        assert!(read <= guest.sent, "{read} bytes of {} came", guest.sent);
    }
    drop(guest);
    told += outcomes.take().len() as u64;
    assert!(told <= asked + 1, "{told} outcomes of {asked} streams");
});
