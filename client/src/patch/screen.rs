//! What a patch says while it runs: one status line that is redrawn on a terminal, lines
//! elsewhere. What it says never moves the cursor: control characters are taken out of the status.

use std::io::Write;

use unicode_width::UnicodeWidthChar;

/// Where a patch's status and console go; results do not come here.
///
/// ```
/// use client::patch::Screen;
/// let mut screen = Screen::terminal(Box::new(std::io::sink()), 80);
/// screen.status("working");
/// screen.log("a line above the status");
/// screen.clear();
/// ```
pub struct Screen {
    out: Box<dyn Write>,
    /// The width of the terminal, when it is one.
    columns: Option<usize>,
    status: String,
    drawn: bool,
}

impl Screen {
    /// Lines one below the other.
    pub fn lines(out: Box<dyn Write>) -> Self {
        Self::new(out, None)
    }

    /// A terminal of so many columns.
    pub fn terminal(out: Box<dyn Write>, columns: usize) -> Self {
        Self::new(out, Some(columns))
    }

    fn new(out: Box<dyn Write>, columns: Option<usize>) -> Self {
        Self {
            out,
            columns,
            status: String::new(),
            drawn: false,
        }
    }

    /// Shows where the patch is.
    pub fn status(&mut self, text: &str) {
        match self.columns {
            Some(columns) => {
                let shown = one_line(text, columns.saturating_sub(1));
                if self.drawn && shown == self.status {
                    return;
                }
                let _ = write!(self.out, "\r\x1b[2K{shown}");
                self.status = shown;
                self.drawn = true;
            }
            None => {
                let shown = printable(text);
                if shown == self.status {
                    return;
                }
                let _ = writeln!(self.out, "{}", shown.trim_end_matches('\n'));
                self.status = shown;
            }
        }
        let _ = self.out.flush();
    }

    /// Prints lines above the status.
    pub fn log(&mut self, text: &str) {
        let text = printable(text);
        if self.drawn {
            let _ = write!(self.out, "\r\x1b[2K");
        }
        let _ = writeln!(self.out, "{text}");
        if self.drawn {
            let _ = write!(self.out, "{}", self.status);
        }
        let _ = self.out.flush();
    }

    /// Takes the status line away.
    pub fn clear(&mut self) {
        if self.drawn {
            let _ = write!(self.out, "\r\x1b[2K");
            let _ = self.out.flush();
            self.drawn = false;
        }
    }
}

/// Text without what a terminal obeys, its lines kept.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|letter| matches!(letter, '\n' | '\t') || !letter.is_control())
        .collect()
}

/// The last line that says something, cut to fit.
fn one_line(text: &str, columns: usize) -> String {
    let line = text
        .rsplit(['\n', '\r'])
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default();
    let mut left = columns;
    line.replace('\t', " ")
        .chars()
        // A control character has no width.
        .filter_map(|letter| Some((letter, letter.width()?)))
        .map_while(|(letter, width)| {
            left = left.checked_sub(width)?;
            Some(letter)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_wide_letters_fits_the_line() {
        assert_eq!(one_line("日本語", 5), "日本");
        assert_eq!(one_line("日本語", 6), "日本語");
        assert_eq!(one_line("a\u{301}b", 2), "a\u{301}b");
        assert_eq!(one_line("\u{9b}1mabc", 3), "1ma");
    }
}
