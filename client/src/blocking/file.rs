//! Files for code that blocks.

use std::io::{self, Read, Seek, Write};

use protocol::agent::HealthReport;
use protocol::file::FileInfo;
use protocol::file::manage::DirectoryEntry;
use protocol::file::transfer::{FileWritten, UploadId, UploadState};
use protocol::file::tree::TreeUnpacked;
use protocol::file::watch::FileEvent;
use protocol::network::{Egress, LinkCreated, NetworkInfo, Publication};
use protocol::vm::{VmInfo, VmRef};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::own::Own;
use super::thread::Thread;
use super::{Vm, mirror};
use crate::ClientError;
use crate::file::{FileRead, FileWrite, Piece, TreeRead, TreeWrite};

impl Vm {
    /// Which one.
    pub fn reference(&self) -> &VmRef {
        self.inner.reference()
    }

    mirror! {
        "Vm":
        fn info(&self) -> VmInfo;
        fn health(&self) -> HealthReport;
        fn network(&self) -> NetworkInfo;
        fn set_network(&self, egress: Option<Egress>, publication: Option<Publication>) -> NetworkInfo;
        fn create_link(&self) -> LinkCreated;
        fn stat(&self, path: impl AsRef<[u8]>) -> FileInfo;
        fn stat_link(&self, path: impl AsRef<[u8]>) -> FileInfo;
        fn list_dir(&self, path: impl AsRef<[u8]>, limit: usize) -> Vec<DirectoryEntry>;
        fn mkdir(&self, path: impl AsRef<[u8]>, mode: u32) -> ();
        fn mkdir_all(&self, path: impl AsRef<[u8]>) -> ();
        fn rename(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> ();
        fn rename_new(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> ();
        fn remove(&self, path: impl AsRef<[u8]>) -> ();
        fn remove_all(&self, path: impl AsRef<[u8]>) -> u64;
        fn symlink(&self, target: impl AsRef<[u8]>, path: impl AsRef<[u8]>) -> ();
        fn read_link(&self, path: impl AsRef<[u8]>) -> Vec<u8>;
        fn chmod(&self, path: impl AsRef<[u8]>, mode: u32) -> ();
        fn chown(&self, path: impl AsRef<[u8]>, user: &str, group: &str) -> ();
        fn chown_link(&self, path: impl AsRef<[u8]>, user: &str, group: &str) -> ();
        fn truncate(&self, path: impl AsRef<[u8]>, length: u64) -> ();
        fn read_to_vec(&self, what: impl Into<FileRead>, limit: u64) -> Vec<u8>;
        fn query_upload(&self, path: impl AsRef<[u8]>, upload: UploadId) -> UploadState;
        fn drop_upload(&self, path: impl AsRef<[u8]>, upload: UploadId) -> ();
    }

    /// As [`Vm::read_dir`](crate::Vm::read_dir).
    pub fn read_dir(&self, path: impl AsRef<[u8]>) -> Listing {
        Listing {
            inner: self.inner.read_dir(path),
            thread: self.thread.clone(),
            failed: false,
        }
    }

    /// As [`Vm::download`](crate::Vm::download).
    pub fn download(&self, what: impl Into<FileRead>) -> Result<Download, ClientError> {
        let inner = self.thread.run(self.inner.download(what))?;
        let thread = self.thread.clone();
        Ok(Download { inner, thread })
    }

    /// As [`Vm::upload`](crate::Vm::upload). While the source blocks, a refusal is not heard.
    pub fn upload(
        &self,
        to: impl Into<FileWrite>,
        source: impl Read + Unpin,
    ) -> Result<FileWritten, ClientError> {
        self.thread.run(self.inner.upload(to, Own::new(source)))
    }

    /// As [`Vm::upload_resumable`](crate::Vm::upload_resumable).
    pub fn upload_resumable(
        &self,
        to: impl Into<FileWrite>,
        source: impl Read + Seek + Unpin,
    ) -> Result<FileWritten, ClientError> {
        let source = Own::new(source);
        self.thread.run(self.inner.upload_resumable(to, source))
    }

    /// As [`Vm::pack`](crate::Vm::pack).
    pub fn pack(&self, what: impl Into<TreeRead>) -> Result<Archive, ClientError> {
        let inner = self.thread.run(self.inner.pack(what))?;
        let thread = self.thread.clone();
        Ok(Archive { inner, thread })
    }

    /// As [`Vm::unpack`](crate::Vm::unpack).
    pub fn unpack(
        &self,
        to: impl Into<TreeWrite>,
        archive: impl Read + Unpin,
    ) -> Result<TreeUnpacked, ClientError> {
        self.thread.run(self.inner.unpack(to, Own::new(archive)))
    }

    /// As [`Vm::watch`](crate::Vm::watch).
    pub fn watch(&self, path: impl AsRef<[u8]>, recursive: bool) -> Result<Watch, ClientError> {
        let inner = self.thread.run(self.inner.watch(path, recursive))?;
        Ok(Watch {
            inner,
            thread: self.thread.clone(),
            failed: false,
        })
    }

    /// As [`Vm::dial`](crate::Vm::dial).
    pub fn dial(&self, port: u16) -> Result<Dialogue, ClientError> {
        let inner = self.thread.run(self.inner.dial(port))?;
        let thread = self.thread.clone();
        Ok(Dialogue { inner, thread })
    }
}

/// The entries of a directory, as an iterator: [`crate::file::Listing`] for code that blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), client::ClientError> {
/// for entry in vm.read_dir("src") {
///     println!("{}", String::from_utf8_lossy(&entry?.name));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Listing {
    inner: crate::file::Listing,
    thread: Thread,
    failed: bool,
}

impl Iterator for Listing {
    type Item = Result<DirectoryEntry, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.thread.item(&mut self.failed, self.inner.next())
    }
}

