//! What fuzz targets reach of the edge: bytes of a visitor, through the shipped check, hyper and
//! the way to the guest, to a program that takes nothing but the strictest HTTP/1.1. It must never
//! read two requests where the edge sent one. The other way round is in `answers`. Only cargo-fuzz and
//! tests compile it.

#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod answers;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protocol::id::{Subdomain, VmId};
use protocol::network::Publication;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::guests::{ConnectError, Guest, Guests, Refusal};
use super::limits::Limits;
use super::{Edge, Names, connection};

pub use answers::answers;

const LABEL: &str = "abcdefghijklmnopqrst";
const HOST: &str = "abcdefghijklmnopqrst.vm.test";
const PEER: &str = "192.0.2.9";

/// What an input writes for [`HOST`].
const HOST_MARK: &[u8] = b"@H";

/// How long an input may take.
const PATIENCE: Duration = Duration::from_secs(8);

/// One VM, on whose every port the strict program listens.
#[derive(Debug, Default)]
struct Strict {
    requests: Arc<AtomicU64>,
    heads: Arc<AtomicUsize>,
    broken: Arc<Mutex<Option<String>>>,
}

impl Guests for Strict {
    type Stream = DuplexStream;

    async fn publication(&self, _: &Subdomain) -> Result<Publication, Refusal> {
        Ok(Publication::default())
    }

    async fn find(&self, subdomain: &Subdomain) -> Result<Guest, Refusal> {
        if subdomain.to_string() != LABEL {
            return Err(Refusal::Unknown);
        }
        Ok(Guest {
            vm: VmId::from_random([1; 8]),
            generation: 1,
            publication: Publication::default(),
            requests: Arc::clone(&self.requests),
        })
    }

    async fn connect(&self, _: &Guest, _: u16) -> Result<DuplexStream, ConnectError> {
        let (edge, program) = duplex(16 * 1024);
        let (heads, broken) = (Arc::clone(&self.heads), Arc::clone(&self.broken));
        tokio::spawn(async move {
            if let Err(why) = (Program::new(program, heads)).serve().await {
                *broken.lock().unwrap() = Some(why);
            }
        });
        Ok(edge)
    }

    async fn ended(&self, _: &Guest) {
        std::future::pending().await
    }
}

/// The program: one connection of it. Also a visitor, who reads as strictly.
struct Program {
    stream: DuplexStream,
    read: Vec<u8>,
    heads: Arc<AtomicUsize>,
}

/// Why a program stopped reading.
enum Stop {
    /// The connection ended, which the edge may do at any time.
    Ended,
    Broken(String),
}

impl Program {
    fn new(stream: DuplexStream, heads: Arc<AtomicUsize>) -> Self {
        Self {
            stream,
            read: Vec::new(),
            heads,
        }
    }

    /// Answers requests, until something is not what the edge may send.
    async fn serve(mut self) -> Result<(), String> {
        loop {
            match self.request().await {
                Ok(()) => {}
                Err(Stop::Ended) => return Ok(()),
                Err(Stop::Broken(why)) => return Err(why),
            }
        }
    }

