//! Bytes of a program in a VM, in place of answers, on their way to a visitor who takes nothing but
//! the strictest HTTP/1.1: each request has one answer at most, whose end is where the edge says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use protocol::id::{Subdomain, VmId};
use protocol::network::Publication;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::super::Edge;
use super::super::guests::{ConnectError, Guest, Guests, Refusal};
use super::super::limits::Limits;
use super::{HOST, Program, Stop, broken, connect, field, piece_size, run};

/// What an input writes between two answers.
const NEXT: &[u8] = b"@N";

/// How often other tasks go on before a program that said all it has to say ends its connection.
const TURNS: usize = 60;

const METHODS: [&str; 4] = ["GET", "HEAD", "GET", "DELETE"];

/// One VM, whose programs answer with what an input says, whatever they are asked.
#[derive(Debug)]
struct Hostile {
    answers: Arc<Mutex<VecDeque<Vec<u8>>>>,
    size: usize,
}

impl Guests for Hostile {
    type Stream = DuplexStream;

    async fn publication(&self, _: &Subdomain) -> Result<Publication, Refusal> {
        Ok(Publication::default())
    }

    async fn find(&self, _: &Subdomain) -> Result<Guest, Refusal> {
        Ok(Guest {
            vm: VmId::from_random([1; 8]),
            generation: 1,
            publication: Publication::default(),
            requests: Arc::default(),
        })
    }

    async fn connect(&self, _: &Guest, _: u16) -> Result<DuplexStream, ConnectError> {
        if self.answers.lock().unwrap().is_empty() {
            return Err(ConnectError::Refused);
        }
        let (edge, program) = duplex(16 * 1024);
        tokio::spawn(speak(program, Arc::clone(&self.answers), self.size));
        Ok(edge)
    }

    async fn ended(&self, _: &Guest) {
        std::future::pending().await
    }
}

