//! Datagrams and pings. A flow is a socket that exchanges packets with one peer on behalf of one
//! port of the guest, made by the first packet and closed when nothing came for a while.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::network::RuleProtocol;
use smoltcp::wire::IpProtocol;

use super::address::{MTU, guest_for, is_gateway};
use super::answer::{self, Echo, Unreachable};
use super::counters::count;
use super::engine::Engine;
use super::names;
use super::packet::{self, Packet};
use super::slab::Token;
use super::table::{Key, Kind, Next};
use super::{Checksums, world};

/// Silence that ends a flow.
const IDLE: Duration = Duration::from_secs(120);

/// The same where one answer is all that is expected.
const IDLE_SHORT: Duration = Duration::from_secs(15);

/// Ports whose peers answer once: names, time.
const SHORT: [u16; 2] = [53, 123];

/// Packets of one flow before others have their turn.
const BURST: usize = 32;

/// Errors of one flow in one turn; the network has told of no more than one at a time.
const MOST_ERRORS: u32 = 4;

/// The headers of IPv6, the longer ones, and UDP.
const HEADERS: usize = 48;

pub(super) struct Flow {
    last: Instant,
    idle: Duration,
}

impl Engine {
    /// A UDP datagram of the guest.
    pub(super) fn datagram(&mut self, packet: &Packet<'_>) -> Option<()> {
        let datagram = packet::datagram(packet, self.checksums == Checksums::Real)?;
        if !answer::answerable(packet.to) {
            return None;
        }
        if Self::for_names(datagram.peer) {
            count(&self.counters.names);
            if self.questions.len() >= names::MAX_QUERIES {
                count(&self.counters.limited);
                return None;
            }
            self.questions.push(names::datagram(
                &self.resolver,
                datagram.payload,
                datagram.guest_port,
                datagram.peer,
            ));
            return Some(());
        }
        if is_gateway(packet.to) {
            answer::unreachable(&mut self.link, packet, Unreachable::Port);
            return Some(());
        }
        let key = Key {
            protocol: IpProtocol::Udp,
            guest_port: datagram.guest_port,
            peer: datagram.peer,
        };
        let token = match self.keys.get(&key).copied() {
            Some(token) => token,
            None => self.open_flow(packet, key, RuleProtocol::Udp)?,
        };
        self.send_flow(token, datagram.payload, packet)
    }

    /// An echo request of the guest.
    pub(super) fn echo(&mut self, packet: &Packet<'_>, echo: Echo<'_>) -> Option<()> {
        if is_gateway(packet.to) {
            answer::echo_reply(&mut self.link, packet.to, packet.from, echo);
            return Some(());
        }
        if !answer::answerable(packet.to) {
            return None;
        }
        let key = Key {
            protocol: packet.protocol,
            guest_port: echo.ident,
            peer: SocketAddr::new(packet.to, 0),
        };
        let token = match self.keys.get(&key).copied() {
            Some(token) => token,
            None => self.open_flow(packet, key, RuleProtocol::Icmp)?,
        };
        self.send_flow(token, packet.payload, packet)
    }

