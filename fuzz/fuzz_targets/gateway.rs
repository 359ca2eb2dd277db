//! Frames of a hostile guest, into the shipped stack by its Unix socket, while the stack of another VM
//! in the same process is watched: it answers, nothing panics, nothing grows beyond its limits. The
//! input says what the guest does: raw frames, and packets that are sound enough to open connections
//! through the gateway, to a server on the loopback device of a network namespace of its own.

#![no_main]

use std::cell::RefCell;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use protocol::network::Egress;
use proxy::gateway::address::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6};
use proxy::gateway::{Checksums, Common, DEFAULT_CONNECTIONS, Ended, Stack, StackSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

const WORLD_V4: Ipv4Addr = Ipv4Addr::new(5, 5, 5, 5);
const WORLD_V6: Ipv6Addr = Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 5);
const ECHO: u16 = 7;

/// How long a stack may take to answer its neighbour's question.
const LIMIT: Duration = Duration::from_secs(8);

/// What an input may do.
const MOST_STEPS: usize = 64;

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// What is there for all inputs.
struct World {
    runtime: Runtime,
    common: Arc<Common>,
    watched: Guest,
}

/// A VM: its stack, and the other end of its frame channel.
struct Guest {
    stack: Stack,
    channel: UnixStream,
}

/// The guest's side of some connections: where it is, and where the gateway is.
#[derive(Default)]
struct Connections([(u32, u32); 4]);

/// The input, eaten from its front; zeros behind its end.
struct Input<'i>(&'i [u8]);

impl<'i> Input<'i> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn take(&mut self, count: usize) -> &'i [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn prepare() -> World {
    if unshare(CloneFlags::CLONE_NEWNET) == Err(Errno::EPERM) {
        // Once more with rights of its own: a process with threads cannot give them to itself.
        let mut again = Command::new("unshare");
        again.args(["--user", "--map-root-user", "--net", "--"]);
        let error = again.args(std::env::args_os()).exec();
        panic!("unshare: {error}");
    }
    for line in [
        "link set lo up".to_owned(),
        format!("address add {WORLD_V4}/32 dev lo"),
        format!("address add {WORLD_V6}/128 dev lo nodad"),
    ] {
        let done = Command::new("ip").args(line.split(' ')).status();
        assert!(done.is_ok_and(|status| status.success()), "ip {line}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let common = Common::new();
    let watched = runtime.block_on(async {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, ECHO)).await;
        let listener = listener.expect("the echo port");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = timeout(LIMIT, tokio::io::copy(&mut read, &mut write)).await;
                });
            }
        });
        let socket = UdpSocket::bind((WORLD_V4, ECHO)).await;
        let socket = socket.expect("the echo port");
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let _ = socket.send_to(&buffer[..length], from).await;
            }
        });
        Guest::new(&common)
    });
    World {
        runtime,
        common,
        watched,
    }
}

impl Guest {
    fn new(common: &Arc<Common>) -> Self {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        theirs.set_nonblocking(true).expect("non-blocking");
        let settings = StackSettings {
            vm: "vm-1234abcd".parse().expect("an id"),
            hostname: "supvm-1234".into(),
            egress: Egress::default(),
            checksums: Checksums::Trusted,
        };
        let stack = Stack::start(settings, ours.into(), Arc::clone(common)).expect("a stack");
        let channel = UnixStream::from_std(theirs).expect("a stream");
        Self { stack, channel }
    }

    /// False when the channel is closed.
    async fn send(&mut self, frame: &[u8], connections: &mut Connections) -> bool {
        let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
        bytes.extend(frame);
        self.send_bytes(&bytes, connections).await
    }

