//! A command's output on its way into a patch: collected to the end, or piece by piece. Collected
//! output has a bound; what exceeds it is refused with advice, never cut in silence.

use super::Failure;
use super::backend::{Record, Records, Source};
use super::decode::Decoder;

/// The most output that one call returns, merged, in bytes.
pub(super) const MAX_OUTPUT: usize = 256 << 20;
/// What is kept of output that was more than that, of each text.
const KEPT: usize = 1 << 20;

/// Everything a command printed.
#[derive(Default)]
pub(super) struct Collected {
    /// Both, in merged order.
    pub(super) output: String,
    /// Standard output.
    pub(super) stdout: String,
    /// Standard error.
    pub(super) stderr: String,
    /// Bytes that are missing, where the texts have a marker.
    pub(super) dropped: u64,
    decoders: [Decoder; 2],
    too_large: bool,
}

impl Collected {
    /// Takes one more chunk.
    pub(super) fn push(&mut self, source: Source, bytes: &[u8]) -> Result<(), Failure> {
        let text = decoder(&mut self.decoders, source).push(bytes);
        self.add(source, &text)
    }

    /// Notes that bytes are missing here.
    pub(super) fn gap(&mut self, bytes: u64) -> Result<(), Failure> {
        self.dropped = self.dropped.saturating_add(bytes);
        let line = marker(bytes);
        self.output.push_str(&line);
        self.add_to_one(Source::Stdout, &line);
        Ok(())
    }

    /// Keeps the beginning only of what was too much, and says where it was cut.
    pub(super) fn shorten(&mut self) {
        if !self.too_large {
            return;
        }
        for text in [&mut self.output, &mut self.stdout, &mut self.stderr] {
            let end = text.floor_char_boundary(KEPT);
            let dropped = text.len().saturating_sub(end);
            if dropped > 0 {
                text.truncate(end);
                text.push_str(&marker(dropped as u64));
            }
        }
    }

    /// Nothing more comes.
    pub(super) fn finish(&mut self) -> Result<(), Failure> {
        for source in [Source::Stdout, Source::Stderr] {
            let text = decoder(&mut self.decoders, source).finish();
            self.add(source, &text)?;
        }
        Ok(())
    }

    fn add(&mut self, source: Source, text: &str) -> Result<(), Failure> {
        if self.output.len().saturating_add(text.len()) > MAX_OUTPUT {
            self.too_large = true;
            return Err(Failure::Host {
                code: "OUTPUT_TOO_LARGE".into(),
                message: format!(
                    "the command printed more than {} MiB: let it write into a file and download \
                     that, or read it in pieces with execStreaming",
                    MAX_OUTPUT >> 20
                ),
            });
        }
        self.output.push_str(text);
        self.add_to_one(source, text);
        Ok(())
    }

    fn add_to_one(&mut self, source: Source, text: &str) {
        match source {
            Source::Stdout => self.stdout.push_str(text),
            Source::Stderr => self.stderr.push_str(text),
        }
    }
}

/// A reader that a generator draws from.
pub(super) struct Pieces {
    records: Box<dyn Records>,
    only: Option<Source>,
    decoders: [Decoder; 2],
    ended: bool,
}

impl Pieces {
    /// Reads both sources, or one.
    pub(super) fn new(records: Box<dyn Records>, only: Option<Source>) -> Self {
        Self {
            records,
            only,
            decoders: Default::default(),
            ended: false,
        }
    }

    /// The next text that is not empty; none at the end.
    pub(super) fn next(&mut self) -> Result<Option<String>, Failure> {
        while !self.ended {
            let text = match self.records.next()? {
                Record::Data(source, bytes) => {
                    if self.only.is_some_and(|only| only != source) {
                        continue;
                    }
                    decoder(&mut self.decoders, source).push(&bytes)
                }
                Record::Gap(bytes) => marker(bytes),
                Record::Ended(_) | Record::Replayed => {
                    self.ended = true;
                    let [first, second] = &mut self.decoders;
                    first.finish() + &second.finish()
                }
            };
            if !text.is_empty() {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }
}

/// The last `count` lines of a text without their ends; a last line without an end counts.
pub(super) fn last_lines(text: &str, count: usize) -> Vec<String> {
    let mut lines: Vec<String> = text
        .strip_suffix('\n')
        .unwrap_or(text)
        .rsplit('\n')
        .take(count)
        .map(str::to_owned)
        .collect();
    if text.is_empty() {
        lines.clear();
    }
    lines.reverse();
    lines
}

fn decoder(decoders: &mut [Decoder; 2], source: Source) -> &mut Decoder {
    let [stdout, stderr] = decoders;
    match source {
        Source::Stdout => stdout,
        Source::Stderr => stderr,
    }
}

pub(super) fn marker(bytes: u64) -> String {
    format!("[supvm: {bytes} bytes of output were dropped here]\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_decoded_apart_and_merged_in_order() {
        let mut collected = Collected::default();
        let e = "é".as_bytes();
        collected.push(Source::Stdout, e.get(..1).unwrap()).unwrap();
        collected.push(Source::Stderr, b"x").unwrap();
        collected.push(Source::Stdout, e.get(1..).unwrap()).unwrap();
        collected.push(Source::Stderr, b"\xc3").unwrap();
        collected.finish().unwrap();
        assert_eq!(collected.stdout, "é");
        assert_eq!(collected.stderr, "x\u{fffd}");
        assert_eq!(collected.output, "xé\u{fffd}");
    }

    #[test]
    fn last_lines_count_an_unfinished_one() {
        assert_eq!(last_lines("a\nb\nc", 2), ["b", "c"]);
        assert_eq!(last_lines("a\nb\n", 2), ["a", "b"]);
        assert_eq!(last_lines("a\r\n\n", 5), ["a\r", ""]);
        assert!(last_lines("", 3).is_empty());
        assert_eq!(last_lines("\n", 3), [""]);
        assert!(last_lines("a\n", 0).is_empty());
    }
}
