//! Where a request of HTTP/1.1 begins and ends, looked at before hyper sees it. hyper repairs some
//! messages that two readers could understand differently; this refuses them: one framing, said
//! once, or none. Nothing is kept here but the head that is coming in.

use httparse::{EMPTY_HEADER, Status};

/// Most header fields that are parsed at all.
const MOST_FIELDS: usize = 256;

/// Bytes of a line within a chunked body: a chunk's size, or a trailer field.
const CHUNK_LINE: usize = 8 * 1024;

/// Bytes of all trailer fields.
const TRAILERS: usize = 32 * 1024;

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// It is no HTTP/1.1, or its end cannot be told without doubt.
    Bad(&'static str),
    /// Its head is larger than the limit.
    TooLarge,
    /// Its head took longer than the limit.
    Slow,
    /// It asks for a tunnel to somewhere.
    Connect,
}

/// What follows a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
}

/// The length of the head that `bytes` begin with, its empty line included. `from` is how many
/// bytes were looked at before.
pub(crate) fn head_end(bytes: &[u8], from: usize) -> Option<usize> {
    let start = from.saturating_sub(3);
    let mut rest = bytes.get(start..)?;
    let mut at = start;
    while let Some(newline) = rest.iter().position(|byte| *byte == b'\n') {
        let after = newline.saturating_add(1);
        at = at.saturating_add(after);
        rest = rest.get(after..)?;
        match rest {
            [b'\n', ..] => return Some(at.saturating_add(1)),
            [b'\r', b'\n', ..] => return Some(at.saturating_add(2)),
            _ => {}
        }
    }
    None
}

/// Judges a complete head.
pub(crate) fn judge(head: &[u8], most_fields: usize) -> Result<Framing, Malformed> {
    let mut fields = [EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(head) {
        Ok(Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(Malformed::Bad("the head ends in the middle")),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed::TooLarge),
        Err(_) => return Err(Malformed::Bad("this is no HTTP/1.1 request")),
    }
    if request.headers.len() > most_fields {
        return Err(Malformed::TooLarge);
    }
    if request.method == Some("CONNECT") {
        return Err(Malformed::Connect);
    }
    let modern = request.version == Some(1);
    let (mut hosts, mut length, mut chunked) = (0_usize, None, false);
    let mut websocket = false;
    for field in request.headers.iter() {
        if field.name.eq_ignore_ascii_case("host") {
            hosts = hosts.saturating_add(1);
        } else if field.name.eq_ignore_ascii_case("content-length") {
            if length.is_some() {
                return Err(Malformed::Bad("more than one Content-Length"));
            }
            length = Some(content_length(field.value)?);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked {
                return Err(Malformed::Bad("more than one Transfer-Encoding"));
            }
            if !modern || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::Bad("a Transfer-Encoding other than chunked"));
            }
            chunked = true;
        } else if field.name.eq_ignore_ascii_case("upgrade") {
            websocket |= field.value.eq_ignore_ascii_case(b"websocket");
        }
    }
    if websocket && (chunked || length.is_some_and(|length| length > 0)) {
        // Its end would have to be told from the beginning of the WebSocket.
        return Err(Malformed::Bad("a WebSocket with a body"));
    }
    if hosts != 1 {
        return Err(Malformed::Bad("not exactly one Host"));
    }
    match (length, chunked) {
        (Some(_), true) => Err(Malformed::Bad("both Content-Length and Transfer-Encoding")),
        (Some(length), false) => Ok(Framing::Length(length)),
        (None, true) => Ok(Framing::Chunked),
        (None, false) => Ok(Framing::Length(0)),
    }
}

fn content_length(value: &[u8]) -> Result<u64, Malformed> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value)
        .ok()
        .filter(|_| digits)
        .and_then(|text| text.parse().ok())
        .ok_or(Malformed::Bad("a Content-Length that is no number"))
}