    fn open_flow(&mut self, packet: &Packet<'_>, key: Key, kind: RuleProtocol) -> Option<Token> {
        if !self.allowed(kind, key.peer) {
            answer::unreachable(&mut self.link, packet, Unreachable::Prohibited);
            return None;
        }
        let permit = self.permit()?;
        let (socket, idle) = if kind == RuleProtocol::Icmp {
            (world::ping(key.peer.ip()), IDLE_SHORT)
        } else if SHORT.contains(&key.peer.port()) {
            (world::udp(key.peer), IDLE_SHORT)
        } else {
            (world::udp(key.peer), IDLE)
        };
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                self.flow_refused(packet, error);
                return None;
            }
        };
        let last = self.now;
        let token = self.insert(key, socket, Kind::Flow(Flow { last, idle }), Some(permit))?;
        count(&self.counters.connections);
        if let Some(deadline) = last.checked_add(idle) {
            self.timers.set(token, deadline);
        }
        Some(token)
    }

    fn flow_refused(&mut self, packet: &Packet<'_>, error: Errno) {
        if matches!(error, Errno::EMFILE | Errno::ENFILE) {
            count(&self.counters.limited);
        }
        if let Some(why) = unreachable_by(error) {
            answer::unreachable(&mut self.link, packet, why);
        }
    }

    fn send_flow(&mut self, token: Token, payload: &[u8], packet: &Packet<'_>) -> Option<()> {
        let now = self.now;
        let entry = self.entries.get_mut(token)?;
        let Kind::Flow(flow) = &mut entry.kind else {
            return None;
        };
        flow.last = now;
        let mut sent = entry.socket.send(payload);
        if let Err(error) = sent
            && unreachable_by(error).is_some()
        {
            // It may be about an earlier packet, whose sender is told; this one is sent.
            sent = entry.socket.send(payload);
            if sent != Err(error) {
                self.flow_refused(packet, error);
            }
        }
        match sent {
            Ok(_) => Some(()),
            Err(error) => {
                self.flow_refused(packet, error);
                None
            }
        }
    }

    /// Takes what came for a flow to the guest.
    pub(super) fn serve_flow(&mut self, token: Token) -> Next {
        let now = self.now;
        let mut errors = 0;
        for _ in 0..BURST {
            let Some(entry) = self.entries.get_mut(token) else {
                return Next::Wait(None);
            };
            let Kind::Flow(flow) = &mut entry.kind else {
                return Next::Wait(None);
            };
            if !entry.ready.readable {
                let until = flow.last.checked_add(flow.idle).unwrap_or(now);
                if until <= now {
                    return Next::Gone { reset: false };
                }
                return Next::Wait(Some(until));
            }
            if self.link.full() {
                return Next::Starved(None);
            }
            let key = entry.key;
            let mut failed = None;
            let mut receive = |room: &mut [u8]| match entry.socket.receive_datagram(room) {
                // What is larger than the link takes is lost, as on any link.
                Ok(length) => room.get(..length).map(<[u8]>::len),
                Err(error) => {
                    failed = Some(error);
                    None
                }
            };
            if key.protocol == IpProtocol::Udp {
                let most = MTU.saturating_sub(HEADERS);
                answer::datagram(&mut self.link, key.peer, key.guest_port, most, receive);
            } else {
                let mut packet = [0; ECHO];
                if let Some(length) = receive(&mut packet)
                    && let Some(bytes) = packet.get(..length)
                    && let Some(echo) = reply(bytes, key.guest_port)
                {
                    let from = key.peer.ip();
                    answer::echo_reply(&mut self.link, from, guest_for(from), echo);
                }
            }
            match failed {
                None => flow.last = now,
                Some(Errno::EAGAIN) => entry.ready.readable = false,
                // The kernel tells an error before what came earlier, and only once: what came is
                // still there, and nothing will say so again.
                Some(error) if errors < MOST_ERRORS => {
                    errors = errors.saturating_add(1);
                    if key.protocol == IpProtocol::Udp
                        && let Some(why) = unreachable_by(error)
                    {
                        answer::datagram_unreachable(&mut self.link, key.guest_port, key.peer, why);
                    }
                }
                Some(_) => entry.ready.readable = false,
            }
        }
        self.soil(token);
        Next::Wait(None)
    }
}

/// What a guest is told about an error of a socket; none about a packet that is too large or finds no
/// buffers: it is lost, as packets are.
fn unreachable_by(error: Errno) -> Option<Unreachable> {
    match error {
        Errno::ECONNREFUSED => Some(Unreachable::Port),
        Errno::ENETUNREACH | Errno::ENETDOWN => Some(Unreachable::Network),
        Errno::EHOSTUNREACH | Errno::EHOSTDOWN => Some(Unreachable::Host),
        Errno::EACCES | Errno::EPERM => Some(Unreachable::Prohibited),
        _ => None,
    }
}

/// The longest echo reply that is taken to the guest.
const ECHO: usize = 16 << 10;

/// The echo reply that a ping socket gave, with the guest's identifier for the kernel's.
fn reply(bytes: &[u8], ident: u16) -> Option<Echo<'_>> {
    let (head, data) = bytes.split_first_chunk::<8>()?;
    let [_, _, _, _, _, _, high, low] = *head;
    Some(Echo {
        ident,
        sequence: u16::from_be_bytes([high, low]),
        data,
    })
}
