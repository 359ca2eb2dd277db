//! TCP between the guest and the world. A SYN of the guest is held until the world has answered:
//! the guest sees a connection only where there is one, a refusal where there was one, and silence
//! where there was silence. Then bytes go from a socket's buffer in the kernel into smoltcp's and
//! back, and nowhere else.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::network::RuleProtocol;
use smoltcp::iface::PollResult;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{IpEndpoint, IpListenEndpoint, IpProtocol, TcpPacket};
use tokio::sync::oneshot;

use super::address::{GATEWAY_V4, GUEST_V4, is_gateway};
use super::answer::{self, Unreachable};
use super::arena::GuestSocket;
use super::counters::count;
use super::engine::{Engine, MAX_INBOUND};
use super::packet::{self, Packet, Segment};
use super::pipe::{self, Near};
use super::slab::Token;
use super::socket::Socket;
use super::stream::{ConnectError, GuestStream};
use super::table::{Key, Kind, Next, Permit, Ready};
use super::{Checksums, names, world};

/// SYNs of one VM that wait for the world.
const MAX_ASKING: usize = 256;

/// The largest SYN that is held. Data in it is as good as not sent: smoltcp takes none.
const MAX_SYN: usize = 2048;

/// How long the guest's silence about its SYN is waited for at least.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the guest may take to answer the edge.
pub(super) const CONNECT: Duration = Duration::from_secs(10);

/// Silence until the guest is asked whether a connection is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// Silence until a connection is given up.
const GIVE_UP: Duration = Duration::from_secs(300);

/// How long a connection goes on whose other side is gone.
const LINGER: Duration = Duration::from_secs(60);

/// How long what the guest sent last may take to reach the world after the guest has closed.
const DRAIN: Duration = Duration::from_secs(120);

/// Idle time after which buffers go back to the kernel, where so many bytes went through them.
const IDLE: Duration = Duration::from_secs(10);
const WORTH_TRIMMING: usize = 8 << 10;

/// Segments that one connection may send before others have their turn.
const BURST: usize = 16;

/// A SYN that is held, and the connection that it asks for.
pub(super) struct Asking {
    syn: Box<[u8]>,
    /// The sequence number behind it.
    end: u32,
    since: Instant,
    /// When nobody asks any more.
    until: Instant,
}

/// Whom the guest has a connection with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum With {
    /// A server that it has dialled.
    World,
    /// The name server at the gateway's address.
    Names,
    /// The edge, which has dialled the guest.
    Edge,
}

/// A connection between the guest and a socket.
pub(super) struct Connection {
    guest: GuestSocket,
    /// Whom it is with.
    pub(super) with: With,
    /// Who waits for the guest's answer, and what they get.
    waiting: Option<(
        oneshot::Sender<Result<GuestStream, ConnectError>>,
        GuestStream,
    )>,
    was_reset: Arc<AtomicBool>,
    /// The state after the last turn.
    last: State,
    /// The socket was told that nothing more comes.
    finished: bool,
    /// The socket said that nothing more comes.
    ended: bool,
    /// The connection is reset on both sides.
    broken: bool,
    /// Both directions ended as they should; otherwise whoever holds the other end of a pair has
    /// to learn that its end is not the guest's.
    pub(super) orderly: bool,
    /// When it is given up.
    pub(super) limit: Option<Instant>,
    /// The sequence number behind everything that the guest ever sent.
    reached: Option<u32>,
    /// What was last acknowledged to it.
    acknowledged: Option<u32>,
    /// Bytes since the buffers were last given back, and when the last of them went through.
    moved: usize,
    last_moved: Instant,
}

impl Connection {
    fn new(guest: GuestSocket, with: With, now: Instant) -> Self {
        Self {
            guest,
            with,
            waiting: None,
            was_reset: Arc::default(),
            last: State::Closed,
            finished: false,
            ended: false,
            broken: false,
            orderly: false,
            limit: None,
            reached: None,
            acknowledged: None,
            moved: 0,
            last_moved: now,
        }
    }

    /// Ends the connection with a reset on both sides.
    pub(super) fn abort(&mut self) {
        self.broken = true;
        self.guest.tcp().abort();
    }

    fn note(&mut self, end: u32) {
        let further = self
            .reached
            .is_none_or(|reached| end.wrapping_sub(reached) < 1 << 31);
        if further {
            self.reached = Some(end);
        }
    }

