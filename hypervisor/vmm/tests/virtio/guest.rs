//! A mock guest for vsock: it writes every packet by hand and checks nothing of its own.

use std::collections::VecDeque;
use std::io::Read as _;
use std::os::unix::net::UnixStream;

use vmm::virtio::vsock::{
    AGENT_PORT, VsockEvent, VsockEventReceiver, VsockEvents, VsockHost, vsock,
};

use crate::rig::{DATA, Faults, Rig, memory, wait_readable};

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const SLOT: u64 = 0x1_2000;
pub(crate) const RX_DATA: u64 = DATA;
pub(crate) const TX_DATA: u64 = DATA + 0x80_0000;
pub(crate) const RX_BUFFERS: u16 = 64;
pub(crate) const WINDOW: u32 = 256 * 1024;

pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RST: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const RW: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source_cid: u64,
    pub(crate) target_cid: u64,
    pub(crate) source_port: u32,
    pub(crate) target_port: u32,
    pub(crate) length: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buffer_size: u32,
    pub(crate) forwarded: u32,
}

impl Packet {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source_cid.to_le_bytes());
        bytes.extend(self.target_cid.to_le_bytes());
        bytes.extend(self.source_port.to_le_bytes());
        bytes.extend(self.target_port.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buffer_size.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(b: &[u8]) -> Self {
        let u64_at = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap());
        let u32_at = |i: usize| u32::from_le_bytes(b[i..i + 4].try_into().unwrap());
        let u16_at = |i: usize| u16::from_le_bytes(b[i..i + 2].try_into().unwrap());
        Self {
            source_cid: u64_at(0),
            target_cid: u64_at(8),
            source_port: u32_at(16),
            target_port: u32_at(20),
            length: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buffer_size: u32_at(36),
            forwarded: u32_at(40),
        }
    }
}

pub(crate) struct Guest {
    pub(crate) rig: Rig,
    pub(crate) host: VsockHost,
    pub(crate) events: VsockEventReceiver,
    pub(crate) waiting: VecDeque<VsockEvent>,
    pub(crate) faults: Faults,
    pub(crate) next_tx: u16,
}

