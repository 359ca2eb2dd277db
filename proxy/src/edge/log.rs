//! The access log: one line per request, and no more than a few per period. A line names the VM, not
//! its address, and no query: both may be secrets.

use std::net::SocketAddr;

use http::{Method, StatusCode, Version};
use protocol::id::VmId;
use tokio::time::Instant;

use super::guests::Guest;
use crate::Quiet;

/// Characters of a path.
const PATH: usize = 120;

/// A request's line.
#[derive(Debug)]
pub(crate) struct Entry {
    peer: SocketAddr,
    /// None of one that could not be read.
    asked: Option<(Method, String)>,
    version: Version,
    start: Instant,
    guest: Option<(VmId, u16)>,
}

impl Entry {
    pub(crate) fn begin(peer: SocketAddr, method: &Method, path: &str, version: Version) -> Self {
        Self {
            peer,
            asked: Some((method.clone(), path.chars().take(PATH).collect())),
            version,
            start: Instant::now(),
            guest: None,
        }
    }

    /// What was asked for could not be read.
    pub(crate) fn malformed(&mut self) {
        self.asked = None;
    }

    /// The request goes to this guest.
    pub(crate) fn guest(&mut self, guest: &Guest, port: u16) {
        self.guest = Some((guest.vm.clone(), port));
    }

    /// The answer's head is known.
    pub(crate) fn end(self, status: StatusCode, quiet: &Quiet) {
        if let Some(left_out) = quiet.allow() {
            self.write(status, left_out);
        }
    }

    fn write(self, status: StatusCode, left_out: u64) {
        let milliseconds = self.start.elapsed().as_millis();
        let (vm, port) = match &self.guest {
            Some((vm, port)) => (vm.as_str(), *port),
            None => ("-", 0),
        };
        let (method, path) = match &self.asked {
            Some((method, path)) => (method.as_str(), path.as_str()),
            None => ("-", "-"),
        };
        tracing::info!(
            peer = %self.peer.ip(),
            vm,
            port,
            method,
            path,
            version = ?self.version,
            status = status.as_u16(),
            milliseconds,
            left_out,
            "request"
        );
    }
}
