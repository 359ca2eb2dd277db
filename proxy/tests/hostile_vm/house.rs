//! A running proxy with two VMs: the test writes the frames of one, and a network namespace is the
//! other.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use protocol::host::proxy::{AttachVm, Count, Counted, FramesLost};
use protocol::network::{Egress, NetworkCounters, Publication, Rule, RuleAction, RuleProtocol};
use protocol::{Kind, Message};
use tokio::io::AsyncWriteExt;

use crate::common::{Control, seqpacket};
use crate::frames::arp;
use crate::net::{Guest, LIMIT, WORLD_V4};
use crate::offload;
use proxy::gateway::address::GATEWAY_V4;

const DIRECTORY: &str = "SUPVM_TEST_PROXY";

/// What the other VM fetches each time.
const FETCHED: usize = 48 << 20;

/// By how much a hostile VM may make proxy grow, in MiB: its buffers and its half-open connections,
/// and what the allocator keeps of them.
const GROWTH: u64 = 64;

/// The process of [`House`].
pub(crate) fn proxy_process() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).expect("started by hand"));
    let control = seqpacket(&directory.join("control"));
    let api = std::os::unix::net::UnixListener::bind(directory.join("api")).unwrap();
    proxy::run(control, api.into()).unwrap();
}

pub(crate) struct House {
    proxy: Child,
    control: Control,
    _directory: tempfile::TempDir,
    guest: Guest,
    channel: UnixStream,
    generation: u64,
    at_least: u64,
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = self.proxy.kill();
        let _ = self.proxy.wait();
    }
}

/// The hostile VM's end of its channel, for a thread that floods.
pub(crate) struct Hostile {
    channel: UnixStream,
    sent: Arc<AtomicU64>,
}

impl Hostile {
    /// Sends frames with one call; false when the channel is closed.
    pub(crate) fn send(&mut self, frames: impl Iterator<Item = Vec<u8>>) -> bool {
        let mut bytes = Vec::new();
        let mut number = 0;
        for frame in frames {
            bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
            bytes.extend(frame);
            number += 1;
        }
        self.sent.fetch_add(number, Ordering::Relaxed);
        self.channel.write_all(&bytes).is_ok()
    }
}