/// A file of a VM on its way to us, as [`Read`]: [`crate::file::Download`] for code that blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut here = std::fs::File::create("result.tar")?;
/// std::io::copy(&mut vm.download("result.tar")?, &mut here)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Download {
    inner: crate::file::Download,
    thread: Thread,
}

impl Download {
    /// The file as it was opened.
    pub fn info(&self) -> &FileInfo {
        self.inner.info()
    }

    /// How many bytes there are to come in all; none when nobody can know.
    pub fn total(&self) -> Option<u64> {
        self.inner.total()
    }

    /// Where in the file the next piece begins that comes from the agent.
    pub fn offset(&self) -> u64 {
        self.inner.offset()
    }

    /// The next piece; none at the end. Not to be mixed with reading bytes.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, ClientError> {
        self.thread.run(self.inner.next_piece())
    }

    /// After a lost connection: reads on where the old stream stopped, if the file is still the
    /// same one.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.thread.run(self.inner.resume())
    }
}

/// An error inside is a [`ClientError`].
impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.thread.run_io(self.inner.read(buffer))
    }
}

/// A tree on its way to us as a tar archive, as [`Read`]: [`crate::file::Archive`] for code that
/// blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let copied = vm.unpack("copy", vm.pack("site")?)?;
/// println!("{} entries", copied.entries);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Archive {
    inner: crate::file::Archive,
    thread: Thread,
}

/// An error inside is a [`ClientError`].
impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.thread.run_io(self.inner.read(buffer))
    }
}

/// Changes as they happen, as an iterator: [`crate::file::Watch`] for code that blocks. Ends after
/// an error, and else never.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), client::ClientError> {
/// for change in vm.watch("src", true)? {
///     println!("{:?}", change?.change);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Watch {
    inner: crate::file::Watch,
    thread: Thread,
    failed: bool,
}

impl Iterator for Watch {
    type Item = Result<FileEvent, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let result = self.thread.run(self.inner.next());
        self.failed = result.is_err();
        Some(result)
    }
}

/// A connection to a port inside a VM, as [`Read`] and [`Write`]: [`crate::Dialogue`] for code that
/// blocks.
///
/// ```no_run
/// # fn example(vm: client::blocking::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use std::io::{Read, Write};
/// let mut web = vm.dial(3000)?;
/// web.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
/// let mut answer = Vec::new();
/// web.take(1 << 20).read_to_end(&mut answer)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Dialogue {
    inner: crate::Dialogue,
    thread: Thread,
}

impl Dialogue {
    /// Says that nothing more will be written.
    pub fn shutdown(&mut self) -> io::Result<()> {
        self.thread.run_io(self.inner.shutdown())
    }
}

impl Read for Dialogue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.thread.run_io(self.inner.read(buffer))
    }
}

impl Write for Dialogue {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.thread.run_io(self.inner.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.thread.run_io(self.inner.flush())
    }
}
