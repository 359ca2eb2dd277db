//! How fast `sup` is against an appliance on the same machine: the real proxy, a real agent, TLS on
//! loopback. Prints a table and asserts nothing. Set TMPDIR to a tmpfs to leave the disk out:
//!
//!     TMPDIR=/dev/shm cargo bench -p client --bench speed
//!
//! Behind `--`, `commands` or `copies` runs only that half.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use client::protocol::process::{CommandMode, OutputMode, StartProcess, StdinMode};
use client::protocol::{self, FrameReader, Kind};
use client::{Command, new_process_id};
use common::program::bare;
use common::real::Machine;
use common::{TOKEN, VM};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The one of `supvm`: proxy runs in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How often a command is run, and how often a long file copied.
const COMMANDS: usize = 200;
const COPIES: usize = 5;

/// The file's length.
const LONG: usize = 1 << 30;

#[tokio::main]
async fn main() {
    let machine = Machine::start().await;
    let home = tempfile::tempdir().unwrap();
    let ca = home.path().join("ca.pem");
    fs::write(&ca, &machine.appliance.ca_pem).unwrap();
    let sup = Sup {
        home: home.path(),
        tls: machine.appliance.tls(),
        unix: machine.appliance.unix(),
        ca: &ca,
    };
    println!("| What | n | median | 10th to 90th percentile | goal |");
    println!("|---|---|---|---|---|");
    let wanted = |half| std::env::args().any(|given| given == half);
    if !wanted("copies") {
        commands(&machine, &sup).await;
    }
    if !wanted("commands") {
        copies(&machine, &sup).await;
    }
}

/// The program and how it finds the appliance.
struct Sup<'a> {
    home: &'a Path,
    tls: String,
    unix: String,
    ca: &'a Path,
}

impl Sup<'_> {
    async fn run(&self, endpoint: &str, arguments: &[&str]) -> Duration {
        let mut command = bare(self.home);
        command
            .env("SUP_ENDPOINT", endpoint)
            .env("SUP_CA", self.ca)
            .env("SUP_TOKEN", TOKEN)
            .args(arguments);
        let begin = Instant::now();
        let output = command.output().await.unwrap();
        let took = begin.elapsed();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        took
    }
}

/// Takes turns, so that what else the machine does falls on all alike.
async fn commands(machine: &Machine, sup: &Sup<'_>) {
    let vm = machine.vm().await;
    let patch = sup.home.join("patch.js");
    fs::write(&patch, "return 1").unwrap();
    let patch = patch.to_str().unwrap();
    let mut times: [Vec<Duration>; 6] = Default::default();
    for _ in 0..COMMANDS {
        let begin = Instant::now();
        by_hand(machine).await;
        times[0].push(begin.elapsed());
        let begin = Instant::now();
        let mut run = vm.exec(Command::argv(["true"])).await.unwrap();
        while run.next().await.unwrap().is_some() {}
        times[1].push(begin.elapsed());
        times[2].push(sup.run(&sup.unix, &["version"]).await);
        times[3].push(sup.run(&sup.unix, &["exec", VM, "true"]).await);
        times[4].push(sup.run(&sup.tls, &["exec", VM, "true"]).await);
        times[5].push(sup.run(&sup.tls, &["run", patch]).await);
    }
    let agent = median(&mut times[0]);
    let goal = format!("≤ {}", milliseconds(agent + Duration::from_millis(15)));
    let rows = [
        ("`true`, the agent on its socket", ""),
        ("`true`, the library, open connection", ""),
        ("`sup version`: the program's start", ""),
        ("`sup exec VM true`, Unix socket", &goal),
        ("`sup exec VM true`, TLS", &goal),
        ("`sup run` of a script that returns 1", "≤ 20 ms"),
    ];
    for ((what, goal), times) in rows.iter().zip(&mut times) {
        let [low, middle, high] = spread(times).map(milliseconds);
        println!("| {what} | {COMMANDS} | {middle} | {low} to {high} | {goal} |");
    }
}