impl House {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let proxy = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "proxy_process"])
            .env(DIRECTORY, directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let control = connected(&directory.path().join("control")).await;
        let (guest, frames) = Guest::with_relay(libc::IFF_VNET_HDR, offload::relay);
        let attach = attach("vm-00000002", 1);
        control.send(&attach, &[frames.as_fd()]).await;
        let (channel, _) = UnixStream::pair().unwrap();
        let mut house = Self {
            proxy,
            control,
            _directory: directory,
            guest,
            channel,
            generation: 0,
            at_least: 0,
        };
        house.attach().await;
        // Once for what every VM costs.
        house.transfer().await;
        house
    }

    /// Gives the hostile VM a new channel, as control does when one was lost.
    pub(crate) async fn attach(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.generation += 1;
        let attach = attach("vm-00000001", self.generation);
        self.control.send(&attach, &[theirs.as_fd()]).await;
        self.channel = ours;
    }

    /// A flood sends at least so many frames.
    pub(crate) fn at_least(&mut self, frames: u64) {
        self.at_least = frames;
    }

    /// Fetches a file from the world for the VM that is not hostile; gives MB/s.
    pub(crate) async fn transfer(&self) -> f64 {
        let listener = tokio::net::TcpListener::bind((WORLD_V4, 0)).await.unwrap();
        let to = listener.local_addr().unwrap();
        let began = Instant::now();
        let fetching = self.guest.run(move || {
            let mut stream = std::net::TcpStream::connect_timeout(&to, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let mut hasher = blake3::Hasher::new();
            let mut buffer = vec![0; 256 << 10];
            loop {
                match stream.read(&mut buffer).unwrap() {
                    0 => return hasher.finalize(),
                    length => hasher.update(&buffer[..length]),
                };
            }
        });
        let content: Vec<u8> = (0..FETCHED).map(|at| (at / 7 % 251) as u8).collect();
        let expected = blake3::hash(&content);
        let serving = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&content).await.unwrap();
        };
        let (got, ()) = tokio::join!(fetching, serving);
        assert_eq!(got, expected, "what came is not what was sent");
        FETCHED as f64 / 1e6 / began.elapsed().as_secs_f64()
    }

    /// Transfers alone and beside a flood of the hostile VM; gives what proxy counted for that one.
    pub(crate) async fn beside(
        &mut self,
        what: &str,
        mut flood: impl FnMut(&mut Hostile) -> bool + Send + 'static,
    ) -> NetworkCounters {
        let alone = self.transfer().await;
        let before = self.memory();
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<AtomicU64>::default(),
        );
        let mut hostile = Hostile {
            channel: self.channel.try_clone().unwrap(),
            sent: Arc::clone(&sent),
        };
        let mut reader = self.channel.try_clone().unwrap();
        // It takes what it is sent, so that nothing slows it down.
        reader
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let stopped = Arc::clone(&stop);
        let taking = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !stopped.load(Ordering::Relaxed) {
                let _ = reader.read(&mut buffer);
            }
        });
        let stopped = Arc::clone(&stop);
        let flooding = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                assert!(flood(&mut hostile), "its channel was closed");
            }
        });
        let mut beside = Vec::new();
        let mut most = 0;
        while beside.len() < 3 || sent.load(Ordering::Relaxed) < self.at_least {
            assert!(!flooding.is_finished(), "the flood has ended");
            beside.push(self.transfer().await);
            most = most.max(self.grown(before));
        }
        let counters = self.count("vm-00000001").await;
        stop.store(true, Ordering::Relaxed);
        // The flood may wait for proxy, which is another process.
        flooding.join().unwrap();
        taking.join().unwrap();
        beside.sort_by(f64::total_cmp);
        report(what, alone, beside[beside.len() / 2], most);
        println!("    {} frames were sent", sent.load(Ordering::Relaxed));
        assert!(self.proxy.try_wait().unwrap().is_none(), "proxy has ended");
        counters
    }

    /// Writes what no channel may carry: it is closed, and control is told.
    pub(crate) async fn violate(&mut self, bytes: &[u8]) {
        self.attach().await;
        self.channel.write_all(bytes).unwrap();
        self.lost().await;
        self.channel.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(self.channel.read(&mut [0]).unwrap(), 0);
    }

    /// Writes anything and leaves, which the channel does not outlive.
    pub(crate) async fn violate_by_leaving(&mut self, bytes: &[u8]) {
        self.attach().await;
        // It may be closed before all is written.
        let _ = self.channel.write_all(bytes);
        self.channel.shutdown(std::net::Shutdown::Both).unwrap();
        self.lost().await;
    }

    /// Waits until control is told that the channel is lost.
    async fn lost(&self) {
        loop {
            let lost: FramesLost = protocol::decode(&self.control.packet().await.frame).unwrap();
            assert_eq!(lost.vm.as_str(), "vm-00000001");
            if lost.generation == self.generation {
                return;
            }
            // The end of the one before may have been seen before it was replaced.
        }
    }

    /// Sends one frame, and takes what comes for it.
    pub(crate) async fn play(&mut self, frame: &[u8]) {
        let frame = &frame[..frame.len().min(65_550)];
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.channel.write_all(&[&length, frame].concat()).unwrap();
        assert!(self.answers().await, "a frame closed the channel");
    }

    /// Whether the hostile VM's stack answers, after everything that was sent before.
    pub(crate) async fn answers(&mut self) -> bool {
        let question = arp(GATEWAY_V4);
        let length = u32::try_from(question.len()).unwrap().to_be_bytes();
        let mut channel = self.channel.try_clone().unwrap();
        channel.set_read_timeout(Some(LIMIT)).unwrap();
        // Where a reader ended within a frame, frames cannot be told apart any more.
        let asking = tokio::task::spawn_blocking(move || {
            channel
                .write_all(&[&length, question.as_slice()].concat())
                .ok()?;
            let mut seen = Vec::new();
            let mut buffer = [0; 65_536];
            loop {
                let number = channel
                    .read(&mut buffer)
                    .ok()
                    .filter(|number| *number > 0)?;
                seen.extend_from_slice(&buffer[..number]);
                // An ARP reply of the gateway (RFC 826).
                let reply = [8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
                if seen.windows(reply.len()).any(|window| window == reply) {
                    return Some(());
                }
            }
        });
        asking.await.unwrap().is_some()
    }

    async fn count(&self, vm: &str) -> NetworkCounters {
        let vm = vm.parse().unwrap();
        self.control.send(&Count { ticket: 9, vm }, &[]).await;
        let frame = self.control.packet().await.frame;
        assert_eq!(frame.kind, Counted::KIND, "{}", Kind::FRAMES_LOST);
        let counted: Counted = protocol::decode(&frame).unwrap();
        counted.counters.unwrap()
    }

    /// What proxy has of memory, in MiB.
    pub(crate) fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.proxy.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.unwrap().split_ascii_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() / 1024
    }

    /// By how much it has grown since.
    pub(crate) fn grown(&self, before: u64) -> u64 {
        let grown = self.memory().saturating_sub(before);
        assert!(grown < GROWTH, "proxy grew by {grown} MiB");
        grown
    }
}

