//! The same client for code that blocks: methods return results, streams are iterators, readers and
//! writers. One thread of its own moves the bytes; everything made from a [`Client`] keeps it
//! alive. Not to be used from async code, which it would hold up: there every call is an error.
//!
//! ```no_run
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use client::{Command, Output, Trust, blocking::Client};
//! let client = Client::connect("unix:/run/supvm/api.sock".parse()?, "token".into(), Trust::none())?;
//! let vm = client.vm("web".parse()?);
//! for output in vm.exec(Command::shell("uname -a"))? {
//!     if let Output::Stdout(bytes) = output? {
//!         print!("{}", String::from_utf8_lossy(&bytes));
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod file;
mod own;
mod process;
mod thread;

pub use file::{Archive, Dialogue, Download, Listing, Watch};
pub use process::{Execution, Follow, Input, Process};

use protocol::hello::Limits;
use protocol::id::VmId;
use protocol::network::{Egress, LinkCreated, NetworkInfo, Publication};
use protocol::vm::{CreateVm, VmInfo, VmPage, VmRef};

use crate::{ClientError, Endpoint, Trust};
#[cfg(feature = "patch")]
pub(crate) use own::Own;
use thread::Thread;

/// Methods that do what those of the same name of the async type do.
macro_rules! mirror {
    (
        $type:literal:
        $(fn $name:ident(&self $(, $argument:ident: $kind:ty)*) -> $result:ty;)*
    ) => {
        $(
            #[doc = concat!("As [`", $type, "::", stringify!($name), "`](crate::", $type, "::", stringify!($name), ").")]
            pub fn $name(&self $(, $argument: $kind)*) -> Result<$result, $crate::ClientError> {
                self.thread.run(self.inner.$name($($argument),*))
            }
        )*
    };
}
use mirror;

/// An appliance: [`crate::Client`] for code that blocks. Clones share the connection.
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use client::{Trust, blocking::Client};
/// let client = Client::connect("unix:/run/supvm/api.sock".parse()?, "token".into(), Trust::none())?;
/// for vm in client.list()? {
///     println!("{} is {:?}", vm.id, vm.state);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    inner: crate::Client,
    thread: Thread,
}

impl Client {
    /// Connects and is let in.
    pub fn connect(endpoint: Endpoint, token: String, trust: Trust) -> Result<Self, ClientError> {
        let thread = Thread::start()?;
        let inner = thread.run(crate::Client::connect(endpoint, token, trust))?;
        Ok(Self { inner, thread })
    }

    /// Ends the connection with a goodbye, for every clone, whatever is still under way on it.
    pub fn close(self) -> Result<(), ClientError> {
        self.thread.run(async {
            self.inner.close().await;
            Ok(())
        })
    }

    /// What the appliance allows on a connection.
    pub fn limits(&self) -> Option<Limits> {
        self.inner.limits()
    }

    mirror! {
        "Client":
        fn create(&self, request: CreateVm) -> VmInfo;
        fn get(&self, vm: VmRef) -> VmInfo;
        fn console(&self, vm: VmRef) -> Vec<u8>;
        fn list_page(&self, after: Option<VmId>, limit: u16) -> VmPage;
        fn list(&self) -> Vec<VmInfo>;
        fn stop(&self, vm: VmRef, deadline_ms: Option<u32>) -> VmInfo;
        fn start(&self, vm: VmRef) -> VmInfo;
        fn network(&self, vm: VmRef) -> NetworkInfo;
        fn set_network(&self, vm: VmRef, egress: Option<Egress>, publication: Option<Publication>) -> NetworkInfo;
        fn create_link(&self, vm: VmRef) -> LinkCreated;
        fn delete(&self, vm: VmRef) -> ();
    }

    /// A VM to work in. Nothing is asked yet.
    pub fn vm(&self, vm: VmRef) -> Vm {
        Vm {
            inner: self.inner.vm(vm),
            thread: self.thread.clone(),
        }
    }
}

/// One VM: [`crate::Vm`] for code that blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use std::io::Read;
/// vm.upload("numbers.txt", &b"3\n1\n2\n"[..])?;
/// vm.exec(client::Command::shell("sort numbers.txt > sorted.txt"))?.wait()?;
/// let mut sorted = String::new();
/// vm.download("sorted.txt")?.read_to_string(&mut sorted)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Vm {
    inner: crate::Vm,
    thread: Thread,
}
