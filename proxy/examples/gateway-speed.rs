//! What the gateway costs, beside slirp4netns and passt (Debian's) in the same run: the same
//! iperf3, the same namespaces, the same MTU, by turns. Needs root and the packages iperf3,
//! slirp4netns and passt; prints a table of medians, with the lowest and the highest.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/net/mod.rs"]
mod net;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use net::{Impairment, WORLD_V4};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::network::Egress;
use proxy::gateway::{Common, Stack};

/// The one of `supvm`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SECONDS: &str = "4";
const ROUNDS: usize = 5;
const ROUND_TRIPS: u32 = 20_000;

/// Ends a program that this one started, and what that one did.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        for pid in children(self.0.id()) {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(line: &str) -> Option<Program> {
    let mut words = line.split(' ');
    let command = Command::new(words.next()?)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    command.ok().map(Program)
}

/// Does something in another namespace.
fn within<T: Send + 'static>(namespace: &OwnedFd, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = namespace.try_clone().unwrap();
    std::thread::spawn(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
    .join()
    .unwrap()
}

/// Bits per second that iperf3's receiver saw, in Gbit/s.
fn iperf(namespace: &OwnedFd, address: &'static str, options: &'static str) -> f64 {
    within(namespace, move || {
        let output = Command::new("iperf3")
            .args(["-J", "-t", SECONDS, "-c", address])
            .args(options.split(' ').filter(|word| !word.is_empty()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let received = text.split("\"sum_received\"").nth(1).unwrap_or_default();
        let bits = received.split("\"bits_per_second\":").nth(1);
        let number = bits.and_then(|rest| rest.split(',').next());
        number
            .and_then(|text| text.trim().parse::<f64>().ok())
            .unwrap_or(f64::NAN)
            / 1e9
    })
}

/// Microseconds of a round trip of one byte: median and 99th percentile.
fn round_trip(namespace: &OwnedFd, address: &'static str, port: u16) -> (f64, f64) {
    within(namespace, move || {
        let mut stream = TcpStream::connect((address, port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut times: Vec<Duration> = (0..ROUND_TRIPS)
            .map(|_| {
                let start = Instant::now();
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        let micros = |index: usize| times[index].as_secs_f64() * 1e6;
        (micros(times.len() / 2), micros(times.len() * 99 / 100))
    })
}

/// One way from a namespace to the servers, and what was measured of it.
struct Path {
    name: &'static str,
    namespace: OwnedFd,
    address: &'static str,
    up: Vec<f64>,
    /// With windows of 256 KiB, without which passt's rate falls to a tenth now and then.
    narrow: Vec<f64>,
    down: Vec<f64>,
    medians: Vec<f64>,
    lasts: Vec<f64>,
    /// What makes it, for as long.
    _programs: Vec<Program>,
}

impl Path {
    fn new(
        name: &'static str,
        namespace: OwnedFd,
        address: &'static str,
        programs: Vec<Program>,
    ) -> Self {
        Self {
            name,
            namespace,
            address,
            up: Vec::new(),
            narrow: Vec::new(),
            down: Vec::new(),
            medians: Vec::new(),
            lasts: Vec::new(),
            _programs: programs,
        }
    }

    fn measure(&mut self, port: u16) {
        let (median, last) = round_trip(&self.namespace, self.address, port);
        self.medians.push(median);
        self.lasts.push(last);
        self.up.push(iperf(&self.namespace, self.address, ""));
        self.narrow
            .push(iperf(&self.namespace, self.address, "-w 256k"));
        self.down.push(iperf(&self.namespace, self.address, "-R"));
    }

    fn report(&mut self) {
        let [up, narrow, down] =
            [&mut self.up, &mut self.narrow, &mut self.down].map(|values| spread(values, 2));
        let [median, last] = [&mut self.medians, &mut self.lasts].map(|values| spread(values, 0));
        println!(
            "| {} | {up} | {narrow} | {down} | {median} | {last} |",
            self.name
        );
    }
}

/// The median with the lowest and the highest.
fn spread(values: &mut [f64], digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (middle, end) = (values.len() / 2, values.len() - 1);
    let [low, median, high] = [0, middle, end].map(|at| values[at]);
    format!("{median:.digits$} ({low:.digits$} to {high:.digits$})")
}

/// A namespace that a program of Debian's connects.
fn peer(name: &'static str, line: impl Fn(u32) -> String) -> Option<Path> {
    let holder = start("unshare --net sleep 1000").expect("unshare and sleep are there");
    std::thread::sleep(Duration::from_millis(300));
    let pid = holder.0.id();
    let program = start(&line(pid))?;
    std::thread::sleep(Duration::from_secs(2));
    let namespace = OwnedFd::from(File::open(format!("/proc/{pid}/ns/net")).unwrap());
    Some(Path::new(name, namespace, WORLD_V4, vec![program, holder]))
}

fn children(pid: u32) -> Vec<Pid> {
    let children = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let numbers = children.split(' ').filter_map(|pid| pid.parse().ok());
    numbers.map(Pid::from_raw).collect()
}

fn echo() -> u16 {
    let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                stream.set_nodelay(true).unwrap();
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            });
        }
    });
    port
}

fn main() {
    // The namespace of this thread is the host's; threads and programs that it starts share it.
    unshare(CloneFlags::CLONE_NEWNET).expect("this needs root");
    for line in [
        "link set lo up",
        "address add 5.5.5.5/32 dev lo",
        // passt wants a way out before it starts.
        "link add out type veth peer name out2",
        "link set out2 up",
        "address add 5.5.6.2/24 dev out",
        "link set out up",
        "route add default via 5.5.6.1",
    ] {
        let status = Command::new("ip").args(line.split(' ')).status().unwrap();
        assert!(status.success(), "ip {line}");
    }
    let _server = start("iperf3 -s");
    let port = echo();
    std::thread::sleep(Duration::from_millis(500));
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let mut paths = Vec::new();
    if wanted("loopback") {
        let host = OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap());
        paths.push(Path::new("loopback", host, WORLD_V4, Vec::new()));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let (guest, channel) = net::Guest::new(Impairment::default());
    let stack = Stack::start(net::settings(Egress::default()), channel, Common::new()).unwrap();
    if wanted("gateway") {
        let namespace = guest.namespace().try_clone().unwrap();
        paths.push(Path::new("gateway", namespace, WORLD_V4, Vec::new()));
    }
    if wanted("slirp4netns") {
        let line = |pid| format!("slirp4netns --configure --mtu=65520 {pid} tap0");
        paths.extend(installed("slirp4netns", peer("slirp4netns", line)));
    }
    if wanted("passt") {
        paths.extend(installed("passt", pasta()));
    }
    for _ in 0..ROUNDS {
        for path in &mut paths {
            path.measure(port);
        }
    }
    println!(
        "| path | guest to host, Gbit/s | the same, windows of 256 KiB | host to guest, Gbit/s | 1-byte round trip, µs | 99 % |"
    );
    println!("|---|---|---|---|---|---|");
    for path in &mut paths {
        path.report();
    }
    drop(stack);
}

fn installed(name: &str, path: Option<Path>) -> Option<Path> {
    if path.is_none() {
        eprintln!("{name} did not start; run ./setup.sh bench");
    }
    path
}

/// passt makes its own namespace, whose first program is the one to look for; and it leads its way
/// out's gateway, not other addresses, to the host's loopback.
fn pasta() -> Option<Path> {
    let pasta = start("pasta -4 --config-net --mtu 65520 --runas 0:0 --foreground sleep 1001")?;
    std::thread::sleep(Duration::from_secs(2));
    let first = *children(pasta.0.id()).first()?;
    let namespace = File::open(format!("/proc/{first}/ns/net")).ok()?;
    Some(Path::new("passt", namespace.into(), "5.5.6.1", vec![pasta]))
}
