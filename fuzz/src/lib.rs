//! What several targets need.

#![allow(dead_code, unexpected_cfgs, unreachable_pub, unused_imports)]

pub mod driver;

// The agent is a program, not a library: its modules are compiled into this crate.
#[path = "../../guest-init/src/agent/mod.rs"]
mod agent;
#[path = "../../guest-init/src/boot/mod.rs"]
mod boot;
#[path = "../../guest-init/src/cgroup/mod.rs"]
mod cgroup;
#[path = "../../guest-init/src/log.rs"]
mod log;
#[path = "../../guest-init/src/reaper.rs"]
mod reaper;
#[path = "../../guest-init/src/system/mod.rs"]
mod system;

/// Unpacks an archive, cut anywhere, into the empty directory `inside`, and removes it.
pub fn archive(inside: &std::path::Path, cut: usize, bytes: &[u8]) {
    let _ = agent::fuzz_archive(inside, cut, bytes);
}

/// Frames to an agent that waits for its configuration.
pub fn agent_stream(bytes: &[u8]) {
    agent::fuzz::stream(bytes);
}

/// The body of a request for a process, checked and not carried out.
pub fn agent_command(body: &[u8]) {
    agent::fuzz::command(body);
}

/// The logs in this directory, as an agent finds them at its start.
pub fn agent_logs(directory: &std::path::Path, value: u64) {
    agent::fuzz::logs(directory, value);
}

/// Operations on files in this directory, which is always the same and empty.
pub fn agent_files(directory: &std::path::Path, bytes: &[u8]) {
    agent::fuzz::files(directory, bytes);
}

/// Lists of users and groups, and who is wanted.
pub fn users(passwd: &[u8], group: &[u8], wanted: &[u8]) {
    agent::fuzz_users(passwd, group, wanted);
}

/// A file /etc/hosts.
pub fn hosts(text: &[u8]) {
    system::identity::fuzz(text);
}
