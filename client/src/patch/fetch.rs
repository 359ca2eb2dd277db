//! Contents from the web, streamed. Only http and https; an answer that is not 2xx is a failure,
//! and no answer is waited for without end.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::Failure;
use super::interrupt::Interrupt;
use super::media::safe_name;

/// An answer that has begun.
pub(super) struct Fetched {
    /// The content.
    pub(super) body: Box<dyn Read + Send>,
    /// How long it says it is.
    pub(super) size: Option<u64>,
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
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .http_status_as_error(false)
        .user_agent(concat!("sup/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    if interrupt.is_set() {
        return Err(Failure::Interrupted);
    }
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
    Ok(Fetched {
        body: Box::new(Guarded {
            inner: body.into_reader(),
            interrupt: interrupt.clone(),
        }),
        size,
    })
}

/// Writes an answer into a file.
pub(super) fn copy(url: &str, body: &mut dyn Read, file: &mut dyn Write) -> Result<u64, Failure> {
    io::copy(body, file).map_err(|error| {
        if error.kind() == io::ErrorKind::ConnectionAborted {
            Failure::Interrupted
        } else {
            failed(url, &error.to_string())
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

/// Ends a read when someone asked for the end.
struct Guarded<R> {
    inner: R,
    interrupt: Interrupt,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.interrupt.is_set() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.inner.read(buffer)
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
