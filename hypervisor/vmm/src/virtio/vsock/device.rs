//! The queues of vsock and all its connections. Takes packets from the guest and hands each to its
//! connection; sends what connections owe the guest, one packet each in turn, as long as the guest
//! offers buffers. Every wake-up does a bounded amount of work, and nothing the guest sends makes the
//! table, a buffer or a list longer than its limit.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Due, Effect};
use super::events::VsockEvent;
use super::host::Inbox;
use super::link::Link;
use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, STREAM};
use super::table::Table;
use super::{AGENT_PORT, VsockState};
use crate::virtio::GuestMemory;
use crate::virtio::fault::Broken;
use crate::virtio::limit::LogLimit;
use crate::virtio::ring::{Chain, copy_in, copy_out, part, total};
use crate::virtio::transport::DeviceState;
use crate::virtio::worker::{DEVICE_TOKENS, Device, Rings};

const QUEUE_SIZES: &[u16] = &[256, 256, 16];
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;

const MOST_DESCRIPTORS: usize = 64;
/// Bytes of one packet to the guest, and of one step of a packet from it.
const MOST_PAYLOAD: usize = 64 * 1024;
/// Packets per wake-up and direction.
const BUDGET: u32 = 256;
/// Resets that wait for buffers of the guest's; then its packets wait too.
const MOST_RESETS: usize = 256;
const TRANSPORT_RESET: u32 = 0;
const BROKEN: &str = "the guest broke its vsock device; restart the machine";

pub(super) struct VsockDevice {
    guest_cid: u64,
    inbox: Arc<Inbox>,
    table: Table,
    resets: VecDeque<Header>,
    agent_rang: bool,
    /// Until the driver resets the device.
    broken: bool,
    tx_waits: bool,
    owes_transport_reset: bool,
    bytes: Box<[u8]>,
    limit: LogLimit,
}

impl VsockDevice {
    pub(super) fn new(guest_cid: u64, inbox: Arc<Inbox>) -> Self {
        Self {
            guest_cid,
            table: Table::new(Arc::clone(&inbox)),
            inbox,
            resets: VecDeque::new(),
            agent_rang: false,
            broken: false,
            tx_waits: false,
            owes_transport_reset: false,
            bytes: vec![0; MOST_PAYLOAD].into_boxed_slice(),
            limit: LogLimit::new(),
        }
    }

    fn header(&self, host_port: u32, guest_port: u32, op: Op) -> Header {
        Header {
            source_cid: HOST_CID,
            target_cid: self.guest_cid,
            source_port: host_port,
            target_port: guest_port,
            length: 0,
            kind: STREAM,
            op,
            flags: 0,
            buffer_size: 0,
            forwarded: 0,
        }
    }

    /// Takes the guest's packets.
    fn take_packets(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        let Some(ring) = rings.get_mut(TX).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        for _ in 0..BUDGET {
            if self.resets.len() >= MOST_RESETS {
                self.tx_waits = true;
                return Ok(());
            }
            let chain = match ring.pop(MOST_DESCRIPTORS)? {
                Some(chain) => chain,
                None if ring.listen()? => {
                    ring.silence()?;
                    continue;
                }
                None => return Ok(()),
            };
            self.take_packet(ring.memory(), &chain)?;
            ring.complete(chain.head, 0)?;
        }
        ring.kick_again();
        Ok(())
    }

