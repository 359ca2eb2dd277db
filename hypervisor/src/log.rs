//! The log of every role: one line per event on standard error, which the supervisor hands to each
//! process. Never more than that: no files, no network.

use tracing_subscriber::EnvFilter;

/// Environment variable with the level or filter, which the supervisor passes on to every role.
pub const VARIABLE: &str = "SUPVM_LOG";

/// Starts logging at the level that [`VARIABLE`] names, or at `info`.
pub fn start() {
    start_at("info");
}

/// Starts logging at the level that [`VARIABLE`] names, or at `level`.
pub fn start_at(level: &str) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    let _ = tracing_subscriber::fmt()
        .compact()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}
