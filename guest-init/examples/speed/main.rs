//! Measures the agent natively, over a Unix socket, beside what the system does without it in the
//! same run: round trips, output, files up and down on tmpfs and on a disk, many processes at once.
//! Every byte is checked; a lost one ends the program with an error. No time does.
//!
//! `cargo run --release -p guest-init --example speed`

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod content;
mod plain;
mod table;
mod through;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Agent, argv, shell};
use table::{Row, Samples};

const MIB: u64 = 1 << 20;
/// Round trips of one row.
const TRIPS: usize = 200;
/// Output of one command.
const OUTPUT: u64 = 64 * MIB;
/// One transferred file.
const FILE: u64 = 1024 * MIB;
/// Processes at once, and what each of them says.
const CROWD: usize = 200;
const SAYS: u64 = 300_000;

fn main() {
    build_agent();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    // The build's own directory is on a disk.
    let disk = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    table::head();
    let mut peaks = vec![
        ("round trips and 64 MiB of output", commands(memory.path())),
        ("200 processes at once", crowd(memory.path())),
    ];
    for (place, what) in [(memory.path(), "tmpfs"), (disk.path(), "disk")] {
        peaks.push(match what {
            "tmpfs" => ("transfers of 1 GiB, tmpfs", transfers(place, what)),
            _ => ("transfers of 1 GiB, disk", transfers(place, what)),
        });
    }
    println!();
    for (what, kib) in peaks {
        println!("agent's peak memory (VmHWM), {what:<34} {kib:>7} KiB");
    }
}

/// The agent of this build is beside this program, and cargo does not make it for an example.
fn build_agent() {
    let own = std::env::current_exe().unwrap();
    let release = own.components().any(|part| part.as_os_str() == "release");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "-p",
        "guest-init",
        "--bin",
        "guest-init",
    ]);
    if release {
        build.arg("--release");
    } else {
        println!("This is a debug build: the figures mean nothing. Use --release.");
    }
    assert!(build.status().unwrap().success(), "the agent was not built");
}

/// Runs both by turns, so that what the machine does meanwhile concerns both.
fn by_turns(
    rounds: usize,
    mut ours: impl FnMut() -> Duration,
    mut plain: impl FnMut() -> Duration,
) -> (Samples, Samples) {
    let pairs = (0..rounds).map(|_| (ours(), plain())).unzip();
    let (ours, plain): (Vec<_>, Vec<_>) = pairs;
    (Samples::new(ours), Samples::new(plain))
}

fn timed(run: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    run();
    begun.elapsed()
}

fn commands(place: &Path) -> u64 {
    let agent = Agent::start();
    for (what, request) in [("true", argv(&["true"])), ("sh -c true", shell("true"))] {
        let (ours, plain) = by_turns(
            TRIPS,
            || {
                let request = protocol::process::StartProcess {
                    id: shell("").id,
                    ..request.clone()
                };
                timed(|| assert_eq!(agent.run(&request).ended.exit_code, 0))
            },
            || {
                let mut command = match what {
                    "true" => Command::new("true"),
                    _ => plain::shell("true"),
                };
                timed(|| assert!(command.status().unwrap().success()))
            },
        );
        Row::trips(what, &ours, &plain).goal("1.5 ms").print();
    }

    let big = place.join("output");
    content::make(&big, OUTPUT);
    let line = format!("cat {}", big.display());
    let (ours, plain) = by_turns(
        10,
        || timed(|| through::output(&agent, &shell(&line), OUTPUT)),
        || timed(|| plain::output(&line, OUTPUT)),
    );
    let what = "64 MiB of output (cat big)";
    Row::rates(what, OUTPUT, &ours, &plain)
        .goal("1 GiB/s")
        .print();
    std::fs::remove_file(big).unwrap();
    agent.status_kib("VmHWM")
}

fn crowd(place: &Path) -> u64 {
    let agent = Agent::start();
    let file = place.join("crowd");
    content::make(&file, SAYS);
    let line = format!("cat {}", file.display());
    let at_once = |one: &(dyn Fn() + Sync)| {
        timed(|| {
            std::thread::scope(|scope| {
                for _ in 0..CROWD {
                    scope.spawn(one);
                }
            });
        })
    };
    let (ours, plain) = by_turns(
        5,
        || at_once(&|| through::output(&agent, &shell(&line), SAYS)),
        || at_once(&|| plain::output(&line, SAYS)),
    );
    let what = "200 processes at once, 300 kB each";
    Row::trips(what, &ours, &plain).goal("no lost byte").print();
    std::fs::remove_file(file).unwrap();
    agent.status_kib("VmHWM")
}

fn transfers(place: &Path, what: &str) -> u64 {
    let agent = Agent::start();
    let on_disk = what == "disk";
    let files: [PathBuf; 2] = [place.join("ours"), place.join("plain")];
    let [ours_at, plain_at] = &files;
    let goal = |of_disk: &'static str| if on_disk { of_disk } else { "1 GiB/s" };
    // On a disk the checksum is not what takes the time.
    let checksums = if on_disk {
        &[false][..]
    } else {
        &[false, true]
    };
    for &checksum in checksums {
        let with = if checksum { ", BLAKE3" } else { "" };
        let (ours, plain) = by_turns(
            3,
            || {
                let _ = std::fs::remove_file(ours_at);
                timed(|| through::upload(&agent, ours_at, FILE, checksum))
            },
            || {
                let _ = std::fs::remove_file(plain_at);
                timed(|| plain::upload(plain_at, FILE, on_disk))
            },
        );
        content::check_file(ours_at, FILE);
        Row::rates(&format!("upload 1 GiB, {what}{with}"), FILE, &ours, &plain)
            .goal(goal("90 % of plain"))
            .print();
        let (ours, plain) = by_turns(
            3,
            || timed(|| through::download(&agent, ours_at, FILE, checksum)),
            || timed(|| plain::output(&format!("cat {}", plain_at.display()), FILE)),
        );
        Row::rates(
            &format!("download 1 GiB, {what}{with}"),
            FILE,
            &ours,
            &plain,
        )
        .goal(goal("-"))
        .print();
    }
    for file in files {
        std::fs::remove_file(file).unwrap();
    }
    agent.status_kib("VmHWM")
}
