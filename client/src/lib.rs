//! The client of a supvm appliance: connects, asks for VMs and runs commands in them. Whatever
//! comes back is taken for an attacker's: it is bounded, checked and never makes this crate panic.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use client::{Client, Command, Output, Trust};
//! let trust = Trust::from_pem_file("ca.pem".as_ref())?;
//! let client = Client::connect("https://supvm.localhost:7443".parse()?, "token".into(), trust).await?;
//! let vm = client.create(client::new_vm()?).await?;
//! let mut run = client.vm(client::protocol::vm::VmRef::Id(vm.id)).exec(Command::shell("uname -a")).await?;
//! while let Some(output) = run.next().await? {
//!     if let Output::Stdout(bytes) = output {
//!         print!("{}", String::from_utf8_lossy(&bytes));
//!     }
//! }
//! # Ok(())
//! # }
//! ```

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

mod agent;
mod api;
pub mod blocking;
mod command;
mod connection;
mod dial;
mod endpoint;
mod error;
mod exec;
pub mod file;
mod follow;
mod frames;
mod link;
mod network;
mod output;
#[cfg(feature = "patch")]
pub mod patch;
mod process;
mod transport;
mod trust;
mod typing;
mod vm;

pub use agent::AgentStream;
pub use api::{Client, new_vm};
pub use command::{Command, new_process_id};
pub use dial::Dialogue;
pub use endpoint::{Endpoint, EndpointError};
pub use error::{ClientError, Side};
pub use exec::{Execution, Input};
pub use follow::Follow;
pub use network::{RuleError, parse_rule, rule_text, url_token_hash};
pub use output::{Output, ReadFrom, Record, Utf8Decoder};
pub use process::Process;
pub use protocol;
pub use trust::{Fetched, Trust, TrustError, fetch_ca};
pub use typing::InputWriter;
pub use vm::Vm;