    async fn send_bytes(&mut self, mut bytes: &[u8], connections: &mut Connections) -> bool {
        while !bytes.is_empty() {
            match self.channel.try_write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                // It is not looked at before what it has to say was taken.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.take(connections);
                    tokio::task::yield_now().await;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Takes what there is, without waiting, and learns the gateway's sequence numbers.
    fn take(&mut self, connections: &mut Connections) {
        let mut buffer = [0; 65_536];
        while let Ok(count) = self.channel.try_read(&mut buffer) {
            if count == 0 {
                return;
            }
            // Frames may be cut anywhere here: those that are learned from are short and mostly whole.
            if let Some(frame) = buffer.get(4..count) {
                connections.learn(frame);
            }
        }
    }

    /// Whether the gateway answers for its address, after everything that was sent before; false when
    /// the channel is closed.
    async fn answers(&mut self) -> bool {
        let mut question = vec![0, 0, 0, 42];
        question.extend([0xff; 6]);
        question.extend(GUEST_MAC.0);
        question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        question.extend(GUEST_MAC.0);
        question.extend(GUEST_V4.octets());
        question.extend([0; 6]);
        question.extend(GATEWAY_V4.octets());
        if !self
            .send_bytes(&question, &mut Connections::default())
            .await
        {
            return false;
        }
        let mut reader = tokio::io::BufReader::new(&mut self.channel);
        loop {
            let Ok(length) = reader.read_u32().await else {
                return false;
            };
            assert!((1..=65_550).contains(&length), "a frame of {length} bytes");
            let mut frame = vec![0; length as usize];
            if reader.read_exact(&mut frame).await.is_err() {
                return false;
            }
            // A fuzzed question has the same answer.
            if frame.get(12..14) == Some(&[8, 6]) && reader.buffer().is_empty() {
                return true;
            }
        }
    }
}

impl Connections {
    fn learn(&mut self, frame: &[u8]) {
        let at = match frame.get(12..14) {
            Some([8, 0]) if frame.get(23) == Some(&6) => 34,
            Some([0x86, 0xdd]) if frame.get(20) == Some(&6) => 54,
            _ => return,
        };
        let Some(&[_, _, _, port, a, b, c, d, ..]) = frame.get(at..) else {
            return;
        };
        let next = u32::from_be_bytes([a, b, c, d]).wrapping_add(1);
        self.0[usize::from(port) % 4].1 = next;
    }
}

fn ethernet(kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&GATEWAY_MAC.0[..], &GUEST_MAC.0, &kind, payload].concat()
}

fn ipv4(to: Ipv4Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16 + 20).to_be_bytes();
    let mut header = [69, 0, length[0], length[1], 0, 0, 0, 0, 64, next, 0, 0].to_vec();
    header.extend(GUEST_V4.octets());
    header.extend(to.octets());
    let sum: u32 = header
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend(payload);
    ethernet([8, 0], &header)
}

fn ipv6(to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16).to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
    packet.extend(GUEST_V6.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    ethernet([0x86, 0xdd], &packet)
}

/// To the gateway or to the world, by either protocol.
fn ip(whereto: u8, next: u8, payload: &[u8]) -> Vec<u8> {
    match whereto % 4 {
        0 => ipv4(GATEWAY_V4, next, payload),
        1 => ipv4(WORLD_V4, next, payload),
        2 => ipv6(GATEWAY_V6, next, payload),
        _ => ipv6(WORLD_V6, next, payload),
    }
}

/// A segment of one of four connections, near to where the connection is.
fn segment(input: &mut Input<'_>, connections: &mut Connections) -> Vec<u8> {
    let (whereto, which) = (input.byte(), usize::from(input.byte() % 4));
    let (flags, shift) = (input.byte(), input.byte());
    let options = usize::from(input.byte() % 11) * 4;
    let payload = usize::from(input.byte()) * usize::from(input.byte() % 64 + 1);
    let (mine, theirs) = &mut connections.0[which];
    // Mostly where it should be, else a little beside or far away.
    let beside = match shift % 8 {
        0 => 1,
        1 => u32::MAX,
        2 => 0x8000_0000,
        _ => 0,
    };
    let port = if shift & 0x40 == 0 { ECHO } else { 53 };
    let mut bytes = vec![0x10, which as u8];
    bytes.extend(port.to_be_bytes());
    bytes.extend(mine.wrapping_add(beside).to_be_bytes());
    bytes.extend(theirs.wrapping_add(beside).to_be_bytes());
    bytes.extend([((20 + options) as u8) << 2, flags]);
    bytes.extend([input.byte(), input.byte(), 0, 0, 0, input.byte()]);
    let mut room = vec![1; options];
    let given = input.take(options);
    room[..given.len()].copy_from_slice(given);
    bytes.extend(room);
    bytes.extend(vec![9; payload]);
    let advance = payload as u32 + u32::from(flags & 3 != 0);
    *mine = mine.wrapping_add(advance);
    ip(whereto, 6, &bytes)
}