    async fn request(&mut self) -> Result<(), Stop> {
        let line = self.line().await?;
        let parts: Vec<&str> = line.split(' ').collect();
        let [method, target, "HTTP/1.1"] = parts[..] else {
            return broken("a request line", &line);
        };
        let star = target == "*" && method == "OPTIONS";
        if !method.bytes().all(token) || !(target.starts_with('/') || star) {
            return broken("a method or a target", &line);
        }
        let (mut hosts, mut addresses, mut length, mut chunked) = (0, 0, None, false);
        let mut expects = false;
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                break;
            }
            let (name, value) = field(&line)?;
            // Programs that take `_` for `-` do so for claims, not for where a request ends.
            let claim = name.starts_with("x-") || name == "forwarded";
            match name.as_str() {
                _ if !claim && line.split(':').next().is_some_and(|raw| raw.contains('_')) => {}
                "host" => {
                    hosts += 1;
                    let name = value.rsplit_once(':').map_or(value, |(name, _)| name);
                    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
                    let plain = name
                        .split_once('-')
                        .map_or(name.as_str(), |(_, plain)| plain);
                    if plain != HOST {
                        return broken("a Host", &line);
                    }
                }
                "x-forwarded-for" => {
                    addresses += 1;
                    if value != PEER {
                        return broken("an address", &line);
                    }
                }
                "x-real-ip" | "forwarded" | "x-supvm-token" => return broken("a claim", &line),
                "content-length" => {
                    if length.is_some() || value.is_empty() || !value.bytes().all(digit) {
                        return broken("a length", &line);
                    }
                    length = Some(value.parse::<u64>().unwrap());
                }
                "transfer-encoding" => {
                    if chunked || value != "chunked" {
                        return broken("an encoding", &line);
                    }
                    chunked = true;
                }
                "expect" => expects = value.eq_ignore_ascii_case("100-continue"),
                _ => {}
            }
        }
        if hosts != 1 || addresses != 1 || (chunked && length.is_some()) {
            return broken("the fields of", &line);
        }
        self.heads.fetch_add(1, Ordering::Relaxed);
        if expects && (chunked || length.is_some_and(|length| length > 0)) {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        if chunked {
            let claims = ["x-forwarded-", "x-real-ip", "forwarded", "x-supvm-", "host"];
            self.chunks(&claims).await?;
        } else {
            self.skip(length.unwrap_or(0)).await?;
        }
        self.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            .await
    }

    /// A chunked body, in whose trailers nothing begins as `forbidden` says.
    async fn chunks(&mut self, forbidden: &[&str]) -> Result<(), Stop> {
        loop {
            let line = self.line().await?;
            let Ok(size) = u64::from_str_radix(&line, 16) else {
                return broken("a chunk's size", &line);
            };
            if size == 0 {
                break;
            }
            self.skip(size).await?;
            let end = self.line().await?;
            if !end.is_empty() {
                return broken("the end of a chunk", &end);
            }
        }
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(());
            }
            let (name, _) = field(&line)?;
            if forbidden.iter().any(|claim| name.starts_with(claim)) {
                return broken("a trailer", &line);
            }
        }
    }

    /// A line that ends in CR LF and has neither within.
    async fn line(&mut self) -> Result<String, Stop> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let rest = self.read.split_off(end + 1);
                let line = std::mem::replace(&mut self.read, rest);
                let text = String::from_utf8_lossy(&line).into_owned();
                let Some(text) = text.strip_suffix("\r\n") else {
                    return broken("the end of a line", &text);
                };
                if text.contains(['\r', '\0']) {
                    return broken("a line", text);
                }
                return Ok(text.to_owned());
            }
            self.more().await?;
        }
    }

    async fn skip(&mut self, mut left: u64) -> Result<(), Stop> {
        while left > 0 {
            if self.read.is_empty() {
                self.more().await?;
            }
            let here = usize::try_from(left).unwrap().min(self.read.len());
            self.read.drain(..here);
            left -= here as u64;
        }
        Ok(())
    }

    async fn more(&mut self) -> Result<(), Stop> {
        match self.stream.read_buf(&mut self.read).await {
            Ok(0) | Err(_) => Err(Stop::Ended),
            Ok(_) if self.read.len() > 256 * 1024 => broken("a line that is too long", ""),
            Ok(_) => Ok(()),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        self.stream.write_all(bytes).await.map_err(|_| Stop::Ended)
    }
}

fn broken<T>(what: &str, line: &str) -> Result<T, Stop> {
    Err(Stop::Broken(format!(
        "{what} that the edge must not send: {line:?}"
    )))
}

/// The name, in lower case and with `-` for `_`, and the value.
fn field(line: &str) -> Result<(String, &str), Stop> {
    match line.split_once(": ") {
        Some((name, value)) if !name.is_empty() && name.bytes().all(token) => {
            Ok((name.to_ascii_lowercase().replace('_', "-"), value))
        }
        // hyper writes an empty value so.
        _ => match line.strip_suffix(':') {
            Some(name) if !name.is_empty() && name.bytes().all(token) => {
                Ok((name.to_ascii_lowercase().replace('_', "-"), ""))
            }
            _ => broken("a field", line),
        },
    }
}

fn token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn digit(byte: u8) -> bool {
    byte.is_ascii_digit()
}

/// What a visitor sends, in pieces whose size the first byte says. Gives how many requests reached
/// the program.
pub fn visitor(bytes: &[u8]) -> usize {
    let Some((size, bytes)) = bytes.split_first() else {
        return 0;
    };
    let mut said = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest
        .windows(HOST_MARK.len())
        .position(|here| here == HOST_MARK)
    {
        said.extend_from_slice(&rest[..at]);
        said.extend_from_slice(HOST.as_bytes());
        rest = &rest[at + HOST_MARK.len()..];
    }
    said.extend_from_slice(rest);
    run(serve(&said, piece_size(*size)))
}

/// How many bytes are written at a time, of an input's first byte.
fn piece_size(byte: u8) -> usize {
    match byte {
        0..=127 => usize::from(byte) + 1,
        _ => 16 * 1024,
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let served = tokio::time::timeout(PATIENCE, future).await;
        served.expect("the edge hangs")
    })
}

