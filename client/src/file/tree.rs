//! Directory trees of a VM as tar archives, either way. The archive's bytes pass through and are
//! looked at by nobody here; whoever unpacks one that a VM made must not believe its names.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use protocol::file::transfer::WriteEnd;
use protocol::file::tree::{PackTree, TreeUnpacked, UnpackTree};
use tokio::io::{AsyncRead, ReadBuf};

use super::inflow::Inflow;
use super::show;
use super::upload::pour;
use crate::agent::converse;
use crate::error::ClientError;
use crate::vm::Vm;

/// Which tree to pack, and how. A path alone is one, too.
///
/// ```
/// let site = client::file::TreeRead::new("site").sparse().checked();
/// # let _ = site;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeRead {
    request: PackTree,
}

impl TreeRead {
    /// A tree.
    pub fn new(path: impl AsRef<[u8]>) -> Self {
        Self {
            request: PackTree {
                path: path.as_ref().to_vec(),
                checksum: false,
                sparse: false,
                special: false,
            },
        }
    }

    /// Has the agent compute the archive's BLAKE3 checksum, and compares it at the end.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.request.checksum = true;
        self
    }

    /// Leaves holes out of the archive (GNU's format 1.0).
    #[must_use]
    pub fn sparse(mut self) -> Self {
        self.request.sparse = true;
        self
    }

    /// Packs devices and pipes, too.
    #[must_use]
    pub fn special(mut self) -> Self {
        self.request.special = true;
        self
    }
}

impl<P: AsRef<[u8]> + ?Sized> From<&P> for TreeRead {
    fn from(path: &P) -> Self {
        Self::new(path)
    }
}

/// Where to unpack an archive, and how. A path alone is one, too.
///
/// ```
/// let backup = client::file::TreeWrite::new("/srv").owners();
/// # let _ = backup;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeWrite {
    request: UnpackTree,
}

impl TreeWrite {
    /// Into this directory, which is made when missing.
    pub fn new(path: impl AsRef<[u8]>) -> Self {
        Self {
            request: UnpackTree {
                path: path.as_ref().to_vec(),
                owners: false,
                special: false,
            },
        }
    }

    /// Sets owners and groups by the archive's numbers.
    #[must_use]
    pub fn owners(mut self) -> Self {
        self.request.owners = true;
        self
    }

    /// Makes devices and pipes, too.
    #[must_use]
    pub fn special(mut self) -> Self {
        self.request.special = true;
        self
    }
}

impl<P: AsRef<[u8]> + ?Sized> From<&P> for TreeWrite {
    fn from(path: &P) -> Self {
        Self::new(path)
    }
}

impl Vm {
    /// Packs a tree, beginning now. A tree that does not exist is an error of the first read.
    pub async fn pack(&self, what: impl Into<TreeRead>) -> Result<Archive, ClientError> {
        let TreeRead { request } = what.into();
        let begun = self.begin(&request).await;
        let streams = begun.map_err(ClientError::repeatable)?;
        let path = show(&request.path);
        // Holes are the archive's affair; its own bytes have none.
        let inflow = Inflow::new(streams, path, None, false, request.checksum);
        Ok(Archive { inflow })
    }

    /// Unpacks an archive. Nothing is made outside the tree; what was unpacked before an error
    /// stays.
    pub async fn unpack(
        &self,
        to: impl Into<TreeWrite>,
        archive: impl AsyncRead + Unpin,
    ) -> Result<TreeUnpacked, ClientError> {
        let TreeWrite { request } = to.into();
        let (mut replies, mut requests) = self.begin(&request).await?;
        let saying = async {
            pour(&mut requests, archive, false, |_| ()).await?;
            requests.send(&WriteEnd { blake3: None }).await
        };
        let answer = converse(&mut replies, saying, |_| false).await;
        let answer = answer.map_err(ClientError::unwrapped)?;
        Ok(protocol::decode(&answer)?)
    }
}

/// A tree on its way to us as a tar archive: [`AsyncRead`].
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut site = vm.pack("site").await?;
/// let mut here = tokio::fs::File::create("site.tar").await?;
/// tokio::io::copy(&mut site, &mut here).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Archive {
    inflow: Inflow,
}

/// An error inside is a [`ClientError`].
impl AsyncRead for Archive {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inflow.poll_read(cx, buffer)
    }
}