    /// Moves bytes between the guest's buffers and the socket.
    fn pump(&mut self, socket: &Socket, ready: &mut Ready, now: Instant) {
        let before = self.moved;
        if let Err(_error) = self.send_out(socket, ready) {
            self.abort();
            return;
        }
        let tcp = self.guest.tcp();
        let guest_finished = matches!(
            tcp.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
        );
        if guest_finished && !tcp.can_recv() && !self.finished {
            self.finished = true;
            socket.finish();
        }
        if let Err(_error) = self.take_in(socket, ready) {
            self.abort();
            return;
        }
        if self.moved != before {
            self.last_moved = now;
        }
        // The reset stands behind bytes that a guest which takes nothing would never make room for.
        if ready.failed && !self.ended && !self.guest.tcp().can_send() {
            self.abort();
        }
    }

    fn send_out(&mut self, socket: &Socket, ready: &mut Ready) -> Result<(), Errno> {
        let tcp = self.guest.tcp();
        while ready.writable && tcp.can_recv() {
            let sent = tcp.recv(|bytes| match socket.send(bytes) {
                Ok(number) => (number, Ok(number)),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok(number)) => self.moved = self.moved.saturating_add(number),
                Ok(Err(Errno::EAGAIN)) => ready.writable = false,
                Ok(Err(Errno::EINTR)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn take_in(&mut self, socket: &Socket, ready: &mut Ready) -> Result<(), Errno> {
        let tcp = self.guest.tcp();
        while ready.readable && !self.ended && tcp.can_send() {
            let got = tcp.send(|room| match socket.receive(room) {
                Ok(number) => (number, Ok((number, room.len()))),
                Err(error) => (0, Err(error)),
            });
            match got {
                Ok(Ok((0, _))) => {
                    self.ended = true;
                    tcp.close();
                }
                Ok(Ok((number, room))) => {
                    self.moved = self.moved.saturating_add(number);
                    // Less than there was room for was all there is; the end has to be read.
                    if number < room && !ready.finished {
                        ready.readable = false;
                    }
                }
                Ok(Err(Errno::EAGAIN)) => ready.readable = false,
                Ok(Err(Errno::EINTR)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Gives buffers back that have been idle. When to look again.
    fn trim(&mut self, now: Instant) -> Option<Instant> {
        if self.moved < WORTH_TRIMMING {
            return None;
        }
        let when = self.last_moved.checked_add(IDLE)?;
        if when > now {
            return Some(when);
        }
        self.moved = 0;
        // What was acknowledged is everything that ever came: nothing is kept behind a gap.
        if self.reached.is_some() && self.reached == self.acknowledged {
            self.guest.trim();
        }
        None
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.orderly {
            self.was_reset.store(true, Ordering::Release);
        }
    }
}

impl Engine {
    /// A TCP segment of the guest.
    pub(super) fn segment(&mut self, packet: &Packet<'_>) -> Option<()> {
        let segment = packet::segment(packet)?;
        if !answer::answerable(packet.to) {
            return None;
        }
        let key = Key {
            protocol: IpProtocol::Tcp,
            guest_port: segment.guest_port,
            peer: segment.peer,
        };
        let Some(token) = self.keys.get(&key).copied() else {
            if segment.opens {
                return self.open(packet, &segment, key);
            }
            answer::reset(&mut self.link, &segment);
            return Some(());
        };
        let now = self.now;
        let sound = segment.opens && self.is_sound(packet);
        match &mut self.entries.get_mut(token)?.kind {
            Kind::Asking(asking) => {
                if segment.resets {
                    self.remove(token);
                } else if segment.opens {
                    // Another sequence number is another attempt: the one of before is given up.
                    if segment.end != asking.end && sound {
                        asking.syn = packet.whole.into();
                        asking.end = segment.end;
                    }
                    // The guest asks at growing intervals: the next time is twice as far away.
                    let age = now.saturating_duration_since(asking.since);
                    let until = age.saturating_mul(2).saturating_add(PATIENCE);
                    asking.until = asking.since.checked_add(until).unwrap_or(asking.until);
                }
            }
            Kind::Tcp(_) => self.feed(token, packet.whole, segment.end),
            Kind::Flow(_) => return None,
        }
        Some(())
    }

    /// Gives a segment to its connection.
    fn feed(&mut self, token: Token, packet: &[u8], end: u32) {
        let now = self.smoltcp_now();
        let Some(entry) = self.entries.get_mut(token) else {
            return;
        };
        if let Kind::Tcp(connection) = &mut entry.kind {
            connection.note(end);
            self.link.last_ack = None;
            self.iface.poll_ingress_single(
                now,
                &mut self.link.device(Some(packet)),
                connection.guest.set(),
            );
            connection.acknowledged = self.link.last_ack.or(connection.acknowledged);
            self.soil(token);
        }
    }

    /// Whether a SYN may be held.
    fn is_sound(&self, packet: &Packet<'_>) -> bool {
        packet.whole.len() <= MAX_SYN
            && (self.checksums == Checksums::Trusted
                || TcpPacket::new_checked(packet.payload)
                    .is_ok_and(|tcp| tcp.verify_checksum(&packet.from.into(), &packet.to.into())))
    }

    /// A SYN of a connection that is not there.
    fn open(&mut self, packet: &Packet<'_>, segment: &Segment, key: Key) -> Option<()> {
        if !self.is_sound(packet) {
            return None;
        }
        if Self::for_names(segment.peer) {
            // Those count that the guest has not closed, too, whose question is long over.
            if self.name_streams.max(self.question_streams) >= names::MAX_STREAMS {
                count(&self.counters.limited);
                answer::reset(&mut self.link, segment);
            } else {
                let (ours, theirs) = pipe::pair(&self.bell);
                self.question_streams = self.question_streams.saturating_add(1);
                count(&self.counters.names);
                self.questions.push(names::stream(&self.resolver, theirs));
                self.accept(key, ours, None, packet.whole);
            }
            return Some(());
        }
        if is_gateway(packet.to) || !self.allowed(RuleProtocol::Tcp, segment.peer) {
            answer::reset(&mut self.link, segment);
            return Some(());
        }
        if self.asking >= MAX_ASKING {
            count(&self.counters.limited);
            answer::reset(&mut self.link, segment);
            return Some(());
        }
        let Some(permit) = self.permit() else {
            answer::reset(&mut self.link, segment);
            return Some(());
        };
        match world::tcp(segment.peer) {
            Ok((socket, Some(()))) => self.accept(key, socket, Some(permit), packet.whole),
            Ok((socket, None)) => self.ask(key, socket, permit, packet.whole, segment.end),
            Err(error) => self.refuse(packet, segment, error),
        }
        Some(())
    }

    fn ask(&mut self, key: Key, socket: OwnedFd, permit: Permit, syn: &[u8], end: u32) {
        let until = self.now.checked_add(PATIENCE).unwrap_or(self.now);
        let asking = Kind::Asking(Asking {
            syn: syn.into(),
            end,
            since: self.now,
            until,
        });
        if let Some(token) = self.insert(key, socket, asking, Some(permit)) {
            self.timers.set(token, until);
        }
    }

    pub(super) fn serve_asking(&mut self, token: Token) -> Next {
        let now = self.now;
        let Some(entry) = self.entries.get_mut(token) else {
            return Next::Wait(None);
        };
        let Kind::Asking(asking) = &mut entry.kind else {
            return Next::Wait(None);
        };
        let outcome = if entry.ready.writable {
            entry.socket.outcome()
        } else {
            Ok(None)
        };
        if matches!(outcome, Ok(None)) {
            if asking.until <= now {
                return Next::Gone { reset: false };
            }
            return Next::Wait(Some(asking.until));
        }
        // The answer is for a guest that can take it.
        if self.link.choked() {
            return Next::Starved(None);
        }
        let Some(entry) = self.remove(token) else {
            return Next::Wait(None);
        };
        let Kind::Asking(asking) = entry.kind else {
            return Next::Wait(None);
        };
        match outcome {
            Ok(_) => self.accept(entry.key, entry.socket, entry.permit, &asking.syn),
            Err(error) => {
                if let Some(packet) = Self::again(&asking.syn)
                    && let Some(segment) = packet::segment(&packet)
                {
                    self.refuse(&packet, &segment, error);
                }
            }
        }
        Next::Wait(None)
    }

    /// Tells the guest what the world said.
    fn refuse(&mut self, packet: &Packet<'_>, segment: &Segment, error: Errno) {
        let link = &mut self.link;
        match error {
            Errno::ETIMEDOUT => {}
            Errno::ENETUNREACH | Errno::ENETDOWN => {
                answer::unreachable(link, packet, Unreachable::Network);
            }
            Errno::EHOSTUNREACH | Errno::EHOSTDOWN => {
                answer::unreachable(link, packet, Unreachable::Host);
            }
            Errno::EACCES | Errno::EPERM => {
                answer::unreachable(link, packet, Unreachable::Prohibited);
            }
            Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOBUFS
            | Errno::ENOMEM
            | Errno::EADDRNOTAVAIL => {
                count(&self.counters.limited);
                answer::reset(link, segment);
            }
            _ => answer::reset(link, segment),
        }
    }

    /// Lets smoltcp answer a SYN, because the other side is there.
    fn accept(&mut self, key: Key, socket: impl Into<Socket>, permit: Option<Permit>, syn: &[u8]) {
        let Some(mut guest) = GuestSocket::new(&self.arena) else {
            count(&self.counters.limited);
            if let Some(segment) = Self::again(syn).as_ref().and_then(packet::segment) {
                answer::reset(&mut self.link, &segment);
            }
            return;
        };
        let endpoint = IpListenEndpoint {
            addr: Some(key.peer.ip().into()),
            port: key.peer.port(),
        };
        prepare(&mut guest, GIVE_UP);
        if guest.tcp().listen(endpoint).is_err() {
            return;
        }
        let end = Self::again(syn)
            .as_ref()
            .and_then(packet::segment)
            .map_or(0, |segment| segment.end);
        let with = if permit.is_some() {
            count(&self.counters.connections);
            With::World
        } else {
            With::Names
        };
        let connection = Box::new(Connection::new(guest, with, self.now));
        if let Some(token) = self.insert(key, socket, Kind::Tcp(connection), permit) {
            self.feed(token, syn, end);
        }
    }

    /// Connects to the guest for the edge.
    pub(super) fn connect(
        &mut self,
        port: u16,
        reply: oneshot::Sender<Result<GuestStream, ConnectError>>,
    ) {
        if self.inbound >= MAX_INBOUND {
            count(&self.counters.limited);
            let _ = reply.send(Err(ConnectError::TooMany));
            return;
        }
        let Some((key, guest, ours, stream)) = self.prepare_inbound(port) else {
            let _ = reply.send(Err(ConnectError::TooMany));
            return;
        };
        let mut connection = Connection::new(guest, With::Edge, self.now);
        connection.was_reset = stream.1;
        connection.waiting = Some((reply, stream.0));
        connection.limit = self.now.checked_add(CONNECT);
        if let Some(token) = self.insert(key, ours, Kind::Tcp(Box::new(connection)), None) {
            self.soil(token);
        }
    }

    #[allow(clippy::type_complexity)]
    fn prepare_inbound(
        &mut self,
        port: u16,
    ) -> Option<(Key, GuestSocket, Near, (GuestStream, Arc<AtomicBool>))> {
        let key = (0..=MAX_INBOUND).find_map(|_| {
            // Ephemeral ports as RFC 6335 has them.
            self.next_port = self.next_port.wrapping_add(1) | 0xc000;
            let key = Key {
                protocol: IpProtocol::Tcp,
                guest_port: port,
                peer: SocketAddr::new(GATEWAY_V4.into(), self.next_port),
            };
            (!self.keys.contains_key(&key)).then_some(key)
        })?;
        let mut guest = GuestSocket::new(&self.arena)?;
        prepare(&mut guest, GIVE_UP);
        let local = IpEndpoint::new(GATEWAY_V4.into(), key.peer.port());
        let remote = IpEndpoint::new(GUEST_V4.into(), port);
        guest
            .tcp()
            .connect(self.iface.context(), remote, local)
            .ok()?;
        let (ours, theirs) = pipe::pair(&self.bell);
        let was_reset = Arc::<AtomicBool>::default();
        let stream = GuestStream::new(theirs, Arc::clone(&was_reset));
        Some((key, guest, ours, (stream, was_reset)))
    }

    pub(super) fn serve_connection(&mut self, token: Token) -> Next {
        let now = self.now;
        let smoltcp_now = self.smoltcp_now();
        let Some(entry) = self.entries.get_mut(token) else {
            return Next::Wait(None);
        };
        let Kind::Tcp(connection) = &mut entry.kind else {
            return Next::Wait(None);
        };
        let state = connection.guest.tcp().state();
        match state {
            // The guest took its SYN back, or smoltcp refused it.
            State::Listen => return Next::Gone { reset: true },
            State::SynSent | State::SynReceived => {}
            State::Closed => {}
            _ => {
                if let Some((reply, stream)) = connection.waiting.take() {
                    connection.limit = None;
                    // Whoever asked may be gone; the dropped stream ends the connection.
                    let _ = reply.send(Ok(stream));
                }
            }
        }
        if !matches!(state, State::SynSent | State::SynReceived) && !connection.broken {
            let reset = state == State::Closed
                && !matches!(
                    connection.last,
                    State::LastAck | State::TimeWait | State::Closing
                );
            if !reset {
                connection.pump(&entry.socket, &mut entry.ready, now);
            }
        }
        let connection_limit = connection.limit.is_some_and(|limit| limit <= now);
        if connection_limit {
            connection.abort();
        }
        // A connection in TIME-WAIT has nothing more to say than once; smoltcp would throw away
        // what is still to be taken to the world.
        let silent = connection.last == State::TimeWait && connection.limit.is_some();
        let mut wants = None;
        // The burst was over before everything was said.
        let mut more = false;
        self.link.refused = false;
        if !silent || connection_limit {
            self.link.last_ack = None;
            for _ in 0..BURST {
                let result = self.iface.poll_egress(
                    smoltcp_now,
                    &mut self.link.device(None),
                    connection.guest.set(),
                );
                more = result != PollResult::None && !self.link.refused;
                if !more {
                    break;
                }
            }
            connection.acknowledged = self.link.last_ack.or(connection.acknowledged);
            wants = self.iface.poll_at(smoltcp_now, connection.guest.set());
        }
        let refused = self.link.refused;
        let tcp = connection.guest.tcp();
        let state = tcp.state();
        let pending = tcp.can_recv();
        let settled = tcp.remote_endpoint().is_none();
        // A guest that takes nothing is not waited for to take the reset: it gets one for whatever
        // it says next.
        if state == State::Closed && (settled || connection_limit) {
            if let Some((reply, _)) = connection.waiting.take() {
                let error = if connection_limit {
                    ConnectError::TimedOut
                } else {
                    ConnectError::Refused
                };
                let _ = reply.send(Err(error));
            }
            let orderly = !connection.broken
                && matches!(
                    connection.last,
                    State::LastAck | State::TimeWait | State::Closing
                );
            if !orderly {
                return Next::Gone { reset: true };
            }
            if !pending {
                return Next::Gone { reset: false };
            }
        }
        if state == State::TimeWait && !pending && connection.finished && !refused {
            return Next::Gone { reset: false };
        }
        if matches!(state, State::TimeWait | State::Closed) && connection.limit.is_none() {
            connection.limit = now.checked_add(DRAIN);
        }
        if matches!(state, State::FinWait1 | State::FinWait2)
            && entry.ready.over
            && connection.limit.is_none()
        {
            connection.limit = now.checked_add(LINGER);
        }
        if state != State::Closed {
            connection.last = state;
        }
        let mut deadline = connection.limit;
        if refused {
            // What smoltcp wants done by then is to send, and there is no room: not before there is.
            return Next::Starved(deadline);
        }
        let trim = connection.trim(now);
        let wanted = wants.map(|when| self.deadline_of(when));
        for other in [trim, wanted].into_iter().flatten() {
            deadline = Some(deadline.map_or(other, |first| first.min(other)));
        }
        // More than a burst is there: others first, then at once again.
        if more && wants.is_some_and(|when| when <= smoltcp_now) {
            self.soil(token);
        }
        Next::Wait(deadline)
    }
}

fn prepare(guest: &mut GuestSocket, give_up: Duration) {
    let tcp = guest.tcp();
    let millis = |time: Duration| {
        smoltcp::time::Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
    };
    tcp.set_keep_alive(Some(millis(KEEP_ALIVE)));
    tcp.set_timeout(Some(millis(give_up)));
}
