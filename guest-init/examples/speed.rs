//! Measures the agent over a Unix socket beside what the system does without it: the round trip of
//! `true` and the throughput of one command's output. Starts `guest-init` of the same build.
//!
//! `cargo build --release -p guest-init && cargo run --release -p guest-init --example speed`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use protocol::Kind;
use protocol::process::{OutputMode, StartProcess};

const ROUNDS: usize = 500;
const MIB: usize = 1 << 20;

fn main() {
    let agent = common::Agent::start();
    let trips = |run: &dyn Fn()| {
        let mut times: Vec<Duration> = (0..ROUNDS)
            .map(|_| {
                let begin = Instant::now();
                run();
                begin.elapsed()
            })
            .collect();
        times.sort();
        let micros = |at: usize| times[at].as_micros();
        format!(
            "median {} us, 95 % {} us",
            micros(ROUNDS / 2),
            micros(ROUNDS * 95 / 100)
        )
    };
    let through_agent = trips(&|| {
        assert_eq!(agent.run(&common::argv(&["true"])).ended.exit_code, 0);
    });
    println!("true, through the agent   {through_agent}");
    let plain = trips(&|| {
        assert!(Command::new("true").status().unwrap().success());
    });
    println!("true, without it          {plain}");
    let shell = trips(&|| {
        assert_eq!(agent.shell("echo hi").text(), "hi\n");
    });
    println!("sh -c 'echo hi', agent    {shell}");

    for mib in [64, 512] {
        let line = format!("head -c {} /dev/zero", mib * MIB);
        let best = |run: &dyn Fn() -> usize| {
            let best = (0..5)
                .map(|_| {
                    let begin = Instant::now();
                    assert_eq!(run(), mib * MIB);
                    begin.elapsed()
                })
                .min()
                .unwrap();
            format!("{:.2} GiB/s", mib as f64 / 1024.0 / best.as_secs_f64())
        };
        let through_agent = best(&|| read_all(&agent, &common::shell(&line)));
        println!("{mib} MiB, through the agent  {through_agent}");
        let free = best(&|| {
            let mut request = common::shell(&line);
            request.output = OutputMode::Log;
            let id = request.id;
            let mut client = agent.connect();
            client.send(&request);
            client.started();
            agent.wait(id).bytes as usize
        });
        println!("{mib} MiB, log only           {free}");
        let plain = best(&|| {
            let mut child = Command::new("sh")
                .args(["-c", &line])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut out = child.stdout.take().unwrap();
            let mut buffer = vec![0; 64 << 10];
            let mut sum = 0;
            while let count @ 1.. = std::io::Read::read(&mut out, &mut buffer).unwrap() {
                sum += count;
            }
            child.wait().unwrap();
            sum
        });
        println!("{mib} MiB, sh without it      {plain}");
    }
    println!(
        "agent, resident           {} KiB",
        agent.status_kib("VmRSS")
    );
    println!(
        "agent, most resident      {} KiB",
        agent.status_kib("VmHWM")
    );
}

/// Counts a command's output without keeping it.
fn read_all(agent: &common::Agent, request: &StartProcess) -> usize {
    use std::io::Read;
    let mut client = agent.connect();
    client.send(request);
    let mut socket = client.socket.try_clone().unwrap();
    let mut sum = 0;
    let mut body = vec![0; 64 << 10];
    loop {
        let mut head = [0; 7];
        socket.read_exact(&mut head).unwrap();
        let head = protocol::frame::Header::parse(head).unwrap();
        let body = &mut body[..head.length as usize];
        socket.read_exact(body).unwrap();
        match head.kind {
            Kind::STDOUT => sum += body.len(),
            Kind::PROCESS_ENDED => return sum,
            _ => {}
        }
    }
}
