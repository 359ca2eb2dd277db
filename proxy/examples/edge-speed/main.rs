//! What the edge costs, beside nginx (Debian's) in the same run: the same certificate, the same
//! server behind, the same clients, two processors' worth of threads each. Needs root and the
//! packages nginx-light and nghttp2-client; prints a table. Nothing leaves the network namespace that
//! it makes.
//!
//!     cargo run --release --target x86_64-unknown-linux-musl -p proxy --example edge-speed
//!
//! Behind `--`, `requests` or `idle` runs only that half.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clients;
#[path = "../../tests/common/mod.rs"]
#[allow(dead_code)]
mod common;
#[path = "../../tests/net/mod.rs"]
mod net;
#[path = "../../tests/browsers/offload.rs"]
mod offload;
mod peers;
mod servers;

use std::net::SocketAddr;
use std::time::Duration;

use clients::Target;
use peers::{Alone, Nginx, Servers, Whole};

/// The one of `supvm`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// VMs, and idle WebSockets to each, if there are descriptors for so many.
const VMS: usize = 20;
const EACH: usize = 500;

/// Descriptors of each process beside those for WebSockets: the visitors, proxy and the servers need
/// one for each, nginx two over its two workers.
const OTHERS: usize = 1_000;

const ROUNDS: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["alone", directory, address, backend] => peers::alone(directory, address, backend),
        ["whole", directory] => peers::whole(directory),
        ["serve", listeners] => servers::run(listeners),
        _ => net::world_on(
            tokio::runtime::Builder::new_multi_thread(),
            Duration::from_secs(20 * 60),
            measure,
        ),
    }
}

/// As many descriptors as may be had; children have as many. Gives the WebSockets to each VM.
fn many_files() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let enough = 100_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let most = setrlimit(Resource::RLIMIT_NOFILE, enough, enough).map_or(hard, |()| enough);
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let each = (usize::try_from(most).unwrap() - OTHERS) / VMS;
    each.min(EACH)
}

async fn measure() {
    let each = many_files();
    let directory = tempfile::tempdir().unwrap();
    peers::certificate(directory.path());
    let (_servers, backend) = Servers::here();
    println!("| What | edge | nginx | edge / nginx |");
    println!("|---|---|---|---|");
    let wanted = |half| std::env::args().any(|given| given == half);
    if !wanted("idle") {
        let alone = Alone::start(directory.path(), backend).await;
        let nginx = Nginx::start(directory.path(), backend).await;
        let targets = [alone.target(), nginx.target()];
        requests(directory.path(), "", &targets, true).await;
        requests(directory.path(), "", &targets, false).await;
        handshakes(&targets).await;
        drop((alone, nginx));
        let whole = Whole::start(directory.path()).await;
        let nginx = Nginx::start(directory.path(), whole.plug(1).await).await;
        let targets = [whole.target(1), nginx.target()];
        let through = "a VM's stack (nginx: a pair of devices), ";
        requests(directory.path(), through, &targets, true).await;
        requests(directory.path(), through, &targets, false).await;
    }
    if wanted("requests") {
        return;
    }
    let (edge, beside) = {
        let whole = Whole::start(directory.path()).await;
        let grown = idle(whole.address, &whole.names, each, || whole.memory()).await;
        (grown, flood(directory.path(), &whole).await)
    };
    let nginx = {
        let nginx = Nginx::start(directory.path(), backend).await;
        let names = vec![peers::NAME.to_owned(); VMS];
        idle(nginx.address, &names, each, || nginx.memory()).await
    };
    println!(
        "| {} idle WebSockets over {VMS} VMs' stacks (nginx: to one server), each answered at the end | \
         {edge:.0} MiB | {nginx:.0} MiB | {:.2} |",
        VMS * each,
        edge / nginx
    );
    println!("\n| One VM by edge and gateway | alone | beside a VM that floods | alone / beside |");
    println!("|---|---|---|---|");
    let [rates, lasts] = beside;
    row("HTTP/1.1, requests per second", "", rates);
    row("HTTP/1.1, 99th percentile", " ms", lasts);
}

/// Requests to one VM, by turns alone and beside another that sends what it can.
async fn flood(directory: &std::path::Path, whole: &Whole) -> [[Vec<f64>; 2]; 2] {
    let mut values: [[Vec<f64>; 2]; 2] = Default::default();
    for _ in 0..ROUNDS {
        for beside in [false, true] {
            let flood = beside.then(|| whole.flood());
            let (rate, last) = clients::h2load(directory, &whole.target(1), true).await;
            drop(flood);
            values[0][usize::from(beside)].push(rate);
            values[1][usize::from(beside)].push(last);
        }
    }
    values
}

async fn requests(directory: &std::path::Path, through: &str, targets: &[Target; 2], http1: bool) {
    let mut rates = [Vec::new(), Vec::new()];
    let mut lasts = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (index, target) in targets.iter().enumerate() {
            let (rate, last) = clients::h2load(directory, target, http1).await;
            rates[index].push(rate);
            lasts[index].push(last);
        }
    }
    let version = if http1 { "HTTP/1.1" } else { "HTTP/2" };
    row(
        &format!("{through}{version}, requests per second"),
        "",
        rates,
    );
    row(
        &format!("{through}{version}, 99th percentile"),
        " ms",
        lasts,
    );
}

async fn handshakes(targets: &[Target; 2]) {
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (index, target) in targets.iter().enumerate() {
            rates[index].push(clients::handshakes(target).await);
        }
    }
    row("new TLS connections per second, no resumption", "", rates);
}

/// Medians with the lowest and the highest.
fn row(what: &str, unit: &str, mut values: [Vec<f64>; 2]) {
    let mut medians = [0.0; 2];
    let mut cells = Vec::new();
    for (median, values) in medians.iter_mut().zip(&mut values) {
        values.sort_by(f64::total_cmp);
        *median = values[values.len() / 2];
        let digits = if *median < 100.0 { 1 } else { 0 };
        cells.push(format!(
            "{:.digits$}{unit} ({:.digits$} to {:.digits$})",
            median,
            values[0],
            values[values.len() - 1]
        ));
    }
    let ratio = medians[0] / medians[1];
    println!("| {what} | {} | {} | {ratio:.2} |", cells[0], cells[1]);
}

/// Opens idle WebSockets, and says by how many MiB the memory grew. All of them answer at the end.
async fn idle(to: SocketAddr, names: &[String], each: usize, memory: impl Fn() -> f64) -> f64 {
    let before = memory();
    let mut sockets = clients::websockets(to, names, each).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = memory();
    clients::echo(&mut sockets).await;
    after - before
}
