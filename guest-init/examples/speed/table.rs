//! The table: medians and how far the runs lie apart.

use std::time::Duration;

/// Times of one thing that was done several times, shortest first.
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(times: Vec<Duration>) -> Self {
        let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    fn at(&self, percent: usize) -> f64 {
        self.0[(self.0.len() - 1) * percent / 100]
    }
}

pub(crate) struct Row {
    what: String,
    rounds: usize,
    ours: String,
    plain: String,
    cost: f64,
    goal: &'static str,
}

pub(crate) fn head() {
    let (ours, plain) = ("agent (p10 to p90)", "plain (p10 to p90)");
    let (what, goal) = ("what", "goal");
    println!(
        "{what:<36} {:>4}  {ours:<30} {plain:<30} {:>6}  {goal}",
        "n", "ratio"
    );
}

impl Row {
    /// Times in milliseconds; the ratio is how many times as long the agent's way takes.
    pub(crate) fn trips(what: &str, ours: &Samples, plain: &Samples) -> Self {
        let text = |one: &Samples| {
            let [low, middle, high] = [10, 50, 90].map(|percent| one.at(percent) * 1e3);
            format!("{middle:.2} ms ({low:.2} to {high:.2})")
        };
        Self::new(what, ours, plain, text, ours.at(50) / plain.at(50))
    }

    /// Bytes per time; the ratio is how much of the plain speed the agent's way has.
    pub(crate) fn rates(what: &str, bytes: u64, ours: &Samples, plain: &Samples) -> Self {
        let gib = bytes as f64 / f64::from(1 << 30);
        let text = |one: &Samples| {
            let [low, middle, high] = [90, 50, 10].map(|percent| gib / one.at(percent));
            format!("{middle:.2} GiB/s ({low:.2} to {high:.2})")
        };
        Self::new(what, ours, plain, text, plain.at(50) / ours.at(50))
    }

    fn new(
        what: &str,
        ours: &Samples,
        plain: &Samples,
        text: impl Fn(&Samples) -> String,
        cost: f64,
    ) -> Self {
        Self {
            what: what.to_owned(),
            rounds: ours.0.len(),
            ours: text(ours),
            plain: text(plain),
            cost,
            goal: "-",
        }
    }

    pub(crate) fn goal(mut self, goal: &'static str) -> Self {
        self.goal = goal;
        self
    }

    pub(crate) fn print(&self) {
        println!(
            "{:<36} {:>4}  {:<30} {:<30} {:>6.2}  {}",
            self.what, self.rounds, self.ours, self.plain, self.cost, self.goal
        );
    }
}
