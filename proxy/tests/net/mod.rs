//! A guest for the gateway without a machine: a network namespace whose only device is a TAP, with
//! the kernel's own TCP/IP behind it. Its frames go through a relay to the frame channel, which can
//! lose, repeat, delay and reorder them. The world is another namespace, in which the stack runs.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    missing_docs,
    unreachable_pub
)]

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use protocol::network::Egress;
use proxy::gateway::{Checksums, Common, Stack, StackSettings};

/// Addresses of the world: public, so that the default rules let the guest reach them.
pub const WORLD_V4: &str = "5.5.5.5";
pub const WORLD_V6: &str = "2600::5";

/// How long anything may take before a test has failed.
pub const LIMIT: Duration = Duration::from_secs(60);

pub fn run(line: &str) {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a test in a namespace of its own that is the world.
pub fn world<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    world_on(tokio::runtime::Builder::new_current_thread(), LIMIT, test);
}

/// The same on another runtime, whose threads are in the namespace as well, or with more time.
pub fn world_on<F: Future<Output = ()>>(
    mut runtime: tokio::runtime::Builder,
    limit: Duration,
    test: impl FnOnce() -> F + Send + 'static,
) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("tests of the gateway need root");
        run("ip link set lo up");
        run(&format!("ip address add {WORLD_V4}/32 dev lo"));
        run(&format!("ip address add {WORLD_V6}/128 dev lo nodad"));
        // Of this namespace alone.
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(limit, test())
                .await
                .expect("the test takes too long")
        });
        runtime.shutdown_background();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What a relay does to frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Impairment {
    pub seed: u64,
    /// Of a thousand frames.
    pub lost: u64,
    pub repeated: u64,
    /// Each frame waits for up to so many milliseconds, so that they overtake one another.
    pub delay: u64,
}

/// A namespace with the kernel's TCP/IP, connected by frames.
pub struct Guest {
    namespace: Arc<OwnedFd>,
    relay: Option<JoinHandle<()>>,
    channel: UnixStream,
    stop: UnixStream,
}

impl Guest {
    /// The guest, and the other end of its frame channel.
    pub fn new(impairment: Impairment) -> (Self, OwnedFd) {
        Self::with_relay(0, move |tap, channel, stop| {
            relay(tap, channel, stop, impairment);
        })
    }

    /// The same with a relay of the test's own, which ends when it hears something from its last
    /// argument or when the channel ends, and with more flags for the TAP device.
    pub fn with_relay(
        flags: i32,
        relay: impl FnOnce(File, UnixStream, UnixStream) + Send + 'static,
    ) -> (Self, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let (namespace, tap) = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let tap = tap(flags);
            for line in [
                "ip link set lo up",
                "ip link set tap0 address 02:73:75:70:00:02 mtu 65520 up",
                "ip address add 10.213.0.2/24 dev tap0",
                "ip address add fd73:7570::2/64 dev tap0 nodad",
                "ip route add default via 10.213.0.1",
                "ip -6 route add default via fd73:7570::1",
            ] {
                run(line);
            }
            std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
            let namespace = OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap());
            (Arc::new(namespace), tap)
        })
        .join()
        .unwrap();
        let channel = ours.try_clone().unwrap();
        let relay = std::thread::spawn(move || relay(tap, ours, stopped));
        let guest = Self {
            namespace,
            relay: Some(relay),
            channel,
            stop,
        };
        (guest, theirs.into())
    }

    /// The namespace.
    pub fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// Does something in the guest.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = Arc::clone(&self.namespace);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            let _ = sender.send(work());
        });
        match receiver.await {
            Ok(result) => result,
            Err(_) => std::panic::resume_unwind(thread.join().unwrap_err()),
        }
    }

    /// Sends an echo request from the guest and returns the data of the reply.
    pub async fn ping(&self, to: std::net::IpAddr, data: Vec<u8>) -> std::io::Result<Vec<u8>> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
        self.run(move || {
            let (family, protocol, kind) = if to.is_ipv4() {
                (AddressFamily::Inet, SockProtocol::Icmp, 8)
            } else {
                (AddressFamily::Inet6, SockProtocol::IcmpV6, 128)
            };
            let socket = socket(family, SockType::Datagram, SockFlag::empty(), protocol)?;
            // The calls are the same as UDP's.
            let socket = std::net::UdpSocket::from(socket);
            socket.set_read_timeout(Some(LIMIT))?;
            socket.connect((to, 0))?;
            socket.send(&[&[kind, 0, 0, 0, 0, 0, 0, 9], data.as_slice()].concat())?;
            let mut buffer = vec![0; 65536];
            let length = socket.recv(&mut buffer)?;
            Ok(buffer[8..length].to_vec())
        })
        .await
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.stop.write_all(b"x");
        // Wakes a relay that waits for the gateway.
        let _ = self.channel.shutdown(std::net::Shutdown::Both);
        if let Some(relay) = self.relay.take() {
            let _ = relay.join();
        }
    }
}

