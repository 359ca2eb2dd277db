//! One VM's stack as it runs: a task that waits for frames, sockets, deadlines and orders, and does
//! a bounded amount of work each time before it lets others go on. It must never wait for one
//! connection while another could go on.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use protocol::host::proxy::ServeGateway;
use protocol::network::{Egress, MAX_CONNECTIONS, RuleProtocol};
use smoltcp::iface::{Config, Interface};
use smoltcp::wire::{HardwareAddress, IpCidr, IpProtocol};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::address::{
    GATEWAY_LINK_LOCAL, GATEWAY_V4, GATEWAY_V6, V4_PREFIX, V6_PREFIX, is_gateway,
};
use super::arena::Arena;
use super::bucket::Bucket;
use super::counters::{Counters, add, count};
use super::dns::Resolver;
use super::frames::{BadLength, Frames, Read};
use super::link::Link;
use super::names::{self, Answer, Question};
use super::packet::{self, Content, Packet};
use super::pipe::Bell;
use super::policy::{Policy, Verdict};
use super::slab::{Slab, Token};
use super::stack::Order;
use super::table::{Entry, Key, Kind, Ready};
use super::timers::Timers;
use super::{Checksums, Common, DEFAULT_CONNECTIONS, StackSettings, answer};

/// Frames of the guest that are looked at before others have their turn.
const TURN: usize = 64;

/// Events that are taken from the kernel at once.
const EVENTS: usize = 256;

/// Connections from the edge to one VM: twice the requests that it may have at the same time, because
/// a connection that has ended counts until the guest has acknowledged its end.
pub(super) const MAX_INBOUND: usize = 2048;

/// The channel's number among the events.
const CHANNEL: u64 = u64::MAX;