pub(crate) fn report(what: &str, alone: f64, beside: f64, grown: u64) {
    println!(
        "{what}: the other VM fetches {alone:.0} MB/s alone, {beside:.0} beside; proxy grew by {grown} MiB"
    );
}

async fn connected(socket: &Path) -> Control {
    let begun = Instant::now();
    loop {
        match proxy::channel::Channel::connect(socket) {
            Ok(channel) => return Control::new(channel),
            Err(error) => assert!(begun.elapsed() < LIMIT, "no proxy: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn attach(vm: &str, generation: u64) -> AttachVm {
    let label = if vm.ends_with('1') { "a" } else { "b" };
    // The world is in proxy's own namespace, whose addresses are closed without a rule.
    let rule = Rule {
        action: RuleAction::Allow,
        to: WORLD_V4.parse().unwrap(),
        protocol: RuleProtocol::Any,
        ports: (0, 65_535),
    };
    AttachVm {
        vm: vm.parse().unwrap(),
        generation,
        hostname: "supvm-1234".into(),
        subdomain: label.repeat(20).parse().unwrap(),
        egress: Egress {
            rules: vec![rule],
            ..Egress::default()
        },
        publication: Publication::default(),
    }
}

/// An address that neither answers nor refuses: a queue that is full.
pub(crate) struct Silent {
    pub(crate) address: std::net::SocketAddr,
    _listener: tokio::net::TcpListener,
    _queued: Vec<tokio::net::TcpStream>,
}

pub(crate) async fn silent() -> Silent {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    let ip: std::net::IpAddr = WORLD_V4.parse().unwrap();
    socket.bind((ip, 0).into()).unwrap();
    let address = socket.local_addr().unwrap();
    let listener = socket.listen(1).unwrap();
    let mut queued = Vec::new();
    let wait = Duration::from_millis(500);
    while let Ok(Ok(stream)) =
        tokio::time::timeout(wait, tokio::net::TcpStream::connect(address)).await
    {
        queued.push(stream);
    }
    Silent {
        address,
        _listener: listener,
        _queued: queued,
    }
}

/// What the fuzzer has found worth keeping.
pub(crate) fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/gateway");
    let files = std::fs::read_dir(directory).unwrap();
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}
