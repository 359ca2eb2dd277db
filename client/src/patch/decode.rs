//! Bytes of a command's output made into text: a character that is cut between two chunks comes
//! out whole, and what is no UTF-8 comes out as U+FFFD. It keeps three bytes at most.

/// Decodes one source's bytes as they come.
#[derive(Default)]
pub(super) struct Decoder {
    kept: Vec<u8>,
}

impl Decoder {
    /// The text that is whole so far.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        let joined;
        let mut rest = if self.kept.is_empty() {
            bytes
        } else {
            self.kept.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.kept);
            &joined
        };
        let mut text = String::with_capacity(rest.len());
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = after.get(length..).unwrap_or_default();
                        }
                        None => {
                            self.kept = after.to_vec();
                            return text;
                        }
                    }
                }
            }
        }
    }

    /// What is left when nothing more comes.
    pub(super) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.kept)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_cut_anywhere_comes_out_whole() {
        let text = "aé€😀z";
        for cut in 0..=text.len() {
            let (first, second) = text.as_bytes().split_at(cut);
            let mut decoder = Decoder::default();
            let mut out = decoder.push(first);
            out.push_str(&decoder.push(second));
            out.push_str(&decoder.finish());
            assert_eq!(out, text, "cut at {cut}");
        }
    }

    #[test]
    fn invalid_bytes_become_replacement_characters() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xffb\xe2\x82"), "a\u{fffd}b");
        assert_eq!(decoder.push(b"x"), "\u{fffd}x");
        assert_eq!(decoder.push(b"\xf0\x9f"), "");
        assert_eq!(decoder.finish(), "\u{fffd}");
    }
}