/// A stream as the guest sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut guest = Self::without_buffers();
        for i in 0..RX_BUFFERS {
            guest.post(i);
        }
        guest.rig.kick(RX);
        guest
    }

    pub(crate) fn without_buffers() -> Self {
        let memory = memory();
        let faults = Faults::default();
        let (sender, events) = VsockEvents::channel().unwrap();
        let (device, host) = vsock(memory.clone(), 3, faults.sink(), sender).unwrap();
        let rig = Rig::live(device, memory, &[256, 256, 16]);
        Self {
            rig,
            host,
            events,
            waiting: VecDeque::new(),
            faults,
            next_tx: 0,
        }
    }

    pub(crate) fn post(&mut self, slot: u16) {
        self.rig.chain(
            RX,
            slot,
            &[(RX_DATA + SLOT * u64::from(slot), SLOT as u32, true)],
        );
        self.rig.offer(RX, slot);
    }

    /// The next packet from the device.
    pub(crate) fn receive(&mut self) -> (Packet, Vec<u8>) {
        let (slot, length) = self.rig.used(RX);
        self.taken(slot, length)
    }

    pub(crate) fn receive_now(&mut self) -> Option<(Packet, Vec<u8>)> {
        let (slot, length) = self.rig.used_now(RX)?;
        Some(self.taken(slot, length))
    }

    pub(crate) fn taken(&mut self, slot: u16, length: u32) -> (Packet, Vec<u8>) {
        let mut bytes = self
            .rig
            .bytes(RX_DATA + SLOT * u64::from(slot), length as usize);
        let data = bytes.split_off(44);
        let packet = Packet::from_bytes(&bytes);
        assert_eq!(packet.length as usize, data.len());
        assert_eq!(packet.kind, 1);
        self.post(slot);
        self.rig.kick(RX);
        (packet, data)
    }

    pub(crate) fn expect(&mut self, op: u16) -> Packet {
        let (packet, _) = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    pub(crate) fn send_raw(&mut self, packet: Packet, payload: &[u8]) {
        let slot = self.next_tx % 64 * 2;
        self.next_tx = self.next_tx.wrapping_add(1);
        let at = TX_DATA + 0x2_0000 * u64::from(slot / 2);
        self.rig.put(at, &packet.to_bytes());
        self.rig.put(at + 0x100, payload);
        let mut buffers = vec![(at, 44, false)];
        if !payload.is_empty() {
            buffers.push((at + 0x100, payload.len() as u32, false));
        }
        self.rig.chain(TX, slot, &buffers);
        self.rig.offer(TX, slot);
        self.rig.kick(TX);
        let (used, _) = self.rig.used(TX);
        assert_eq!(used, slot);
    }

    pub(crate) fn packet(&self, peer: Peer, op: u16) -> Packet {
        Packet {
            source_cid: 3,
            target_cid: 2,
            source_port: peer.guest_port,
            target_port: peer.host_port,
            length: 0,
            kind: 1,
            op,
            flags: 0,
            buffer_size: 240 * 1024,
            forwarded: 0,
        }
    }

    pub(crate) fn send(&mut self, peer: Peer, op: u16) {
        self.send_raw(self.packet(peer, op), &[]);
    }

    pub(crate) fn send_data(&mut self, peer: Peer, forwarded: u32, data: &[u8]) {
        let packet = Packet {
            length: data.len() as u32,
            forwarded,
            ..self.packet(peer, RW)
        };
        self.send_raw(packet, data);
    }

    pub(crate) fn shut_down(&mut self, peer: Peer, flags: u32) {
        self.send_raw(
            Packet {
                flags,
                ..self.packet(peer, SHUTDOWN)
            },
            &[],
        );
    }

    pub(crate) fn ring(&mut self) {
        self.send(
            Peer {
                host_port: AGENT_PORT,
                guest_port: 5555,
            },
            REQUEST,
        );
    }

    pub(crate) fn event(&mut self) -> VsockEvent {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return event;
            }
            assert!(
                wait_readable(self.events.event()),
                "an event; {}",
                self.rig.reason()
            );
            // The counter is read already; what it announced is taken all the same.
            self.waiting.extend(self.events.take());
        }
    }

    pub(crate) fn no_event(&mut self) {
        self.waiting.extend(self.events.take());
        assert!(self.waiting.is_empty(), "{:?}", self.waiting);
    }

    pub(crate) fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    /// An established stream, and the host's end of it.
    pub(crate) fn open(&mut self, ticket: u64) -> (Peer, UnixStream) {
        let (ours, theirs) = Self::pair();
        self.host.connect(ticket, 80, false, theirs);
        let request = self.expect(REQUEST);
        let peer = Peer {
            host_port: request.source_port,
            guest_port: 80,
        };
        self.send(peer, RESPONSE);
        assert_eq!(self.event(), VsockEvent::Connected { ticket });
        (peer, ours)
    }

    /// Does something the device answers, so that whatever came before it has been handled.
    pub(crate) fn settle(&mut self) -> Vec<Packet> {
        let stray = Peer {
            host_port: 9,
            guest_port: 9,
        };
        self.send(stray, CREDIT_UPDATE);
        let mut before = Vec::new();
        loop {
            let (packet, _) = self.receive();
            if packet.op == RST && packet.target_port == 9 {
                return before;
            }
            before.push(packet);
        }
    }
}

pub(crate) fn read_exactly(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Why the stream with this ticket was refused.
pub(crate) fn refusal(event: VsockEvent, expected: u64) -> String {
    match event {
        VsockEvent::NotConnected { ticket, message } if ticket == expected => message,
        other => panic!("{other:?}"),
    }
}
