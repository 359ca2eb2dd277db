//! The `supvm` binary's parts: the supervisor that is everybody's parent, PID 1's duties, the
//! network's set-up, and control. Monitors and the proxy are crates of their own; this one only
//! starts them.

pub mod control;
pub mod descriptors;
pub mod init;
pub mod log;
pub mod net;
mod netlink;
pub mod role;
pub mod settings;
pub mod supervisor;
pub mod token;
