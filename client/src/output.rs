//! What a process says, piece by piece, and how bytes become text when they come in pieces.

use protocol::processes::AttachFrom;

/// Something that happened to a command.
///
/// ```
/// use client::Output;
/// assert_eq!(Output::Stdout(b"ok\n".to_vec()).length(), 3);
/// assert_eq!(Output::Gap { bytes: 4096 }.length(), 4096);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// It runs, with this process identifier inside the VM.
    Started {
        /// For people; it may be reused.
        pid: u32,
    },
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// So many bytes of its output are no longer kept here.
    Gap {
        /// How many.
        bytes: u64,
    },
}

impl Output {
    /// How far it moves the merged offset.
    pub fn length(&self) -> u64 {
        match self {
            Self::Started { .. } => 0,
            Self::Stdout(bytes) | Self::Stderr(bytes) => {
                u64::try_from(bytes.len()).unwrap_or(u64::MAX)
            }
            Self::Gap { bytes } => *bytes,
        }
    }
}

/// A piece of a process's output and its place in all of it.
///
/// ```
/// use client::{Output, Record};
/// let record = Record { offset: 100, output: Output::Stderr(b"oh".to_vec()) };
/// assert_eq!(record.offset + record.output.length(), 102); // where the next one begins
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The merged offset of its first byte: both outputs together, from the process's start.
    pub offset: u64,
    /// What it is.
    pub output: Output,
}

/// Where reading a process's output begins.
///
/// ```no_run
/// # async fn example(process: client::Process) -> Result<(), client::ClientError> {
/// use client::ReadFrom;
/// let all = process.replay(ReadFrom::Oldest).await?;
/// let news = process.follow(ReadFrom::Now).await?;
/// # let _ = (all, news);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// At this merged offset; with a gap first if that is no longer kept.
    Offset(u64),
    /// At the oldest byte that is kept.
    Oldest,
    /// At what comes next.
    Now,
    /// At the beginning of the last so many lines, at most 1 MiB back.
    LastLines(u64),
}

impl ReadFrom {
    pub(crate) fn on_the_wire(self) -> (AttachFrom, u64) {
        match self {
            Self::Offset(offset) => (AttachFrom::Offset, offset),
            Self::Oldest => (AttachFrom::Oldest, 0),
            Self::Now => (AttachFrom::Now, 0),
            Self::LastLines(lines) => (AttachFrom::Lines, lines),
        }
    }
}

/// Makes text of bytes that come in pieces: a character that is cut between two pieces comes out
/// whole, and what is no UTF-8 becomes U+FFFD. One for each source.
///
/// ```
/// let mut decoder = client::Utf8Decoder::default();
/// assert_eq!(decoder.push(b"caf\xc3"), "caf");
/// assert_eq!(decoder.push(b"\xa9 "), "é ");
/// assert_eq!(decoder.finish(), "");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Utf8Decoder {
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Decoder {
    /// The text of what has come, without a character that may go on.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let taken = std::mem::take(&mut self.pending);
        let mut text = String::with_capacity(taken.len());
        let mut chunks = taken.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            if chunks.peek().is_none() && may_go_on(invalid) {
                self.pending = invalid.to_vec();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text
    }

    /// What is left when nothing more comes.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() {
            String::new()
        } else {
            char::REPLACEMENT_CHARACTER.into()
        }
    }
}

/// Whether the bytes are the beginning of a character.
fn may_go_on(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_the_same_however_its_bytes_are_cut() {
        let bytes = b"a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff\xc3z\xf0\x9f\xe2\x82";
        let whole = String::from_utf8_lossy(bytes);
        for cut in 1..=bytes.len() {
            let mut decoder = Utf8Decoder::default();
            let mut text: String = bytes.chunks(cut).map(|piece| decoder.push(piece)).collect();
            text += &decoder.finish();
            assert_eq!(text, whole, "cut into {cut}");
            assert!(decoder.pending.is_empty());
        }
    }
}
