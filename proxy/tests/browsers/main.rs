//! The whole way of a visitor: programs that people use in front (curl, h2load, Chromium, Node) and
//! behind (Python, nginx, Node, Vite), and between them the proxy as it is shipped: TLS, edge, the
//! glue to control, and the VM's stack with its frame channel. Only the VM is a network namespace.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
#[path = "../net/mod.rs"]
mod net;

mod agent;
mod browser;
mod files;
mod house;
mod offload;
mod programs;
mod vite;
mod websocket;
