//! How `sup` says that something went wrong: one line with what failed, why and what to do, then
//! any detail, indented. Words that came from elsewhere cannot drive the terminal.

use client::ClientError;

/// What a command line that is wrong exits with, whatever the command; clap's own number.
const USAGE: u8 = 2;

/// Something to tell the user before leaving.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    what: String,
    why: String,
    advice: String,
    detail: String,
    usage: bool,
}

impl Complaint {
    pub(crate) fn new(what: &str, why: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            why: why.into(),
            advice: String::new(),
            detail: String::new(),
            usage: false,
        }
    }

    pub(crate) fn of(what: &str, error: &ClientError) -> Self {
        Self {
            advice: error.advice().to_owned(),
            detail: error.detail().to_owned(),
            ..Self::new(what, error.to_string())
        }
    }

    pub(crate) fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    pub(crate) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// The command line itself is wrong.
    pub(crate) fn usage(mut self) -> Self {
        self.usage = true;
        self
    }

    /// What to exit with; `failed` when an appliance or a VM is at fault.
    pub(crate) fn code(&self, failed: u8) -> u8 {
        if self.usage { USAGE } else { failed }
    }

    pub(crate) fn print(&self) {
        eprint!("{}", self.text());
    }

    fn text(&self) -> String {
        let mut text = format!("sup: {}: {}", self.what, self.why).replace('\n', " ");
        if !self.advice.is_empty() {
            text.push_str("; ");
            text.push_str(&self.advice);
        }
        text.push('\n');
        for line in self.detail.lines() {
            text.push_str("  ");
            text.push_str(line);
            text.push('\n');
        }
        harmless(&text)
    }
}

/// The text without characters that a terminal would obey.
pub(crate) fn harmless(text: &str) -> String {
    text.chars()
        .map(|letter| match letter {
            '\n' | '\t' => letter,
            _ if letter.is_control() => '\u{fffd}',
            _ => letter,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_one_line_and_its_detail_indented() {
        let text = Complaint::new("creating", "no\nroom")
            .advice("delete one")
            .detail("a\nb\x1b[2J")
            .text();
        assert_eq!(
            text,
            "sup: creating: no room; delete one\n  a\n  b\u{fffd}[2J\n"
        );
    }
}
