//! What a person sees while files are copied: a bar per file, on a terminal only, and lines about
//! what was left out. A VM can make no more lines than a few.

use std::io::{self, SeekFrom};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};

use crate::complaint::harmless;

/// How many things that were left out are named.
const MOST_NAMED: u64 = 20;

const KNOWN: &str =
    "{prefix:30!} {wide_bar} {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12} {eta:>4}";
const UNKNOWN: &str = "{prefix:30!} {bytes:>10} {bytes_per_sec:>12} {elapsed:>4}";

/// Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Notes {
    bars: MultiProgress,
    left_out: Arc<AtomicU64>,
}

impl Notes {
    pub(super) fn new(quiet: bool) -> Self {
        let target = if quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self {
            bars: MultiProgress::with_draw_target(target),
            left_out: Arc::default(),
        }
    }

    /// A bar; without a total it only counts.
    pub(super) fn bar(&self, name: &[u8], total: Option<u64>) -> ProgressBar {
        let template = if total.is_some() { KNOWN } else { UNKNOWN };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let name = harmless(&String::from_utf8_lossy(name)).replace('\n', " ");
        let bar = ProgressBar::hidden().with_style(style).with_prefix(name);
        match total {
            Some(total) => bar.set_length(total),
            None => bar.unset_length(),
        }
        self.bars.add(bar)
    }

    /// Writes lines where no bar is drawn over them.
    pub(super) fn say(&self, line: impl FnOnce()) {
        self.bars.suspend(line);
    }

    /// Something is not in the copy.
    pub(super) fn leave_out(&self, what: &str) {
        let before = self.left_out.fetch_add(1, Ordering::Relaxed);
        if before < MOST_NAMED {
            let line = harmless(what).replace('\n', " ");
            self.say(|| eprintln!("sup: left out {line}"));
        } else if before == MOST_NAMED {
            self.say(|| eprintln!("sup: more is left out"));
        }
    }

    pub(super) fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// Leaves the finished bars where they are and the cursor below them.
    pub(super) fn clear(&self) {
        self.bars.set_draw_target(ProgressDrawTarget::hidden());
    }
}

/// A reader whose place a bar shows.
pub(super) struct Counted<R> {
    from: R,
    bar: ProgressBar,
}

impl<R> Counted<R> {
    pub(super) fn new(from: R, bar: &ProgressBar) -> Self {
        let bar = bar.clone();
        Self { from, bar }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Counted<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.from).poll_read(cx, buffer))?;
        let count = buffer.filled().len().saturating_sub(before);
        self.bar.inc(u64::try_from(count).unwrap_or(0));
        Poll::Ready(Ok(()))
    }
}

impl<R: AsyncSeek + Unpin> AsyncSeek for Counted<R> {
    fn start_seek(mut self: Pin<&mut Self>, position: SeekFrom) -> io::Result<()> {
        Pin::new(&mut self.from).start_seek(position)
    }

    fn poll_complete(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u64>> {
        let at = ready!(Pin::new(&mut self.from).poll_complete(cx))?;
        self.bar.set_position(at);
        Poll::Ready(Ok(at))
    }
}