/// A command without client or appliance.
async fn by_hand(machine: &Machine) {
    let mut stream = UnixStream::connect(machine.agent_socket()).await.unwrap();
    let start = StartProcess {
        id: new_process_id().unwrap(),
        mode: CommandMode::Argv,
        command: vec![b"true".to_vec()],
        cwd: Vec::new(),
        env: Vec::new(),
        stdin: StdinMode::Null,
        output: OutputMode::Follow,
        user: Vec::new(),
        deadline_ms: None,
        memory_bytes: None,
        terminal: None,
    };
    stream
        .write_all(&protocol::encode(&start).unwrap())
        .await
        .unwrap();
    let mut reader = FrameReader::new();
    let mut buffer = vec![0; 4096];
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the agent left");
        let mut rest = &buffer[..count];
        while let Some(frame) = reader.push(&mut rest).unwrap() {
            assert_ne!(frame.kind, Kind::ERROR);
            if frame.kind == Kind::PROCESS_ENDED {
                return;
            }
        }
    }
}

/// Before each copy a file of the same size is written and removed: the memory of a virtual machine
/// that nobody has used for a while is its host's, and asking for it again costs more than the copy.
async fn copies(machine: &Machine, sup: &Sup<'_>) {
    let here = sup.home.join("long");
    let there = machine.workspace().join("long");
    let tree = sup.home.join("tree");
    let bytes: Vec<u8> = (0..LONG).map(|at| (at ^ (at >> 9)) as u8).collect();
    let remote = format!("{VM}:long");
    let text = here.to_str().unwrap();
    let mut times: [Vec<Duration>; 5] = Default::default();
    let warm = || {
        fs::write(sup.home.join("warm"), &bytes).unwrap();
        fs::remove_file(sup.home.join("warm")).unwrap();
    };
    fs::create_dir(&tree).unwrap();
    for _ in 0..COPIES {
        fs::write(&here, &bytes).unwrap();
        warm();
        times[4].push(through_pipes(&here, &sup.home.join("plain")).await);
        warm();
        times[0].push(sup.run(&sup.tls, &["cp", text, &remote]).await);
        fs::remove_file(&here).unwrap();
        warm();
        times[1].push(sup.run(&sup.tls, &["cp", &remote, text]).await);
        assert!(fs::read(&here).unwrap() == bytes);
        fs::remove_file(&there).unwrap();
        fs::rename(&here, tree.join("long")).unwrap();
        let (local, remote) = (tree.to_str().unwrap(), format!("{VM}:tree"));
        warm();
        times[2].push(sup.run(&sup.tls, &["cp", local, &remote]).await);
        let back = sup.home.join("back");
        let arguments = ["cp", &remote, back.to_str().unwrap()];
        warm();
        times[3].push(sup.run(&sup.tls, &arguments).await);
        assert!(fs::read(back.join("long")).unwrap() == bytes);
        fs::remove_dir_all(&back).unwrap();
        fs::remove_dir_all(machine.workspace().join("tree")).unwrap();
    }
    let rows = [
        ("`sup cp` of 1 GiB to the VM, TLS", "≥ 400 MB/s"),
        ("`sup cp` of 1 GiB from the VM, TLS", "≥ 400 MB/s"),
        ("the same in a directory, to the VM", ""),
        ("the same in a directory, from the VM", ""),
        ("`cat FILE | cat | cat >COPY`, for the machine", ""),
    ];
    for ((what, goal), times) in rows.iter().zip(&mut times) {
        let rate = |time: Duration| format!("{:.0} MB/s", LONG as f64 / time.as_secs_f64() / 1e6);
        let [low, middle, high] = spread(times).map(rate);
        println!("| {what} | {COPIES} | {middle} | {high} to {low} | {goal} |");
    }
}

/// What this machine does when three of its own programs hand a file's bytes to each other, as `sup`,
/// the proxy and the agent do, without TLS and checksums.
async fn through_pipes(from: &Path, to: &Path) -> Duration {
    let begin = Instant::now();
    let status = tokio::process::Command::new("sh")
        .args(["-c", "cat -- \"$0\" | cat | cat >\"$1\""])
        .args([from, to])
        .status();
    assert!(status.await.unwrap().success());
    let took = begin.elapsed();
    fs::remove_file(to).unwrap();
    took
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn median(times: &mut [Duration]) -> Duration {
    spread(times)[1]
}

/// The tenth percentile, the median and the ninetieth.
fn spread(times: &mut [Duration]) -> [Duration; 3] {
    times.sort();
    let last = times.len() - 1;
    [last / 10, last / 2, last - last / 10].map(|at| times[at])
}