/// Follows a chunked body to its end.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    state: Chunk,
    /// Bytes of the line so far.
    line: usize,
    /// Bytes of the trailers so far.
    trailers: usize,
    /// The size that is being read.
    size: u64,
    digits: u8,
    /// The last byte was a carriage return.
    carriage: bool,
    ended: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Chunk {
    /// The digits of a size.
    #[default]
    Size,
    /// What comes after them, to the end of the line.
    Extension,
    /// So many bytes of data.
    Data(u64),
    /// The end of the line after the data.
    DataEnd,
    /// The beginning of a trailer line, or the end of all.
    TrailerStart,
    /// The middle of a trailer line.
    Trailer,
}

impl Chunks {
    /// Follows `bytes`. `Some` is how many of them belong to the body, when it ends in them.
    pub(crate) fn follow(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let mut rest = bytes;
        while let [byte, tail @ ..] = rest {
            if let Chunk::Data(left) = self.state {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                rest = rest.get(here..).unwrap_or_default();
                self.state = match left.saturating_sub(here as u64) {
                    0 => Chunk::DataEnd,
                    left => Chunk::Data(left),
                };
                continue;
            }
            rest = tail;
            self.byte(*byte)?;
            if self.ended {
                return Ok(Some(bytes.len().saturating_sub(rest.len())));
            }
        }
        Ok(None)
    }

