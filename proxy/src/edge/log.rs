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
    method: Method,
    path: String,
    version: Version,
    start: Instant,
    guest: Option<(VmId, u16)>,
}

impl Entry {
    pub(crate) fn begin(peer: SocketAddr, method: &Method, path: &str, version: Version) -> Self {
        Self {
            peer,
            method: method.clone(),
            path: path.chars().take(PATH).collect(),
            version,
            start: Instant::now(),
            guest: None,
        }
    }

    /// The request goes to this guest.
    pub(crate) fn guest(&mut self, guest: &Guest, port: u16) {
        self.guest = Some((guest.vm.clone(), port));
    }

    /// The answer's head is known.
    pub(crate) fn end(self, status: StatusCode) {
        static QUIET: Quiet = Quiet::new();
        let Some(left_out) = QUIET.allow() else {
            return;
        };
        let milliseconds = self.start.elapsed().as_millis();
        let (vm, port) = match &self.guest {
            Some((vm, port)) => (vm.as_str(), *port),
            None => ("-", 0),
        };
        tracing::info!(
            peer = %self.peer.ip(),
            vm,
            port,
            method = self.method.as_str(),
            path = ?self.path,
            version = ?self.version,
            status = status.as_u16(),
            milliseconds,
            left_out,
            "request"
        );
    }
}
