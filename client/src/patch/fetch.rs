//! Contents from the web, streamed. Only http and https; an answer that is not 2xx is a failure, no
//! answer is waited for without end, and none may be longer than [`MOST`]. A thread of its own talks
//! to the server, so that an interrupt ends the wait for one that says nothing.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use super::Failure;
use super::interrupt::Interrupt;
use super::media::safe_name;

/// The longest content, in bytes.
const MOST: u64 = 8 << 30;
/// How long a server may take to begin its answer, and to go on with it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that are passed on at once; a few pieces wait for whoever reads.
const PIECE: usize = 128 << 10;

/// An answer that has begun.
pub(super) struct Fetched {
    /// The content.
    pub(super) body: Box<dyn Read + Send>,
    /// How long it says it is.
    pub(super) size: Option<u64>,
}

/// The content of an address, from its beginning as often as that is asked for: after a lost
/// connection to the appliance the server is asked again.
pub(super) struct Again {
    url: String,
    interrupt: Interrupt,
    body: Box<dyn Read + Send>,
    at: u64,
}

impl Again {
    /// An answer to this address of which `head` has been read.
    pub(super) fn new(
        url: String,
        interrupt: Interrupt,
        head: Vec<u8>,
        body: Box<dyn Read + Send>,
    ) -> Self {
        Self {
            url,
            interrupt,
            body: Box::new(io::Cursor::new(head).chain(body)),
            at: 0,
        }
    }
}

impl Read for Again {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.body.read(buffer)?;
        self.at = self.at.saturating_add(count as u64);
        Ok(count)
    }
}

/// To a place from the beginning only. Whether the server gives the same again is for whoever reads.
impl Seek for Again {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Start(to) = to else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        if to < self.at {
            let fetched = get(&self.url, &self.interrupt).map_err(|failure| match failure {
                Failure::Interrupted => io::ErrorKind::ConnectionAborted.into(),
                failure => io::Error::other(failure),
            })?;
            self.body = fetched.body;
            self.at = 0;
        }
        let skipped = to.saturating_sub(self.at);
        io::copy(&mut self.by_ref().take(skipped), &mut io::sink())?;
        Ok(self.at)
    }
}

/// Whether a text is an address as a whole.
pub(super) fn is_url(text: &str) -> bool {
    ["http://", "https://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme))
        .is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace))
}

/// Asks for an address.
pub(super) fn get(url: &str, interrupt: &Interrupt) -> Result<Fetched, Failure> {
    if interrupt.is_set() {
        return Err(Failure::Interrupted);
    }
    let (sender, news) = sync_channel(4);
    let waker = sender.clone();
    interrupt.on_set(move || {
        // Where there is no room, nobody waits for news.
        let _ = waker.try_send(News::Interrupted);
    });
    let wanted = url.to_owned();
    std::thread::Builder::new()
        .name("fetch".into())
        .spawn(move || {
            if let Err(failure) = talk(&wanted, &sender) {
                let _ = sender.send(News::Failed(failure));
            }
        })
        .map_err(|error| failed(url, &format!("no thread for it: {error}")))?;
    let mut body = Body {
        news,
        piece: io::Cursor::new(Vec::new()),
        over: false,
        interrupt: interrupt.clone(),
    };
    match body.next()? {
        News::Begun(size) => Ok(Fetched {
            body: Box::new(body),
            size,
        }),
        _ => Err(failed(url, "its answer has no beginning")),
    }
}

/// What the thread that talks to the server tells.
enum News {
    /// The answer has begun; how long it says it is.
    Begun(Option<u64>),
    Piece(Vec<u8>),
    End,
    Failed(Failure),
    Interrupted,
}