    fn take_packet(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<(), Broken> {
        let short = |missing| Broken::ShortChain {
            queue: TX,
            head: chain.head,
            missing,
        };
        let mut bytes = [0; HEADER_SIZE];
        if !copy_in(memory, &chain.readable, &mut bytes) {
            return Err(short("the 44-byte header"));
        }
        let header = Header::parse(&bytes);
        let there = total(&chain.readable).saturating_sub(HEADER_SIZE as u64);
        if header.op == Op::Data && u64::from(header.length) > there {
            return Err(short("a part of the payload"));
        }
        if header.source_cid != self.guest_cid {
            self.complain("a packet with another's source CID was dropped");
            return Ok(());
        }
        let host_port = header.target_port;
        let known = header.target_cid == HOST_CID
            && header.kind == STREAM
            && self.table.links.get(&host_port).is_some_and(|link| {
                link.guest_port == header.source_port && !link.connection.is_over()
            });
        if !known {
            self.take_stray(&header);
            return Ok(());
        }
        let Some(link) = self.table.links.get_mut(&host_port) else {
            return Ok(());
        };
        match link.connection.receive(&header) {
            Effect::None => {}
            Effect::Connected => {
                if let Some(ticket) = link.ticket.take() {
                    self.inbox.events.send(VsockEvent::Connected { ticket });
                }
            }
            Effect::Refused => {
                if let Some(ticket) = link.ticket.take() {
                    let message = format!(
                        "the guest refused: nothing listens on its vsock port {}",
                        link.guest_port
                    );
                    self.inbox.refuse(ticket, &message);
                }
            }
            Effect::Deliver => deliver(memory, chain, &header, link, &mut self.bytes)?,
            Effect::Violation(violation) => {
                if let Some(ticket) = link.ticket.take() {
                    self.inbox
                        .refuse(ticket, "the guest answered with nonsense");
                }
                self.complain(&format!("a stream was reset: {violation}"));
            }
        }
        self.table.settle(host_port);
        Ok(())
    }

    /// A packet that belongs to no connection.
    fn take_stray(&mut self, header: &Header) {
        if header.op == Op::Reset {
            return;
        }
        self.resets.push_back(header.reset());
        let rings = header.op == Op::Request
            && header.kind == STREAM
            && header.target_cid == HOST_CID
            && header.target_port == AGENT_PORT;
        if rings && !self.agent_rang {
            self.agent_rang = true;
            self.inbox.events.send(VsockEvent::AgentRang);
            let ports: Vec<u32> = self.table.links.keys().copied().collect();
            for port in ports {
                if let Some(link) = self.table.links.get_mut(&port) {
                    link.connection.agent_rang();
                }
                self.table.line_up(port);
            }
        }
    }

    fn complain(&self, what: &str) {
        if let Some(suppressed) = self.limit.allow() {
            tracing::warn!(reason = what, suppressed, "vsock rule broken by the guest");
        }
    }

    /// Sends what is owed to the guest while it offers buffers.
    fn send_packets(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        let Some(ring) = rings.get_mut(RX).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        let mut budget = BUDGET;
        while !(self.resets.is_empty() && self.table.line.is_empty()) {
            if budget == 0 {
                ring.kick_again();
                break;
            }
            budget = budget.saturating_sub(1);
            let chain = match ring.pop(MOST_DESCRIPTORS)? {
                Some(chain) => chain,
                None if ring.listen()? => {
                    ring.silence()?;
                    continue;
                }
                None => break,
            };
            match self.fill(ring.memory(), &chain)? {
                Some(length) => ring.complete(chain.head, length)?,
                None => ring.unpop(),
            }
        }
        if self.tx_waits && self.resets.len() < MOST_RESETS {
            self.tx_waits = false;
            if let Some(ring) = rings.get(TX).and_then(Option::as_ref) {
                ring.kick_again();
            }
        }
        Ok(())
    }

    /// Writes the next packet into `chain`; None when the one in turn had nothing to say after all.
    fn fill(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<Option<u32>, Broken> {
        if let Some(reset) = self.resets.pop_front() {
            return write_packet(memory, chain, &reset, &[]).map(Some);
        }
        let Some(host_port) = self.table.line.pop_front() else {
            return Ok(None);
        };
        let Some(link) = self.table.links.get_mut(&host_port) else {
            return Ok(None);
        };
        link.in_line = false;
        let sent = match link.connection.due(link.is_readable()) {
            None => None,
            Some(due @ Due::Data(credit)) => {
                let space = total(&chain.writable).saturating_sub(HEADER_SIZE as u64);
                if space == 0 {
                    return Err(Broken::ShortChain {
                        queue: RX,
                        head: chain.head,
                        missing: "room for a header and data",
                    });
                }
                let space = usize::try_from(space).unwrap_or(usize::MAX);
                let most = usize::try_from(credit).unwrap_or(usize::MAX).min(space);
                let most = most.min(self.bytes.len());
                let read = self
                    .bytes
                    .get_mut(..most)
                    .and_then(|bytes| link.read(bytes));
                read.map(|count| (due, count))
            }
            Some(due) => Some((due, 0)),
        };
        let written = if let Some((due, count)) = sent {
            let (op, flags) = match due {
                Due::Request => (Op::Request, 0),
                Due::Reset => (Op::Reset, 0),
                Due::Data(_) => (Op::Data, 0),
                Due::Shutdown(flags) => (Op::Shutdown, flags),
                Due::CreditUpdate => (Op::CreditUpdate, 0),
                Due::CreditRequest => (Op::CreditRequest, 0),
            };
            let length = u32::try_from(count).unwrap_or(0);
            link.connection.done(due, length);
            let (buffer_size, forwarded) = link.connection.window();
            let guest_port = link.guest_port;
            let header = Header {
                length,
                flags,
                buffer_size,
                forwarded,
                ..self.header(host_port, guest_port, op)
            };
            let payload = self.bytes.get(..count).unwrap_or_default();
            Some(write_packet(memory, chain, &header, payload)?)
        } else {
            None
        };
        self.table.settle(host_port);
        Ok(written)
    }

    fn owe_transport_reset(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        if !self.owes_transport_reset {
            return Ok(());
        }
        let Some(ring) = rings.get_mut(EVENTS).and_then(Option::as_mut) else {
            return Ok(());
        };
        if let Some(chain) = ring.pop(MOST_DESCRIPTORS)? {
            if !copy_out(
                ring.memory(),
                &chain.writable,
                &TRANSPORT_RESET.to_le_bytes(),
            ) {
                return Err(Broken::ShortChain {
                    queue: EVENTS,
                    head: chain.head,
                    missing: "room for an event",
                });
            }
            ring.complete(chain.head, 4)?;
            self.owes_transport_reset = false;
        }
        Ok(())
    }

    fn forget_connections(&mut self, keep_unseen: bool, why: &str) {
        self.table.forget(keep_unseen, why);
        self.resets.clear();
        self.tx_waits = false;
    }
}

fn deliver(
    memory: &GuestMemory,
    chain: &Chain,
    header: &Header,
    link: &mut Link,
    scratch: &mut [u8],
) -> Result<(), Broken> {
    let mut done = 0_u64;
    let end = u64::from(header.length);
    while done < end {
        let left = usize::try_from(end.saturating_sub(done)).unwrap_or(usize::MAX);
        let (bytes, _) = scratch.split_at_mut(left.min(scratch.len()));
        let skip = done.saturating_add(HEADER_SIZE as u64);
        let buffers = part(&chain.readable, skip, bytes.len() as u64);
        if !copy_in(memory, &buffers, bytes) {
            return Err(Broken::ShortChain {
                queue: TX,
                head: chain.head,
                missing: "a part of the payload",
            });
        }
        link.deliver(bytes);
        done = done.saturating_add(bytes.len() as u64);
    }
    Ok(())
}

fn write_packet(
    memory: &GuestMemory,
    chain: &Chain,
    header: &Header,
    payload: &[u8],
) -> Result<u32, Broken> {
    let rest = part(&chain.writable, HEADER_SIZE as u64, payload.len() as u64);
    let whole =
        copy_out(memory, &chain.writable, &header.to_bytes()) && copy_out(memory, &rest, payload);
    if !whole {
        return Err(Broken::ShortChain {
            queue: RX,
            head: chain.head,
            missing: "room for a header and data",
        });
    }
    Ok(u32::try_from(HEADER_SIZE.saturating_add(payload.len())).unwrap_or(0))
}

impl Device for VsockDevice {
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn attach(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, DEVICE_TOKENS);
        epoll.ctl(ControlOperation::Add, self.inbox.event.as_raw_fd(), event)?;
        self.table.epoll = Some(Arc::clone(epoll));
        Ok(())
    }

    fn start(&mut self, rings: &mut Rings) -> Result<(), Broken> {
        self.owe_transport_reset(rings)
    }

    fn kicked(&mut self, queue: usize, rings: &mut Rings) -> Result<(), Broken> {
        match queue {
            TX => self.take_packets(rings)?,
            EVENTS => self.owe_transport_reset(rings)?,
            _ => {}
        }
        self.send_packets(rings)
    }

    fn stirred(&mut self, token: u64, events: EventSet, rings: &mut Rings) -> Result<(), Broken> {
        match u32::try_from(token.saturating_sub(DEVICE_TOKENS)) {
            Ok(0) | Err(_) => {
                for wanted in self.inbox.take() {
                    if self.broken {
                        self.inbox.refuse(wanted.ticket, BROKEN);
                        continue;
                    }
                    let evicted = self.table.add(wanted, self.agent_rang);
                    if let Some((host_port, guest_port)) = evicted
                        && self.resets.len() < MOST_RESETS
                    {
                        let reset = self.header(host_port, guest_port, Op::Reset);
                        self.resets.push_back(reset);
                    }
                }
            }
            Ok(host_port) => {
                if let Some(link) = self.table.links.get_mut(&host_port) {
                    link.stirred(
                        events.contains(EventSet::IN),
                        events.contains(EventSet::OUT),
                        events.intersects(EventSet::HANG_UP | EventSet::ERROR),
                    );
                    self.table.settle(host_port);
                }
            }
        }
        self.send_packets(rings)
    }

    fn stop(&mut self, reset: bool) {
        if reset {
            self.agent_rang = false;
            self.broken = false;
            self.forget_connections(true, "the guest reset its vsock device; try again");
        }
    }

    fn broke(&mut self) {
        self.broken = true;
        self.forget_connections(false, BROKEN);
    }

    fn finish(&mut self) {
        self.forget_connections(false, "the machine ended");
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            agent_rang: self.agent_rang,
            next_port: self.table.next_port,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Vsock(state) = state else {
            return false;
        };
        self.agent_rang = state.agent_rang;
        self.table.continue_at(state.next_port);
        // The connections of the machine that was saved are not this machine's.
        self.owes_transport_reset = true;
        true
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        for wanted in self.inbox.close() {
            self.inbox
                .refuse(wanted.ticket, "the machine's vsock device has ended");
        }
        self.forget_connections(false, "the machine's vsock device has ended");
    }
}
