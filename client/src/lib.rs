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

mod api;
mod connection;
mod endpoint;
mod error;
mod exec;
mod frames;
#[cfg(feature = "patch")]
pub mod patch;
mod transport;
mod trust;

pub use api::{AgentStream, Client, Vm, new_vm};
pub use endpoint::{Endpoint, EndpointError};
pub use error::{ClientError, Side};
pub use exec::{Command, Execution, Input, Output};
pub use protocol;
pub use trust::{Fetched, Trust, TrustError, fetch_ca};
