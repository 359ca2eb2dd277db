//! The stack one turn at a time, with frames written by hand: what must hold in moments that a
//! running one passes through too quickly to be met.

mod ends;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::Command;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv4Repr, IpRepr, Ipv4Packet, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
};

use super::super::address::{GATEWAY_MAC, GUEST_MAC, GUEST_V4, MTU};
use super::super::slab::Token;
use super::*;

/// A public address, so that the rules let the guest reach it.
const WORLD: Ipv4Addr = Ipv4Addr::new(5, 5, 5, 5);

/// How long anything may take before a test has failed.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs a test in a network namespace of its own.
fn world<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("tests of the gateway need root");
        for line in ["link set lo up", "address add 5.5.5.5/32 dev lo"] {
            let done = Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(done.success(), "ip {line}");
        }
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A stack that makes a turn when it is told to, and its guest.
struct Rig {
    engine: Engine,
    channel: UnixStream,
    unread: Vec<u8>,
}

impl Rig {
    fn new(egress: Egress) -> Self {
        Self::with(egress, Common::new())
    }

    fn with(egress: Egress, common: Arc<Common>) -> Self {
        let (ours, channel) = UnixStream::pair().unwrap();
        channel.set_nonblocking(true).unwrap();
        let settings = StackSettings {
            vm: "vm-1234abcd".parse().unwrap(),
            hostname: "supvm-1234".into(),
            egress,
            checksums: Checksums::Trusted,
        };
        let engine = Engine::new(&settings, ours.into(), common, Arc::default());
        Self {
            engine: engine.unwrap(),
            channel,
            unread: Vec::new(),
        }
    }

    /// Turns until there is nothing more to do without waiting. Whether the channel has ended.
    fn turns(&mut self) -> bool {
        for _ in 0..10_000 {
            let (more, ended) = self.engine.turn().unwrap();
            if ended || !more {
                return ended;
            }
        }
        panic!("there is always more to do");
    }

    /// Turns until something holds that the kernel may still be working on.
    fn until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            self.turns();
            if holds(self) {
                return;
            }
            assert!(Instant::now() < end, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        let bytes = [&length[..], frame].concat();
        self.channel.write_all(&bytes).unwrap();
    }

    /// The whole frames that are there.
    fn take(&mut self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            match self.channel.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => self.unread.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let mut frames = Vec::new();
        while let Some(prefix) = self.unread.first_chunk::<4>() {
            let end = 4 + usize::try_from(u32::from_be_bytes(*prefix)).unwrap();
            if self.unread.len() < end {
                break;
            }
            frames.push(self.unread[4..end].to_vec());
            self.unread.drain(..end);
        }
        frames
    }

    /// Pings until no new data is taken for the guest, or, `choked`, not even answers.
    fn fill(&mut self, choked: bool) {
        for _ in 0..100 {
            self.send(&ping());
            self.turns();
            if self.engine.link.choked() || self.engine.link.full() && !choked {
                return;
            }
        }
        panic!("taken without end");
    }

    /// Opens a connection from `port` of the guest. What the guest has to send next, and to
    /// acknowledge.
    fn open(&mut self, port: u16, to: SocketAddr) -> (i32, i32) {
        self.send(&tcp(port, to, TcpControl::Syn, 77, None));
        let mut found = None;
        self.until("a SYN is answered", |rig| {
            for frame in rig.take() {
                if let Some(packet) = tcp_of(&frame)
                    && packet.syn()
                    && packet.dst_port() == port
                {
                    found = Some(packet.seq_number().0.wrapping_add(1));
                }
            }
            found.is_some()
        });
        let next = found.unwrap();
        self.send(&tcp(port, to, TcpControl::None, 78, Some(next)));
        self.turns();
        (78, next)
    }
}

fn ethernet(kind: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 14];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(GUEST_MAC);
    frame.set_dst_addr(GATEWAY_MAC);
    frame.set_ethertype(kind);
    bytes.extend(payload);
    bytes
}

fn ip(to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = IpRepr::new(GUEST_V4.into(), to.into(), protocol, payload.len(), 64);
    let mut bytes = vec![0; repr.header_len()];
    repr.emit(&mut bytes[..], &ChecksumCapabilities::default());
    bytes.extend(payload);
    ethernet(EthernetProtocol::Ipv4, &bytes)
}

fn v4(address: SocketAddr) -> Ipv4Addr {
    match address.ip() {
        std::net::IpAddr::V4(v4) => v4,
        std::net::IpAddr::V6(_) => panic!("an IPv4 address is meant"),
    }
}

/// The largest echo request to the gateway.
fn ping() -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data: &vec![3; MTU - 28],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &mut Icmpv4Packet::new_unchecked(&mut bytes[..]),
        &ChecksumCapabilities::default(),
    );
    ip(GATEWAY_V4, IpProtocol::Icmp, &bytes)
}

