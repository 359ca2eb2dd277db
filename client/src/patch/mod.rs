//! The patch runner: a script in JavaScript, run with a global `sup` through which it has VMs,
//! files, a memory between runs and its inputs, all synchronous. A script reaches nothing of this
//! machine but what `sup` offers.
//!
//! `prelude/` holds the objects that a script sees; [`backend`] is all that they need of VMs.

mod appliance;
pub mod backend;
mod decode;
mod fetch;
mod host;
mod input;
mod interrupt;
mod media;
mod natives;
mod output;
mod runtime;
mod screen;
pub mod show;
mod store;
mod transfer;

pub use appliance::Appliance;
pub use backend::{Backend, Failure};
pub use input::Inputs;
pub use interrupt::Interrupt;
pub use media::{Class, Media};
pub use runtime::{Finished, MEMORY, Patch, PatchError, run};
pub use screen::Screen;
pub use store::{MAX_KEY, MAX_VALUE, Scope, Store, StoreError};