/// A visitor's connection by HTTP/1.1, and what serves it.
fn connect<G: Guests>(edge: &Edge<G>) -> (DuplexStream, impl Future<Output = ()> + use<G>) {
    *edge.core.names.write().unwrap() = Arc::new(Names {
        domain: "vm.test".into(),
        public_port: 443,
        root: None,
        custom: std::collections::HashMap::new(),
    });
    let peer: SocketAddr = format!("{PEER}:1").parse().unwrap();
    let place = edge.core.places.take(peer.ip()).unwrap();
    let (ours, theirs) = duplex(16 * 1024);
    let core = Arc::clone(&edge.core);
    let serving = connection::speak(core, theirs, false, None, peer, place);
    (ours, serving)
}

async fn serve(said: &[u8], size: usize) -> usize {
    let guests = Arc::new(Strict::default());
    let limits = Limits {
        expect: Duration::from_millis(1),
        ..Limits::default()
    };
    let edge = Edge::new(Arc::clone(&guests), limits);
    let (ours, serving) = connect(&edge);
    let (mut hears, mut says) = tokio::io::split(ours);
    let speaking = async {
        for piece in said.chunks(size) {
            if says.write_all(piece).await.is_err() {
                break;
            }
        }
        // hyper takes the end for the visitor's leaving: what was asked for is answered before.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let _ = says.shutdown().await;
    };
    let hearing = async {
        let mut piece = [0; 4096];
        while hears.read(&mut piece).await.is_ok_and(|count| count > 0) {}
    };
    tokio::join!(serving, speaking, hearing);
    // What is still on its way to the program arrives.
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    if let Some(why) = guests.broken.lock().unwrap().take() {
        panic!("{why}");
    }
    assert_eq!(edge.panics(), 0, "a task panicked");
    let heads = guests.heads.load(Ordering::Relaxed);
    let sent = guests.requests.load(Ordering::Relaxed);
    assert!(heads as u64 <= sent, "{heads} requests of {sent}");
    heads
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDS: [&str; 8] = [
        "GET /a HTTP/1.1\r\nHost: @H\r\n\r\n",
        "POST /b?c HTTP/1.1\r\nHost: @H\r\nContent-Length: 5\r\n\r\nhello",
        "PUT /d HTTP/1.1\r\nHost: 80-@H:443\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\
         Trailer: X\r\n\r\n5;e=f\r\nhello\r\n0\r\nX: y\r\n\r\n",
        "POST /g HTTP/1.1\r\nHost: @H\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
        "GET /h HTTP/1.1\r\nHost: @H\r\nConnection: upgrade, host\r\nUpgrade: websocket\r\n\r\n",
        "POST /i HTTP/1.0\r\nHost: @H\r\nConnection: keep-alive\r\nX_Forwarded-For: 1\r\n\
         Content-Length: 1\r\n\r\n ",
        // A body that looks like a request, and a trailer that looks like a claim.
        "POST /j HTTP/1.1\r\nHost: @H\r\nContent-Length: 55\r\n\r\n\
         GET /k HTTP/1.1\r\nHost: @H\r\n\r\n",
        "POST /l HTTP/1.1\r\nHost: @H\r\nTransfer-Encoding: chunked\r\nTrailer: X-Forwarded-By\r\n\
         \r\n1\r\nx\r\n0\r\nX-Forwarded-By: z\r\n\r\n",
    ];

    const PIECES: [&str; 16] = [
        "\r\n",
        "\n",
        "\r",
        "\0",
        " ",
        ":",
        "0\r\n\r\n",
        "0\r\n\n",
        "Content-Length: 3\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "X-Forwarded-For: 1\r\n",
        "Connection: close\r\n",
        "Trailer: X-Real-IP\r\n",
        "HEAD",
        "\t",
    ];

    #[test]
    fn a_strict_program_never_reads_what_the_edge_did_not_send() {
        for seed in SEEDS {
            let mut input = vec![3];
            input.extend_from_slice(seed.as_bytes());
            assert_eq!(visitor(&input), 1, "{seed}");
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut reached = 0;
        for _ in 0..2_000 {
            let mut input = vec![random(256) as u8];
            for _ in 0..=random(3) {
                input.extend_from_slice(SEEDS[random(SEEDS.len())].as_bytes());
            }
            for _ in 0..random(4) {
                if random(3) == 0 {
                    // A line without its CR.
                    let returns: Vec<usize> =
                        (1..input.len()).filter(|at| input[*at] == b'\r').collect();
                    if !returns.is_empty() {
                        input.remove(returns[random(returns.len())]);
                    }
                    continue;
                }
                let at = 1 + random(input.len() - 1);
                let upto = (at + random(4)).min(input.len());
                let piece = match random(3) {
                    0 => "",
                    _ => PIECES[random(PIECES.len())],
                };
                input.splice(at..upto, piece.bytes());
            }
            reached += visitor(&input);
        }
        assert!(
            reached > 2_000,
            "only {reached} requests reached the program"
        );
    }
}