/// A guest with a stack.
pub struct Link {
    // Before the guest: its channel ends first.
    pub stack: Stack,
    pub guest: Guest,
    pub common: Arc<Common>,
}

pub fn settings(egress: Egress) -> StackSettings {
    StackSettings {
        vm: "vm-1234abcd".parse().unwrap(),
        hostname: "supvm-1234".into(),
        egress,
        checksums: Checksums::Real,
    }
}

pub fn link() -> Link {
    link_with(Impairment::default(), Egress::default())
}

pub fn link_with(impairment: Impairment, egress: Egress) -> Link {
    let common = Common::new();
    let (guest, channel) = Guest::new(impairment);
    let stack = Stack::start(settings(egress), channel, Arc::clone(&common)).unwrap();
    Link {
        stack,
        guest,
        common,
    }
}

fn tap(flags: i32) -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an ifreq of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as libc::c_short;
    // SAFETY: the descriptor is a tun device's, the request lives as long as the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    tap
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Frames of one direction that are on their way.
struct Wire {
    random: Random,
    impairment: Impairment,
    under_way: Vec<(Instant, Vec<u8>)>,
}

impl Wire {
    fn new(impairment: Impairment, salt: u64) -> Self {
        Self {
            random: Random(impairment.seed.wrapping_add(salt) | 1),
            impairment,
            under_way: Vec::new(),
        }
    }

    fn put(&mut self, frame: &[u8]) {
        let Impairment {
            lost,
            repeated,
            delay,
            ..
        } = self.impairment;
        if self.random.below(1000) < lost {
            return;
        }
        let copies = if self.random.below(1000) < repeated {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let wait = Duration::from_micros(self.random.below(delay * 1000 + 1));
            self.under_way.push((Instant::now() + wait, frame.to_vec()));
        }
    }

    /// Frames whose time has come, in its order.
    fn due(&mut self) -> Vec<Vec<u8>> {
        let now = Instant::now();
        let (mut due, later): (Vec<_>, Vec<_>) =
            self.under_way.drain(..).partition(|(when, _)| *when <= now);
        self.under_way = later;
        due.sort_by_key(|(when, _)| *when);
        due.into_iter().map(|(_, frame)| frame).collect()
    }

    fn next(&self) -> Option<Duration> {
        let next = self.under_way.iter().map(|(when, _)| *when).min()?;
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }
}

