//! The edge as visitors and guests see it: real sockets on loopback, servers in place of VMs.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod hostile;
mod http2;
mod log;
mod pages;
mod pool;
mod requests;
mod streams;
mod support;
mod websocket;
