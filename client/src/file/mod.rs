//! Files in a VM, each operation on a stream of its own. Paths are bytes; a relative one starts at
//! /workspace. Nothing here holds a whole file unless its caller asks for that with a limit.

mod error;

pub use error::FileError;