/// One connection: an answer for whatever comes in, until there is none left or nothing comes in.
async fn speak(mut stream: DuplexStream, answers: Arc<Mutex<VecDeque<Vec<u8>>>>, size: usize) {
    loop {
        let mut request = [0; 4096];
        let reading = async {
            for _ in 0..TURNS {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            read = stream.read(&mut request) => if !matches!(read, Ok(1..)) { return },
            () = reading => return,
        }
        let Some(answer) = answers.lock().unwrap().pop_front() else {
            return;
        };
        for piece in answer.chunks(size) {
            if stream.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Reads the answer to a request; says whether another may follow.
async fn answer(visitor: &mut Program, method: &str) -> Result<bool, Stop> {
    let line = visitor.line().await?;
    let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| {
        let (status, _reason) = rest.split_once(' ')?;
        status.parse::<u16>().ok()
    });
    // Nobody asked to upgrade or to be told to go on.
    let Some(status @ 200..=999) = status else {
        return broken("a status line", &line);
    };
    let (mut length, mut chunked, mut close) = (None, false, false);
    loop {
        let line = visitor.line().await?;
        if line.is_empty() {
            break;
        }
        if line.bytes().any(|byte| byte < b' ' && byte != b'\t') {
            return broken("a field", &line);
        }
        let (name, value) = field(&line)?;
        match name.as_str() {
            _ if line.split(':').next().is_some_and(|raw| raw.contains('_')) => {}
            "content-length" => {
                if length.is_some() || value.is_empty() || !value.bytes().all(super::digit) {
                    return broken("a length", &line);
                }
                let Ok(number) = value.parse::<u64>() else {
                    return broken("a length", &line);
                };
                length = Some(number);
            }
            "transfer-encoding" => {
                if chunked || value != "chunked" {
                    return broken("an encoding", &line);
                }
                chunked = true;
            }
            "connection" => {
                if value != "close" {
                    return broken("a connection's field", &line);
                }
                close = true;
            }
            "keep-alive" | "proxy-connection" | "upgrade" => {
                return broken("a connection's field", &line);
            }
            _ => {}
        }
    }
    if chunked && length.is_some() {
        return broken("two lengths", &line);
    }
    if method != "HEAD" && status != 204 && status != 304 {
        if chunked {
            visitor.chunks(&[]).await?;
        } else if let Some(length) = length {
            visitor.skip(length).await?;
        } else if !close {
            return broken("a body without an end", &line);
        } else {
            loop {
                visitor.more().await?;
            }
        }
    }
    Ok(!close)
}

/// What a VM's program answers to four requests on one connection. Gives how many answers the visitor
/// had whole.
pub fn answers(bytes: &[u8]) -> usize {
    let Some((size, mut rest)) = bytes.split_first() else {
        return 0;
    };
    let mut all = VecDeque::new();
    while let Some(at) = rest.windows(NEXT.len()).position(|here| here == NEXT) {
        all.push_back(rest[..at].to_vec());
        rest = &rest[at + NEXT.len()..];
    }
    all.push_back(rest.to_vec());
    run(visit(all, piece_size(*size)))
}

async fn visit(all: VecDeque<Vec<u8>>, size: usize) -> usize {
    let guests = Arc::new(Hostile {
        answers: Arc::new(Mutex::new(all)),
        size,
    });
    let edge = Edge::new(guests, Limits::default());
    let (ours, serving) = connect(&edge);
    let mut visitor = Program::new(ours, Arc::default());
    let visiting = async move {
        for (number, method) in METHODS.iter().enumerate() {
            let last = number + 1 == METHODS.len();
            let close = if last { "Connection: close\r\n" } else { "" };
            let request = format!("{method} /{number} HTTP/1.1\r\nHost: {HOST}\r\n{close}\r\n");
            if visitor.write(request.as_bytes()).await.is_err() {
                return number;
            }
            match answer(&mut visitor, method).await {
                Ok(true) if !last => {}
                Ok(_) => {
                    // What follows belongs to nothing.
                    if let Ok(()) = visitor.more().await {
                        panic!("bytes after the end: {:?}", visitor.read);
                    }
                    assert!(visitor.read.is_empty(), "{:?}", visitor.read);
                    return number + 1;
                }
                Err(Stop::Ended) => return number,
                Err(Stop::Broken(why)) => panic!("{why}"),
            }
        }
        METHODS.len()
    };
    let ((), whole) = tokio::join!(serving, visiting);
    assert_eq!(edge.panics(), 0, "a task panicked");
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDS: [&str; 10] = [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n5;e=f\r\nhello\r\n0\r\nX: y\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\nuntil the end",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nx",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nho",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200\r\nKeep-Alive: timeout=5\r\nX: a\r\n b\r\nConnection: X, content-length\r\n\r\n",
    ];

    const PIECES: [&str; 16] = [
        "\r\n",
        "\n",
        "\r",
        "\0",
        " ",
        ":",
        "0\r\n\r\n",
        "@N",
        "Content-Length: 3\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Connection: close\r\n",
        "HTTP/1.1 200 OK\r\n\r\n",
        "\u{b}",
        "\t",
    ];

    #[test]
    fn a_strict_visitor_has_one_whole_answer_for_each_request_or_an_end() {
        let plain = SEEDS[0];
        let four = format!(
            "\u{7f}{plain}@NHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n@N{plain}@N{plain}"
        );
        assert_eq!(answers(four.as_bytes()), 4);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut whole = 0;
        for _ in 0..2_000 {
            let mut input = vec![random(256) as u8];
            for _ in 0..=random(4) {
                input.extend_from_slice(SEEDS[random(SEEDS.len())].as_bytes());
                if random(3) > 0 {
                    input.extend_from_slice(NEXT);
                }
            }
            for _ in 0..random(4) {
                let at = 1 + random(input.len() - 1);
                let upto = (at + random(4)).min(input.len());
                let piece = match random(3) {
                    0 => "",
                    _ => PIECES[random(PIECES.len())],
                };
                input.splice(at..upto, piece.bytes());
            }
            whole += answers(&input);
        }
        assert!(whole > 2_000, "only {whole} answers were whole");
    }
}