/// Why a stack ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    #[error("the frame channel: {0}")]
    Channel(#[source] io::Error),
    #[error("the frame channel carried {0}")]
    Length(#[from] BadLength),
    #[error("waiting for events: {0}")]
    Events(#[source] io::Error),
}

pub(super) struct Poller(pub(super) Epoll);

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// What a stack is told while it runs.
pub(super) struct Orders {
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) egress: watch::Receiver<Egress>,
}

pub(super) struct Engine {
    channel: OwnedFd,
    channel_ready: Ready,
    pub(super) poller: AsyncFd<Poller>,
    events: Box<[EpollEvent]>,
    /// Rung by the tasks that the guest has streams to.
    pub(super) bell: Arc<Bell>,
    frames: Frames,
    pub(super) link: Link,
    pub(super) iface: Interface,
    pub(super) arena: Arc<Arena>,
    pub(super) entries: Slab<Entry>,
    pub(super) keys: HashMap<Key, Token>,
    pub(super) timers: Timers,
    pub(super) dirty: Vec<Token>,
    pub(super) starved: VecDeque<Token>,
    pub(super) policy: Arc<Policy>,
    pub(super) resolver: Arc<Resolver>,
    pub(super) common: Arc<Common>,
    pub(super) counters: Arc<Counters>,
    pub(super) checksums: Checksums,
    pub(super) questions: FuturesUnordered<Question>,
    pub(super) question_streams: usize,
    pub(super) asking: usize,
    pub(super) inbound: usize,
    pub(super) name_streams: usize,
    pub(super) now: Instant,
    pub(super) next_port: u16,
    epoch: Instant,
    /// By how much a test's clock is ahead.
    #[cfg(test)]
    ahead: Duration,
    pub(super) max_connections: u32,
    own_max: u32,
    bytes: Bucket,
    packets: Bucket,
}

impl Engine {
    pub(super) fn new(
        settings: &StackSettings,
        channel: OwnedFd,
        common: Arc<Common>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        super::world::set_nonblocking(channel.as_fd())?;
        let now = Instant::now();
        let poller = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        poller.add(&channel, EpollEvent::new(flags, CHANNEL))?;
        let poller = register(Poller(poller))?;
        let mut link = Link::new(settings.checksums, Arc::clone(&counters), now);
        let mut seed = [0; 8];
        getrandom(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut iface = Interface::new(
            config,
            &mut link.device(None),
            smoltcp::time::Instant::from_micros(0),
        );
        // Every destination is spoken for: which may be reached is decided before a segment gets
        // here, and ARP and neighbour discovery are answered elsewhere.
        iface.set_any_ip(true);
        iface.update_ip_addrs(|addresses| {
            for (address, prefix) in [
                (GATEWAY_V4.into(), V4_PREFIX),
                (GATEWAY_V6.into(), V6_PREFIX),
                (GATEWAY_LINK_LOCAL.into(), 64),
            ] {
                // The list has room for three; see the test.
                let _ = addresses.push(IpCidr::new(address, prefix));
            }
        });
        let operator = common.gateway.borrow().rules.clone();
        let policy = Arc::new(Policy::new(
            operator,
            settings.egress.clone(),
            Arc::clone(&common.host),
        ));
        let resolver = Arc::new(Resolver::new(
            &settings.hostname,
            Arc::clone(&policy),
            Arc::clone(&common.upstreams),
        ));
        let slots = usize::try_from(MAX_CONNECTIONS)
            .unwrap_or(0)
            .saturating_add(MAX_INBOUND)
            .saturating_add(names::MAX_STREAMS);
        let mut engine = Self {
            channel,
            channel_ready: Ready {
                readable: true,
                writable: true,
                ..Ready::default()
            },
            poller,
            events: vec![EpollEvent::empty(); EVENTS].into_boxed_slice(),
            bell: Arc::default(),
            frames: Frames::new(),
            link,
            iface,
            arena: Arena::new(slots)?,
            entries: Slab::new(),
            keys: HashMap::new(),
            timers: Timers::default(),
            dirty: Vec::new(),
            starved: VecDeque::new(),
            policy,
            resolver,
            common,
            counters,
            checksums: settings.checksums,
            questions: FuturesUnordered::new(),
            question_streams: 0,
            asking: 0,
            inbound: 0,
            name_streams: 0,
            now,
            next_port: u16::from_ne_bytes([seed[0], seed[1]]),
            epoch: now,
            #[cfg(test)]
            ahead: Duration::ZERO,
            max_connections: DEFAULT_CONNECTIONS,
            own_max: 0,
            bytes: Bucket::new(0, now),
            packets: Bucket::new(0, now),
        };
        engine.set_limits(&settings.egress);
        Ok(engine)
    }

    /// Serves until the channel ends.
    pub(super) async fn run(&mut self, mut told: Orders) -> Result<(), EngineError> {
        let mut gateway = self.common.gateway.subscribe();
        loop {
            let (more, ended) = self.turn()?;
            if ended {
                return Ok(());
            }
            if more {
                tokio::task::yield_now().await;
                self.catch_up(&mut told, &mut gateway);
                continue;
            }
            let deadline = self.deadline();
            let bell = Arc::clone(&self.bell);
            let until = tokio::time::Instant::from_std(deadline.unwrap_or(self.now));
            tokio::select! {
                ready = self.poller.ready(Interest::READABLE) => {
                    ready.map_err(EngineError::Events)?.clear_ready();
                }
                () = bell.heard() => {}
                () = tokio::time::sleep_until(until), if deadline.is_some() => {}
                order = told.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    // Whoever held the stack is gone, and with it the reason to go on.
                    None => return Ok(()),
                },
                Ok(()) = told.egress.changed() => {
                    let egress = told.egress.borrow_and_update().clone();
                    self.update(egress);
                }
                Ok(()) = gateway.changed() => {
                    let settings = Arc::clone(&gateway.borrow_and_update());
                    self.reconfigure(&settings);
                }
                Some(answer) = self.questions.next(), if !self.questions.is_empty() => {
                    self.now();
                    self.answered(answer);
                }
            }
        }
    }

    /// Orders, settings and answers must not starve behind a flood of frames.
    fn catch_up(&mut self, told: &mut Orders, gateway: &mut watch::Receiver<Arc<ServeGateway>>) {
        while let Ok(order) = told.orders.try_recv() {
            self.obey(order);
        }
        if told.egress.has_changed().unwrap_or(false) {
            let egress = told.egress.borrow_and_update().clone();
            self.update(egress);
        }
        if gateway.has_changed().unwrap_or(false) {
            let settings = Arc::clone(&gateway.borrow_and_update());
            self.reconfigure(&settings);
        }
        for _ in 0..self.questions.len() {
            match self.questions.next().now_or_never() {
                Some(Some(answer)) => self.answered(answer),
                _ => return,
            }
        }
    }

    fn reconfigure(&mut self, settings: &ServeGateway) {
        self.policy.set_operator(settings.rules.clone());
        self.count_limits();
    }

    /// Everything that can be done without waiting, up to a limit. Whether there is more, and
    /// whether the channel has ended.
    fn turn(&mut self) -> Result<(bool, bool), EngineError> {
        self.now();
        let more_events = self.gather()?;
        self.flush()?;
        let (more_frames, ended) = self.receive()?;
        while let Some(token) = self.timers.due(self.now) {
            self.soil(token);
        }
        // Who has waited for room comes first: what happens to others all the time would leave none.
        self.serve_starved();
        self.serve_dirty();
        let choked = self.link.choked();
        self.flush()?;
        let relieved = choked && !self.link.choked();
        let hungry = !self.starved.is_empty() && !self.link.full();
        Ok((
            more_events || more_frames || hungry || relieved || !self.dirty.is_empty(),
            ended,
        ))
    }

    fn now(&mut self) {
        self.now = Instant::now();
        #[cfg(test)]
        {
            self.now += self.ahead;
        }
        self.link.now = self.now;
    }

    /// This moment as smoltcp counts time.
    pub(super) fn smoltcp_now(&self) -> smoltcp::time::Instant {
        let since = self.now.saturating_duration_since(self.epoch);
        smoltcp::time::Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    /// A moment of smoltcp's, not before the next millisecond: what it wanted done now was done.
    pub(super) fn deadline_of(&self, when: smoltcp::time::Instant) -> Instant {
        let micros = u64::try_from(when.total_micros()).unwrap_or(0);
        let soon = Duration::from_millis(1);
        let floor = self.now.checked_add(soon).unwrap_or(self.now);
        self.epoch
            .checked_add(Duration::from_micros(micros))
            .unwrap_or(floor)
            .max(floor)
    }

    fn deadline(&self) -> Option<Instant> {
        let mut first = self.timers.next();
        let mut sooner = |when: Option<Instant>| {
            if let Some(when) = when {
                first = Some(first.map_or(when, |first| first.min(when)));
            }
        };
        if !self.starved.is_empty() {
            sooner(self.link.limited_until());
        }
        sooner(self.closed_until());
        first
    }

    /// Until when the VM's limits keep its frames waiting.
    fn closed_until(&self) -> Option<Instant> {
        self.bytes
            .closed_until(self.now)
            .max(self.packets.closed_until(self.now))
    }

    /// Takes events from the kernel. Whether there may be more.
    fn gather(&mut self) -> Result<bool, EngineError> {
        let poller = &self.poller.get_ref().0;
        let number = match poller.wait(&mut self.events, EpollTimeout::ZERO) {
            Ok(number) => number,
            Err(Errno::EINTR) => return Ok(true),
            Err(error) => return Err(EngineError::Events(error.into())),
        };
        for index in 0..number {
            let Some(event) = self.events.get(index).copied() else {
                break;
            };
            if event.data() == CHANNEL {
                self.channel_ready.note(event.events());
                continue;
            }
            let token = Token::from_u64(event.data());
            if let Some(entry) = self.entries.get_mut(token) {
                entry.ready.note(event.events());
                self.soil(token);
            }
        }
        for token in self.bell.take() {
            if let Some(entry) = self.entries.get_mut(token) {
                entry.socket.note(&mut entry.ready);
                self.soil(token);
            }
        }
        Ok(number == self.events.len())
    }

    /// Looks at frames of the guest. Whether there are more, and whether the channel has ended.
    fn receive(&mut self) -> Result<(bool, bool), EngineError> {
        // Taken out so that a frame can be looked at while everything else changes.
        let mut frames = std::mem::take(&mut self.frames);
        let result = self.receive_from(&mut frames);
        self.frames = frames;
        result
    }

    fn receive_from(&mut self, frames: &mut Frames) -> Result<(bool, bool), EngineError> {
        for _ in 0..TURN {
            // A guest that does not take what it is sent is not asked for more.
            if self.link.choked() || self.closed_until().is_some() {
                return Ok((false, false));
            }
            if let Some(frame) = frames.next()? {
                self.frame(frame);
                continue;
            }
            if !self.channel_ready.readable {
                return Ok((false, false));
            }
            match frames.read(self.channel.as_fd()) {
                Ok(Read::More) => {}
                Ok(Read::Drained) => {
                    // The end of a channel is seen by reading on.
                    if !self.channel_ready.finished {
                        self.channel_ready.readable = false;
                    }
                }
                Ok(Read::Ended) => return Ok((false, true)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok((false, true));
                }
                Err(error) => return Err(EngineError::Channel(error)),
            }
        }
        Ok((true, false))
    }

    fn frame(&mut self, bytes: &[u8]) {
        count(&self.counters.frames_out);
        add(&self.counters.bytes_out, bytes.len());
        self.bytes.take(bytes.len(), self.now);
        self.packets.take(1, self.now);
        if self.understood(bytes).is_none() {
            count(&self.counters.dropped);
        }
    }

    /// None for a frame that is thrown away.
    fn understood(&mut self, bytes: &[u8]) -> Option<()> {
        let (from, content) = packet::parse(bytes)?;
        let packet = match content {
            Content::Arp(bytes) => {
                answer::arp(&mut self.link, bytes)?;
                self.link.guest_mac = from;
                return Some(());
            }
            Content::Ip(packet) => packet,
        };
        self.link.guest_mac = from;
        match packet.protocol {
            IpProtocol::Tcp => self.segment(&packet),
            IpProtocol::Udp => self.datagram(&packet),
            IpProtocol::Icmp | IpProtocol::Icmpv6 => {
                if let Some(echo) = answer::echo_request(&packet) {
                    return self.echo(&packet, echo);
                }
                if packet.protocol == IpProtocol::Icmp {
                    return None;
                }
                answer::neighbour(&mut self.link, &packet, from)
            }
            _ => None,
        }
    }

    /// Whether the rules let the guest open this. What they refuse is counted.
    pub(super) fn allowed(&self, protocol: RuleProtocol, to: SocketAddr) -> bool {
        let verdict = self.policy.decide(protocol, to.ip(), to.port());
        if verdict == Verdict::Deny {
            count(&self.counters.denied);
        }
        verdict == Verdict::Allow
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        if self.link.is_empty() || !self.channel_ready.writable {
            return Ok(());
        }
        match self.link.flush(self.channel.as_fd()) {
            Ok(all) => {
                self.channel_ready.writable = all;
                Ok(())
            }
            // The reading side says in its own words that the channel has ended.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                self.channel_ready.writable = false;
                self.channel_ready.readable = true;
                self.channel_ready.finished = true;
                self.link.close();
                Ok(())
            }
            Err(error) => Err(EngineError::Channel(error)),
        }
    }

    fn obey(&mut self, order: Order) {
        self.now();
        match order {
            Order::Connect { port, reply } => self.connect(port, reply),
            #[cfg(test)]
            Order::Panic => panic!("injected"),
        }
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Stream => self.question_streams = self.question_streams.saturating_sub(1),
            Answer::Datagram {
                guest_port,
                gateway,
                answer: Some(bytes),
            } => {
                let sent = !self.link.choked()
                    && answer::datagram(&mut self.link, gateway, guest_port, bytes.len(), |room| {
                        room.get_mut(..bytes.len())?.copy_from_slice(&bytes);
                        Some(bytes.len())
                    });
                if !sent {
                    count(&self.counters.dropped);
                }
            }
            Answer::Datagram { .. } => {}
        }
    }

    fn update(&mut self, egress: Egress) {
        self.now();
        self.set_limits(&egress);
        let offline = egress.offline;
        self.policy.update(egress);
        if !offline {
            return;
        }
        for token in self.entries.tokens() {
            let Some(entry) = self.entries.get_mut(token) else {
                continue;
            };
            if entry.permit.is_none() {
                continue;
            }
            match &mut entry.kind {
                Kind::Tcp(connection) => {
                    connection.abort();
                    self.soil(token);
                }
                Kind::Asking(_) | Kind::Flow(_) => {
                    self.remove(token);
                }
            }
        }
    }

    fn set_limits(&mut self, egress: &Egress) {
        self.own_max = egress.max_connections;
        self.count_limits();
        for (bytes, packets) in [
            (&mut self.bytes, &mut self.packets),
            (&mut self.link.bytes, &mut self.link.packets),
        ] {
            bytes.set_rate(egress.bytes_per_second, self.now);
            packets.set_rate(egress.packets_per_second, self.now);
        }
    }

    fn count_limits(&mut self) {
        let usual = match self.common.gateway.borrow().max_connections {
            0 => DEFAULT_CONNECTIONS,
            number => number,
        };
        let own = match self.own_max {
            0 => usual,
            number => number,
        };
        self.max_connections = own.min(MAX_CONNECTIONS);
    }

    /// Whether the guest speaks to the gateway's resolver.
    pub(super) fn for_names(to: SocketAddr) -> bool {
        is_gateway(to.ip()) && to.port() == names::PORT
    }

    /// The whole packet again, from bytes that were one.
    pub(super) fn again(bytes: &[u8]) -> Option<Packet<'_>> {
        packet::ip(bytes)
    }
}

fn register(poller: Poller) -> io::Result<AsyncFd<Poller>> {
    // SAFETY: the descriptor is owned by the value, and neither closed nor replaced before the
    // AsyncFd is dropped: nothing takes it out again.
    unsafe { AsyncFd::register(poller) }.map_err(io::Error::from)
}

fn getrandom(into: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length are of one writable slice.
    let got = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
    if usize::try_from(got) == Ok(into.len()) {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests;