/// Fetches all of it, as fast as somebody takes it.
fn talk(url: &str, news: &SyncSender<News>) -> Result<(), Failure> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .http_status_as_error(false)
        .user_agent(concat!("sup/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let answer = agent
        .get(url)
        .call()
        .map_err(|error| failed(url, &error.to_string()))?;
    if !answer.status().is_success() {
        return Err(Failure::Host {
            code: format!("HTTP_{}", answer.status().as_u16()),
            message: format!("fetching {url}: the server answered {}", answer.status()),
        });
    }
    let body = answer.into_body();
    let size = body.content_length();
    if size.is_some_and(|size| size > MOST) {
        return Err(too_long(url));
    }
    let mut body = body.into_reader();
    let mut left = MOST;
    if news.send(News::Begun(size)).is_err() {
        return Ok(());
    }
    loop {
        let mut piece = vec![0; PIECE];
        let count = body
            .read(&mut piece)
            .map_err(|error| failed(url, &error.to_string()))?;
        if count == 0 {
            let _ = news.send(News::End);
            return Ok(());
        }
        left = left
            .checked_sub(count as u64)
            .ok_or_else(|| too_long(url))?;
        piece.truncate(count);
        if news.send(News::Piece(piece)).is_err() {
            return Ok(());
        }
    }
}

/// Writes an answer into a file.
pub(super) fn copy(url: &str, body: &mut dyn Read, file: &mut dyn Write) -> Result<u64, Failure> {
    io::copy(body, file).map_err(|error| {
        if error.kind() == io::ErrorKind::ConnectionAborted {
            return Failure::Interrupted;
        }
        match error.downcast() {
            Ok(failure) => failure,
            Err(error) => failed(url, &error.to_string()),
        }
    })
}

/// The file name that an address ends with, if it does.
pub(super) fn name_of(url: &str) -> Option<String> {
    let (_, rest) = url.split_once("://")?;
    let (_, path) = rest.split(['?', '#']).next()?.split_once('/')?;
    let last = path.rsplit('/').next()?;
    safe_name(&percent_decoded(last))
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let code = after
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn failed(url: &str, why: &str) -> Failure {
    Failure::Host {
        code: "FETCH_FAILED".into(),
        message: format!("fetching {url}: {why}"),
    }
}

fn too_long(url: &str) -> Failure {
    let most = MOST >> 30;
    Failure::Host {
        code: "TOO_LARGE".into(),
        message: format!("fetching {url}: it is longer than {most} GiB; fetch it in the VM"),
    }
}

/// The content as it comes. Its errors are failures; of an interrupt it is `ConnectionAborted`.
struct Body {
    news: Receiver<News>,
    piece: io::Cursor<Vec<u8>>,
    over: bool,
    interrupt: Interrupt,
}

impl Body {
    fn next(&mut self) -> Result<News, Failure> {
        if self.interrupt.is_set() {
            return Err(Failure::Interrupted);
        }
        match self.news.recv() {
            Ok(News::Failed(failure)) => Err(failure),
            Ok(News::Interrupted) => Err(Failure::Interrupted),
            Ok(news) => Ok(news),
            Err(_) => Err(Failure::Host {
                code: "BROKEN".into(),
                message: "the fetch broke off: this is a defect of sup".into(),
            }),
        }
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || self.over || buffer.is_empty() {
                return Ok(count);
            }
            match self.next() {
                Ok(News::Piece(piece)) => self.piece = io::Cursor::new(piece),
                Ok(_) => self.over = true,
                Err(Failure::Interrupted) => {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                Err(failure) => return Err(io::Error::other(failure)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_address_is_one() {
        assert!(is_url("https://example.org/a?b"));
        assert!(!is_url("https://example.org/a b"));
        assert!(!is_url("see https://example.org"));
        assert!(!is_url("https://"));
        assert!(!is_url("ftp://example.org/x"));
        assert!(!is_url("https://example.org/\n"));
    }

    #[test]
    fn an_address_names_its_file() {
        assert_eq!(
            name_of("http://h/a/b%20c.png?x=/y").as_deref(),
            Some("b c.png")
        );
        assert_eq!(name_of("http://h/a/"), None);
        assert_eq!(name_of("http://h"), None);
        assert_eq!(name_of("http://h/%2e%2e%2fx%").as_deref(), Some("x%"));
    }
}
