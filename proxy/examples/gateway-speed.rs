//! What the gateway costs, beside slirp4netns and passt (Debian's) in the same run: the same
//! iperf3, the same namespaces, the same MTU. Needs root and the packages iperf3, slirp4netns and
//! passt; prints a table.

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
use protocol::network::Egress;
use proxy::gateway::{Common, Stack};

/// The one of `supvm`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SECONDS: &str = "5";
const ROUND_TRIPS: u32 = 20_000;

/// Ends a program that this one started.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
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
fn iperf(namespace: &OwnedFd, address: &'static str, direction: &'static str) -> f64 {
    within(namespace, move || {
        let output = Command::new("iperf3")
            .args(["-J", "-t", SECONDS, "-c", address])
            .args(direction.split(' ').filter(|word| !word.is_empty()))
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

fn report(name: &str, namespace: &OwnedFd, address: &'static str, port: u16) {
    let (median, high) = round_trip(namespace, address, port);
    let up = iperf(namespace, address, "");
    let down = iperf(namespace, address, "-R");
    println!("| {name} | {up:.2} | {down:.2} | {median:.0} | {high:.0} |");
}

/// A namespace that a program of Debian's connects.
fn peer(name: &str, line: impl Fn(u32) -> String, port: u16) {
    let holder = start("unshare --net sleep 1000").expect("unshare and sleep are there");
    std::thread::sleep(Duration::from_millis(300));
    let pid = holder.0.id();
    let Some(_program) = start(&line(pid)) else {
        println!("| {name} | not installed | | | |");
        return;
    };
    std::thread::sleep(Duration::from_secs(2));
    let namespace = OwnedFd::from(File::open(format!("/proc/{pid}/ns/net")).unwrap());
    report(name, &namespace, WORLD_V4, port);
}

/// The namespace of a program's child.
fn child(pid: u32) -> Option<OwnedFd> {
    let children = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(children).ok()?;
    let child = children.split(' ').next()?;
    File::open(format!("/proc/{child}/ns/net"))
        .ok()
        .map(OwnedFd::from)
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
    println!(
        "| path | guest to host, Gbit/s | host to guest, Gbit/s | 1-byte round trip, µs | 99 % |"
    );
    println!("|---|---|---|---|---|");
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    if wanted("loopback") {
        let host = OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap());
        report("loopback", &host, WORLD_V4, port);
    }
    if wanted("gateway") {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let (guest, channel) = net::Guest::new(Impairment::default());
        let stack = Stack::start(net::settings(Egress::default()), channel, Common::new()).unwrap();
        report("gateway", guest.namespace(), WORLD_V4, port);
        println!("{:?}", stack.counters());
        drop(stack);
    }
    if wanted("slirp4netns") {
        let line = |pid| format!("slirp4netns --configure --mtu=65520 {pid} tap0");
        peer("slirp4netns", line, port);
    }
    if wanted("passt") {
        // It makes its own namespace, whose first program is the one to look for; and it leads
        // its way out's gateway, not other addresses, to the host's loopback.
        let pasta = start("pasta -4 --config-net --mtu 65520 --runas 0:0 --foreground sleep 1001");
        std::thread::sleep(Duration::from_secs(2));
        match pasta.as_ref().and_then(|pasta| child(pasta.0.id())) {
            Some(namespace) => report("passt", &namespace, "5.5.6.1", port),
            None => println!("| passt | did not start | | | |"),
        }
    }
}