/// Frames as they are: one thread for each direction, many frames with one call.
fn straight(tap: File, channel: UnixStream, stop: UnixStream) {
    let reader = channel.try_clone().unwrap();
    let writer = tap.try_clone().unwrap();
    let back = std::thread::spawn(move || to_tap(writer, reader));
    let (mut tap, mut channel) = (tap, channel);
    let mut buffer = vec![0; 8 << 16];
    loop {
        let mut waits = [
            PollFd::new(tap.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut waits, PollTimeout::NONE).unwrap();
        if waits[1].any().unwrap() {
            break;
        }
        let mut end = 0;
        while buffer.len() - end > 66_000
            && let Ok(length) = tap.read(&mut buffer[end + 4..])
        {
            let prefix = u32::try_from(length).unwrap().to_be_bytes();
            buffer[end..end + 4].copy_from_slice(&prefix);
            end += 4 + length;
        }
        // The gateway has ended; the guest hears nothing more.
        if channel.write_all(&buffer[..end]).is_err() {
            let _ = (&stop).read(&mut [0]);
            break;
        }
    }
    let _ = channel.shutdown(std::net::Shutdown::Both);
    back.join().unwrap();
}

fn to_tap(mut tap: File, mut channel: UnixStream) {
    let mut buffer = vec![0; 8 << 16];
    let mut end = 0;
    while let Ok(length) = channel.read(&mut buffer[end..])
        && length > 0
    {
        end += length;
        let mut start = 0;
        while let Some(prefix) = buffer[..end].get(start..start + 4) {
            let length = u32::from_be_bytes(prefix.try_into().unwrap()) as usize;
            let Some(frame) = buffer[..end].get(start + 4..start + 4 + length) else {
                break;
            };
            // What the guest's kernel does not take is lost.
            let _ = tap.write(frame);
            start += 4 + length;
        }
        buffer.copy_within(start..end, 0);
        end -= start;
    }
}

fn relay(mut tap: File, mut channel: UnixStream, stop: UnixStream, impairment: Impairment) {
    if impairment.lost == 0 && impairment.repeated == 0 && impairment.delay == 0 {
        return straight(tap, channel, stop);
    }
    const WAITING: usize = 1 << 20;
    channel.set_nonblocking(true).unwrap();
    let mut to_channel: Vec<u8> = Vec::new();
    let mut from_channel: Vec<u8> = Vec::new();
    let mut out = Wire::new(impairment, 1);
    let mut back = Wire::new(impairment, 2);
    let mut buffer = vec![0; 1 << 17];
    loop {
        let wait = [out.next(), back.next()].into_iter().flatten().min();
        let timeout = wait.map_or(PollTimeout::NONE, |wait| {
            PollTimeout::try_from(wait).unwrap()
        });
        let (mut tap_wants, mut channel_wants) = (PollFlags::empty(), PollFlags::POLLIN);
        if to_channel.len() < WAITING {
            tap_wants |= PollFlags::POLLIN;
        }
        if !to_channel.is_empty() {
            channel_wants |= PollFlags::POLLOUT;
        }
        let mut waits = [
            PollFd::new(tap.as_fd(), tap_wants),
            PollFd::new(channel.as_fd(), channel_wants),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut waits, timeout).unwrap();
        if waits[2].any().unwrap() {
            return;
        }
        while to_channel.len() < WAITING
            && let Ok(length) = tap.read(&mut buffer)
        {
            out.put(&buffer[..length]);
            if out.under_way.len() > 256 {
                break;
            }
        }
        for frame in out.due() {
            to_channel.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
            to_channel.extend(frame);
        }
        if let Ok(written) = channel.write(&to_channel) {
            to_channel.drain(..written);
        }
        match channel.read(&mut buffer) {
            // The gateway has ended; the guest hears nothing more.
            Ok(0) => {
                let mut end = [0];
                let _ = (&stop).read(&mut end);
                return;
            }
            Ok(length) => from_channel.extend(&buffer[..length]),
            Err(_) => {}
        }
        let mut start = 0;
        while let Some(prefix) = from_channel.get(start..start + 4) {
            let length = u32::from_be_bytes(prefix.try_into().unwrap()) as usize;
            let Some(frame) = from_channel.get(start + 4..start + 4 + length) else {
                break;
            };
            back.put(frame);
            start += 4 + length;
        }
        from_channel.drain(..start);
        for frame in back.due() {
            // What the guest's kernel does not take is lost.
            let _ = tap.write(&frame);
        }
    }
}