fn tcp(port: u16, to: SocketAddr, control: TcpControl, seq: i32, ack: Option<i32>) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: port,
        dst_port: to.port(),
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 60_000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &mut TcpPacket::new_unchecked(&mut bytes[..]),
        &GUEST_V4.into(),
        &to.ip().into(),
        &ChecksumCapabilities::default(),
    );
    ip(v4(to), IpProtocol::Tcp, &bytes)
}

fn udp(port: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() + 8;
    let mut bytes = vec![0; 8];
    let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
    packet.set_src_port(port);
    packet.set_dst_port(to.port());
    packet.set_len(u16::try_from(length).unwrap());
    bytes.extend(payload);
    ip(v4(to), IpProtocol::Udp, &bytes)
}

fn payload_of(frame: &[u8], protocol: IpProtocol) -> Option<&[u8]> {
    let packet = Ipv4Packet::new_checked(frame.get(14..)?).ok()?;
    (frame.get(12..14)? == [8, 0] && packet.next_header() == protocol).then(|| packet.payload())
}

fn tcp_of(frame: &[u8]) -> Option<TcpPacket<&[u8]>> {
    TcpPacket::new_checked(payload_of(frame, IpProtocol::Tcp)?).ok()
}

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((WORLD, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A UDP flow that the guest has opened: the world's end, and the address of the gateway's.
fn flow(rig: &mut Rig, port: u16) -> (UdpSocket, SocketAddr) {
    let server = UdpSocket::bind((WORLD, 0)).unwrap();
    server.set_nonblocking(true).unwrap();
    rig.send(&udp(port, server.local_addr().unwrap(), b"open"));
    let mut from = None;
    rig.until("the world hears of it", |_| {
        from = server.recv_from(&mut [0; 10]).ok();
        from.is_some()
    });
    (server, from.unwrap().1)
}

/// What is due sooner than this again and again is a wait that is none.
const SOON: Duration = Duration::from_millis(200);

#[test]
fn nothing_is_done_again_and_again_for_a_guest_that_takes_nothing() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (listener, to) = listen();
        rig.open(9, to);
        let (mut server, _) = listener.accept().unwrap();
        rig.fill(false);
        server.write_all(&[1; 5000]).unwrap();
        rig.until("data waits for room", |rig| !rig.engine.starved.is_empty());
        for _ in 0..10 {
            rig.engine.now();
            let Some(due) = rig.engine.deadline() else {
                return;
            };
            let wait = due.saturating_duration_since(rig.engine.now);
            if wait > SOON {
                return;
            }
            std::thread::sleep(wait);
            rig.turns();
        }
        panic!("woken again and again");
    });
}

#[test]
fn a_connection_that_is_given_up_ends_also_when_the_guest_takes_nothing() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        rig.fill(false);
        let (reply, mut answer) = tokio::sync::oneshot::channel();
        rig.engine.now();
        rig.engine.connect(80, reply);
        rig.turns();
        assert_eq!(rig.engine.starved.len(), 1);
        for token in rig.engine.entries.tokens() {
            if let Some(Entry {
                kind: Kind::Tcp(connection),
                ..
            }) = rig.engine.entries.get_mut(token)
            {
                connection.limit = Some(Instant::now());
            }
            rig.engine.soil(token);
        }
        rig.turns();
        assert_eq!(rig.engine.entries.tokens(), Vec::<Token>::new());
        let error = answer.try_recv().unwrap().unwrap_err();
        assert_eq!(error, super::super::ConnectError::TimedOut);
    });
}

#[test]
fn the_end_of_the_channel_is_seen_also_when_the_guest_took_nothing() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        rig.fill(true);
        // Closed for good, as by a monitor that was killed.
        rig.channel = UnixStream::pair().unwrap().0;
        let end = Instant::now() + LIMIT;
        while !rig.turns() {
            assert!(Instant::now() < end, "the stack stays");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn who_waits_for_room_has_it_before_what_has_just_come() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (early, to_early) = flow(&mut rig, 1000);
        let (late, to_late) = flow(&mut rig, 2000);
        // From here on one frame closes the limit for a while.
        rig.engine.update(Egress {
            packets_per_second: 10,
            ..Egress::default()
        });
        rig.fill(false);
        rig.take();
        early.send_to(b"early", to_early).unwrap();
        rig.until("it waits", |rig| rig.engine.starved.len() == 1);
        rig.engine.now();
        while rig.engine.link.full() {
            std::thread::sleep(Duration::from_millis(1));
            rig.engine.now();
        }
        late.send_to(b"late", to_late).unwrap();
        rig.engine.turn().unwrap();
        let first = rig.take().into_iter().find_map(|frame| {
            payload_of(&frame, IpProtocol::Udp).map(|datagram| datagram[8..].to_vec())
        });
        assert_eq!(first.as_deref(), Some(&b"early"[..]));
    });
}

