//! Files in a VM, each operation on a stream of its own. Paths are bytes; a relative one starts at
//! /workspace. Nothing here holds a whole file unless its caller asks for that with a limit.

mod download;
mod error;
mod inflow;
mod list;
mod manage;
mod resume;
mod tree;
mod upload;
mod watch;

pub use download::{Download, FileRead};
pub use error::FileError;
pub use inflow::Piece;
pub use list::Listing;
pub use tree::{Archive, TreeRead, TreeWrite};
pub use upload::FileWrite;
pub use watch::Watch;

/// A path for people.
fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
