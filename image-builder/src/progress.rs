//! Says on standard error what a long build is doing and for how long: a spinner on a terminal, a
//! line per phase (and one a minute while output keeps coming) elsewhere. It must never be the
//! reason that a build fails.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const LINE_EVERY: Duration = Duration::from_secs(60);

/// The progress of one artifact.
pub(crate) struct Progress {
    artifact: String,
    phase: String,
    started: Instant,
    last_line: Instant,
    lines: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts the clock of `artifact`.
    pub(crate) fn start(artifact: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} ({elapsed})")
            {
                bar.set_style(style);
            }
            bar.set_prefix(artifact.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let now = Instant::now();
        Self {
            artifact: artifact.to_owned(),
            phase: String::new(),
            started: now,
            last_line: now,
            lines: 0,
            bar,
        }
    }

    /// The next phase begins.
    pub(crate) fn phase(&mut self, what: &str) {
        what.clone_into(&mut self.phase);
        self.lines = 0;
        self.say(what);
    }

    /// A tool printed a line.
    pub(crate) fn tool_line(&mut self) {
        self.lines += 1;
        let text = format!("{}, {} lines of output", self.phase, self.lines);
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.say(&text);
        }
    }

    /// The end: how long it took.
    pub(crate) fn done(self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!(
            "{}: {what} in {}",
            self.artifact,
            in_words(self.started.elapsed())
        );
    }

    fn say(&mut self, what: &str) {
        self.last_line = Instant::now();
        match &self.bar {
            Some(bar) => bar.set_message(what.to_owned()),
            None => eprintln!(
                "{}: {what} (after {})",
                self.artifact,
                in_words(self.started.elapsed())
            ),
        }
    }
}

fn in_words(elapsed: Duration) -> String {
    match elapsed.as_secs() {
        0 => format!("{} ms", elapsed.as_millis()),
        seconds @ 1..60 => format!("{seconds} s"),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(in_words(Duration::from_millis(12)), "12 ms");
        assert_eq!(in_words(Duration::from_secs(59)), "59 s");
        assert_eq!(in_words(Duration::from_secs(185)), "3 min 5 s");
    }
}