    fn byte(&mut self, byte: u8) -> Result<(), Malformed> {
        self.line = self.line.saturating_add(1);
        if self.line > CHUNK_LINE {
            return Err(Malformed::Bad("a line in a chunked body that is too long"));
        }
        // A reader who takes a bare line feed for the end of a line, and one who does not, would
        // disagree about where the body ends.
        let after = std::mem::replace(&mut self.carriage, byte == b'\r');
        if after != (byte == b'\n') {
            return Err(Malformed::Bad("a line in a chunked body without CR LF"));
        }
        match (self.state, byte) {
            (Chunk::Size, byte) if byte.is_ascii_hexdigit() => {
                self.digits = self.digits.saturating_add(1);
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                if self.digits > 16 {
                    return Err(Malformed::Bad("a chunk that is too large"));
                }
                self.size = self.size.wrapping_shl(4) | u64::from(digit);
            }
            (Chunk::Size, _) if self.digits == 0 => {
                return Err(Malformed::Bad("a chunk without a size"));
            }
            (Chunk::Size | Chunk::Extension, b'\n') => {
                self.state = match self.size {
                    0 => Chunk::TrailerStart,
                    size => Chunk::Data(size),
                };
                (self.line, self.size, self.digits) = (0, 0, 0);
            }
            (Chunk::Size, b';' | b' ' | b'\t' | b'\r') => self.state = Chunk::Extension,
            (Chunk::Size, _) => return Err(Malformed::Bad("a chunk's size that is no number")),
            (Chunk::Extension, _) => {}
            (Chunk::DataEnd, b'\r') if self.line == 1 => {}
            (Chunk::DataEnd, b'\n') => (self.state, self.line) = (Chunk::Size, 0),
            (Chunk::DataEnd, _) => return Err(Malformed::Bad("a chunk longer than its size")),
            (Chunk::TrailerStart, b'\r') if self.line == 1 => {}
            (Chunk::TrailerStart, b'\n') => self.ended = true,
            (Chunk::TrailerStart | Chunk::Trailer, byte) => {
                self.trailers = self.trailers.saturating_add(1);
                if self.trailers > TRAILERS {
                    return Err(Malformed::TooLarge);
                }
                self.state = Chunk::Trailer;
                if byte == b'\n' {
                    (self.state, self.line) = (Chunk::TrailerStart, 0);
                }
            }
            (Chunk::Data(_), _) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(fields: &str) -> Result<Framing, Malformed> {
        judge(format!("POST / HTTP/1.1\r\n{fields}\r\n").as_bytes(), 20)
    }

    #[test]
    fn a_head_ends_at_its_first_empty_line_however_it_arrives() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nrest";
        for cut in 0..head.len() {
            let whole = head_end(&head[..cut], 0);
            assert_eq!(whole, (cut >= 27).then_some(27), "{cut}");
            let mut found = None;
            for upto in 1..=cut {
                found = found.or(head_end(&head[..upto], upto - 1));
            }
            assert_eq!(found, whole, "{cut} byte by byte");
        }
        assert_eq!(head_end(b"GET / HTTP/1.1\n\nx", 0), Some(16));
    }

    #[test]
    fn the_length_of_a_request_is_said_once_or_the_request_is_refused() {
        let host = "Host: a\r\n";
        let with = |fields: &str| judged(&format!("{host}{fields}"));
        assert_eq!(with(""), Ok(Framing::Length(0)));
        assert_eq!(with("Content-Length: 5\r\n"), Ok(Framing::Length(5)));
        assert_eq!(with("transfer-encoding: Chunked\r\n"), Ok(Framing::Chunked));
        for bad in [
            "Content-Length: 5\r\nContent-Length: 5\r\n",
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: 5, 5\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: -1\r\n",
            "Content-Length: 0x5\r\n",
            "Content-Length:\r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: \x0bchunked\r\n",
            "Transfer-Encoding : chunked\r\n",
            "Transfer-Encoding:\r\n",
            "X: a\r\n b\r\n",
            " X: a\r\n",
            "X\r\n",
            "Host: b\r\n",
        ] {
            assert!(matches!(with(bad), Err(Malformed::Bad(_))), "{bad:?}");
        }
        assert!(matches!(judged(""), Err(Malformed::Bad(_))), "no Host");
        assert_eq!(with(&"X: y\r\n".repeat(30)), Err(Malformed::TooLarge));
        let old = judge(
            b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            9,
        );
        assert!(matches!(old, Err(Malformed::Bad(_))));
    }

    #[test]
    fn a_chunked_body_ends_at_the_same_byte_however_it_is_cut() {
        for body in [
            &b"0\r\n\r\n"[..],
            b"5\r\nhello\r\n0\r\n\r\n",
            b"5;name=value\r\nhello\r\n00\r\nX: y\r\nZ: 1\r\n\r\n",
            b"A \r\n0123456789\r\n1\r\nx\r\n0\r\n\r\n",
        ] {
            let mut bytes = body.to_vec();
            bytes.extend_from_slice(b"GET ");
            for size in 1..=bytes.len() {
                let mut chunks = Chunks::default();
                let mut before = 0;
                let end = bytes.chunks(size).find_map(|piece| {
                    let end = chunks.follow(piece).unwrap();
                    let end = end.map(|end| before + end);
                    before += piece.len();
                    end
                });
                assert_eq!(end, Some(body.len()), "{size}");
            }
        }
    }

    #[test]
    fn a_chunked_body_that_could_be_read_in_two_ways_is_refused() {
        let follow = |bytes: &[u8]| Chunks::default().follow(bytes);
        for bad in [
            &b"\r\n"[..],
            b"x\r\n",
            b"5\r\nhello!\r\n",
            b"5x\r\n",
            b"-5\r\n",
            b"10000000000000000\r\n",
            b"3\r\nabc\r\r\n",
            b"3\nabc\r\n",
            b"3;a\nabc\r\n",
            b"3\r\nabc\n",
            b"0\r\n\n",
            b"0\r\nX: y\n\r\n",
            b"0\r\nX: y\rZ: 1\r\n\r\n",
        ] {
            assert!(follow(bad).is_err(), "{bad:?}");
        }
        let mut long = b"1;".to_vec();
        long.extend(std::iter::repeat_n(b'a', CHUNK_LINE));
        assert!(follow(&long).is_err());
        let trailers = format!("0\r\n{}", "X: y\r\n".repeat(TRAILERS / 6 + 1));
        assert_eq!(follow(trailers.as_bytes()), Err(Malformed::TooLarge));
    }
}
