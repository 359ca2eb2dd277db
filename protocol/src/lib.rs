//! Every message that crosses a socket of supvm, and its framing.
//!
//! Two families live here. The public protocol is what clients, control and the guest's agent
//! speak: [`hello`], [`vm`], [`agent`], [`process`], [`processes`], [`file`], [`network`] and
//! [`error`], in [`frame`]s. The private one,
//! [`host`], is what the processes of one host say to each other over sockets that they made.
//!
//! Nothing here decides when to read, write or give up: this crate turns values into bytes and
//! bytes into values, and every byte that comes in is taken for an attacker's.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

pub mod agent;
pub mod error;
pub mod file;
pub mod frame;
pub mod hello;
pub mod host;
pub mod id;
pub mod message;
pub mod network;
pub mod process;
pub mod processes;
pub mod vm;
mod wire_enum;

pub use error::{ErrorBody, ErrorCode, Fault, Retry};
pub use frame::{Frame, FrameError, FrameReader, Kind};
pub use message::{Message, decode, encode};