/// One thing that a guest does; false when its channel is closed.
async fn step(guest: &mut Guest, input: &mut Input<'_>, connections: &mut Connections) -> bool {
    let frame = match input.byte() % 12 {
        // A frame of any bytes.
        0 => input
            .take(usize::from(input.0.first().copied().unwrap_or(1)))
            .to_vec(),
        // Bytes that are cut into frames by their own lengths.
        1 => {
            let count = usize::from(input.byte());
            return guest.send_bytes(input.take(count), connections).await;
        }
        // A sound beginning and anything behind it.
        2 => {
            let kind = [[8, 6], [8, 0], [0x86, 0xdd], [0x81, 0]][usize::from(input.byte() % 4)];
            let count = usize::from(input.byte());
            ethernet(kind, input.take(count))
        }
        3 => {
            let (whereto, next, count) = (input.byte(), input.byte(), input.byte());
            ip(whereto, next, input.take(usize::from(count)))
        }
        // A datagram to the name server or to the echo port.
        4 | 5 => {
            let (whereto, count) = (input.byte(), usize::from(input.byte()));
            let port = if whereto & 0x80 == 0 { ECHO as u8 } else { 53 };
            let length = ((count + 8) as u16).to_be_bytes();
            let mut bytes = vec![0, 9, 0, port, length[0], length[1], 0, 0];
            bytes.extend(input.take(count));
            bytes.resize(count + 8, 0);
            ip(whereto, 17, &bytes)
        }
        // The guest reads, and others have their turn.
        6 => {
            for _ in 0..input.byte() % 8 {
                tokio::task::yield_now().await;
                guest.take(connections);
            }
            return true;
        }
        // The edge connects to it.
        7 => {
            let connect = guest.stack.connect(u16::from(input.byte() % 4) | 0x1000);
            let _ = timeout(Duration::from_millis(1), connect).await;
            return true;
        }
        8 => {
            let offline = input.byte() % 2 == 0;
            guest.stack.update(Egress {
                offline,
                ..Egress::default()
            });
            return true;
        }
        _ => segment(input, connections),
    };
    // A length of zero is another step's subject.
    frame.is_empty() || guest.send(&frame, connections).await
}

impl World {
    fn play(&mut self, bytes: &[u8]) {
        let Self {
            runtime,
            common,
            watched,
        } = self;
        runtime.block_on(async {
            let mut guest = Guest::new(common);
            let (mut input, mut connections) = (Input(bytes), Connections::default());
            let mut open = true;
            for _ in 0..MOST_STEPS {
                if input.0.is_empty() || !open {
                    break;
                }
                open = step(&mut guest, &mut input, &mut connections).await;
            }
            let other = timeout(LIMIT, watched.answers()).await;
            assert_eq!(other, Ok(true), "the other VM's stack does not answer");
            let held = guest.stack.counters().open;
            assert!(held <= DEFAULT_CONNECTIONS, "{held} connections");
            // The end of the channel in the middle of a frame is one, too.
            let _ = guest.channel.shutdown().await;
            let drained = async {
                let mut buffer = [0; 65_536];
                while guest
                    .channel
                    .read(&mut buffer)
                    .await
                    .is_ok_and(|count| count > 0)
                {}
                guest.stack.ended().await
            };
            let ended = timeout(LIMIT, drained).await.expect("the stack goes on");
            assert_ne!(ended, Ended::Panicked);
            drop(guest);
            tokio::task::yield_now().await;
            assert_eq!(common.panics(), 0);
            assert_eq!(common.open(), 0, "connections of a VM that is gone");
        });
    }
}

fuzz_target!(|bytes: &[u8]| {
    WORLD.with_borrow_mut(|world| world.get_or_insert_with(prepare).play(bytes));
});
