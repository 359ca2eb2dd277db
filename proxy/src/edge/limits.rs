//! What visitors may use of the edge. Every number here is a bound that holds per connection, per
//! network, per VM or over all; docs/edge.md shows the defaults to users.

use std::time::Duration;

/// The edge's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections over all visitors.
    pub connections: u32,
    /// Connections of one IPv4 address, or of one IPv6 /64.
    pub connections_per_network: u32,
    /// Connections above those, over all visitors, whose requests are told that they are too many;
    /// more are closed at once. They are closed after [`Limits::handshake`].
    pub connections_told: u32,
    /// Of these, connections of one network.
    pub connections_told_per_network: u32,
    /// Requests and WebSockets over all visitors.
    pub requests: u32,
    /// Requests and WebSockets of one IPv4 address, or of one IPv6 /64.
    pub requests_per_network: u32,
    /// Requests and WebSockets that one VM has at the same time.
    pub requests_per_vm: u32,
    /// Bytes of a request's head: its line and its header fields.
    pub head_bytes: usize,
    /// Header fields of a request.
    pub header_fields: usize,
    /// Requests at the same time on one HTTP/2 connection.
    pub streams: u32,
    /// Requests that an HTTP/2 connection may give up before their answers, unless more of them
    /// were answered.
    pub cancelled: u32,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// From the first byte of a request's head to its last.
    pub head: Duration,
    /// How long a visitor's connection may be without a request.
    pub idle: Duration,
    /// How long an unused connection to a VM is kept. Shorter than what web servers in VMs use
    /// (5 s is common), and shorter than `idle`.
    pub upstream_idle: Duration,
    /// How long a connection may have been unused for a request that must not be sent twice. Servers
    /// that close theirs sooner than `upstream_idle` (2 s is seen) would sometimes do so just then.
    pub upstream_fresh: Duration,
    /// Unused connections that are kept per port of a VM.
    pub upstream_kept: usize,
    /// How long to wait for a VM to be found, started where it must be.
    pub find: Duration,
    /// How long to wait for a connection to a port of a VM.
    pub connect: Duration,
    /// How long a VM may take to answer `Expect: 100-continue` before the body is sent anyway.
    pub expect: Duration,
    /// How long the second half of a WebSocket may outlive the first.
    pub half_closed: Duration,
    /// Wrong tokens from one network within [`Limits::tries_period`] before it must wait.
    pub tries: u32,
    /// See there.
    pub tries_period: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_network: 512,
            connections_told: 256,
            connections_told_per_network: 16,
            requests: 32_768,
            requests_per_network: 2_048,
            requests_per_vm: 1_024,
            head_bytes: 32 * 1024,
            header_fields: 100,
            streams: 128,
            cancelled: 128,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(15),
            idle: Duration::from_secs(75),
            upstream_idle: Duration::from_secs(4),
            upstream_fresh: Duration::from_millis(500),
            upstream_kept: 128,
            find: Duration::from_secs(120),
            connect: Duration::from_secs(15),
            expect: Duration::from_secs(1),
            half_closed: Duration::from_secs(10),
            tries: 20,
            tries_period: Duration::from_secs(60),
        }
    }
}