#[test]
fn what_waits_for_room_is_forgotten_when_it_has_ended() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (listener, to) = listen();
        rig.fill(false);
        for port in 1000..1400 {
            rig.send(&tcp(port, to, TcpControl::Syn, 77, None));
            rig.turns();
            // Its answer waits for room; so long the world has a connection.
            let accepted = listener.accept().unwrap();
            rig.until("it waits", |rig| {
                matches!(rig.engine.entries.tokens()[..], [_])
                    && rig.engine.keys.keys().all(|key| key.guest_port == port)
                    && !rig.engine.starved.is_empty()
            });
            rig.send(&tcp(port, to, TcpControl::Rst, 78, Some(0)));
            rig.until("it ends", |rig| rig.engine.keys.is_empty());
            drop(accepted);
        }
        let waiting = rig.engine.starved.len();
        assert!(waiting <= 100, "{waiting} of nothing");
    });
}

#[test]
fn a_datagram_behind_an_error_of_the_network_comes_through() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (server, to) = flow(&mut rig, 1000);
        rig.take();
        // Both are there before the stack looks: a datagram, and the word of some router that the
        // network is closed (type 3, code 9) about one that was sent before.
        server.send_to(b"behind", to).unwrap();
        let from = server.local_addr().unwrap();
        let mut quoted = ip(v4(from), IpProtocol::Udp, &[0; 8])[14..].to_vec();
        quoted[12..16].copy_from_slice(&WORLD.octets());
        quoted[20..22].copy_from_slice(&to.port().to_be_bytes());
        quoted[22..24].copy_from_slice(&from.port().to_be_bytes());
        let mut message = [vec![3, 9, 0, 0, 0, 0, 0, 0], quoted].concat();
        Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
        let raw = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Raw,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            nix::sys::socket::SockProtocol::Icmp,
        )
        .unwrap();
        let whereto = nix::sys::socket::SockaddrIn::new(5, 5, 5, 5, 0);
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendto(raw.as_raw_fd(), &message, &whereto, flags).unwrap();
        let (mut told, mut came) = (false, false);
        rig.until("the error is told, and the datagram comes", |rig| {
            for frame in rig.take() {
                told |= payload_of(&frame, IpProtocol::Icmp)
                    .is_some_and(|bytes| bytes.first() == Some(&3));
                came |= payload_of(&frame, IpProtocol::Udp)
                    .is_some_and(|bytes| bytes.ends_with(b"behind"));
            }
            told && came
        });
    });
}

#[test]
fn streams_to_the_name_server_are_bounded_however_they_end() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let to = SocketAddr::new(GATEWAY_V4.into(), names::PORT);
        for port in 1000..1200 {
            rig.send(&tcp(port, to, TcpControl::Syn, 77, None));
            rig.turns();
            let mut next = None;
            for frame in rig.take() {
                if let Some(packet) = tcp_of(&frame)
                    && packet.syn()
                {
                    next = Some(packet.seq_number().0.wrapping_add(1));
                }
            }
            // A query of no bytes is none: the stream ends. The guest never closes its own end.
            let Some(next) = next else { continue };
            let mut frame = tcp(port, to, TcpControl::Psh, 78, Some(next));
            let length = u16::try_from(frame.len() - 14 + 2).unwrap();
            Ipv4Packet::new_unchecked(&mut frame[14..]).set_total_len(length);
            Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
            frame.extend([0, 0]);
            rig.send(&frame);
            rig.turns();
            let ended = tokio::time::timeout(LIMIT, rig.engine.questions.next()).await;
            rig.engine.answered(ended.unwrap().unwrap());
            rig.turns();
        }
        let open = rig.engine.entries.tokens().len();
        assert!(open <= names::MAX_STREAMS, "{open} streams");
        // An ordinary guest is served again as soon as those are gone.
        for port in 1000..1200 {
            rig.send(&tcp(port, to, TcpControl::Rst, 80, Some(0)));
        }
        rig.until("they are gone", |rig| {
            rig.engine.entries.tokens().is_empty()
        });
        rig.open(2000, to);
    });
}

#[test]
fn the_newest_syn_is_the_one_that_is_answered() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        // A queue that is full: the world does not answer yet.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((WORLD, 0).into()).unwrap();
        let to = socket.local_addr().unwrap();
        let listener = socket.listen(1).unwrap().into_std().unwrap();
        let mut queued = Vec::new();
        let wait = Duration::from_millis(200);
        while let Ok(stream) = std::net::TcpStream::connect_timeout(&to, wait) {
            queued.push(stream);
        }
        rig.send(&tcp(9, to, TcpControl::Syn, 77, None));
        rig.until("it is held", |rig| rig.engine.asking == 1);
        // The guest has given that attempt up and begins another from the same port.
        rig.send(&tcp(9, to, TcpControl::Syn, 1_000_077, None));
        rig.turns();
        listener.set_nonblocking(true).unwrap();
        let mut accepted = Vec::new();
        rig.until("it is answered", |rig| {
            accepted.extend(listener.accept());
            rig.take().iter().any(|frame| {
                let packet = tcp_of(frame).unwrap();
                assert_eq!(packet.ack_number(), TcpSeqNumber(1_000_078));
                packet.syn()
            })
        });
    });
}
