//! Reading one file of a VM, from any place in it, as bytes or as pieces that know of holes.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use protocol::file::FileInfo;
use protocol::file::transfer::{ReadFile, ReadStarted};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::inflow::{Inflow, Piece};
use super::show;
use crate::error::ClientError;
use crate::vm::Vm;

/// What to read of which file. A path alone is one, too: all of the file.
///
/// ```
/// let rest = client::file::FileRead::new("disk.img").offset(1 << 20).sparse().checked();
/// # let _ = rest;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRead {
    pub(super) request: ReadFile,
}

impl FileRead {
    /// All of a file.
    pub fn new(path: impl AsRef<[u8]>) -> Self {
        Self {
            request: ReadFile {
                path: path.as_ref().to_vec(),
                offset: 0,
                length: None,
                checksum: false,
                before: 0,
                sparse: false,
                special: false,
            },
        }
    }

    /// Begins here; beyond the end is an error.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.request.offset = offset;
        self
    }

    /// Reads no more than this.
    #[must_use]
    pub fn length(mut self, length: u64) -> Self {
        self.request.length = Some(length);
        self
    }

    /// Has the agent compute the BLAKE3 checksum of what it sends, and compares it at the end; also
    /// of what had come before the connection was lost, if it was.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.request.checksum = true;
        self
    }

    /// Lets holes come as holes: see [`Download::next_piece`]. Read as bytes they are zeros.
    #[must_use]
    pub fn sparse(mut self) -> Self {
        self.request.sparse = true;
        self
    }

    /// Reads pipes and devices, too, which may never end.
    #[must_use]
    pub fn special(mut self) -> Self {
        self.request.special = true;
        self
    }
}

impl<P: AsRef<[u8]> + ?Sized> From<&P> for FileRead {
    fn from(path: &P) -> Self {
        Self::new(path)
    }
}

impl Vm {
    /// Reads a file, beginning now; a file that does not exist is an error at once.
    pub async fn download(&self, what: impl Into<FileRead>) -> Result<Download, ClientError> {
        Download::begin(self.clone(), what.into().request, None).await
    }

    /// Reads on behind what an earlier program has kept of the file: `known` has hashed it, and it ends
    /// at the request's offset. At the end its checksum is compared, too, so that what was kept of
    /// another content comes out as [`ClientError::Damaged`].
    ///
    /// ```no_run
    /// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// use client::file::FileRead;
    /// let mut known = blake3::Hasher::new();
    /// known.update(b"the first bytes");
    /// let rest = vm.download_rest(FileRead::new("log").offset(known.count()), known).await?;
    /// # let _ = rest;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn download_rest(
        &self,
        what: impl Into<FileRead>,
        known: blake3::Hasher,
    ) -> Result<Download, ClientError> {
        let mut request = what.into().request;
        request.checksum = true;
        request.before = known.count();
        Download::begin(self.clone(), request, Some(known)).await
    }

    /// A whole file in memory, if it has no more than `limit` bytes.
    pub async fn read_to_vec(
        &self,
        what: impl Into<FileRead>,
        limit: u64,
    ) -> Result<Vec<u8>, ClientError> {
        let download = self.download(what).await?;
        let too_long = || ClientError::TooLong {
            what: show(&download.request.path),
            limit,
        };
        if download.total.is_some_and(|total| total > limit) {
            return Err(too_long());
        }
        let error = too_long();
        let mut bytes = Vec::new();
        let mut reader = download.take(limit.saturating_add(1));
        reader.read_to_end(&mut bytes).await?;
        if reader.limit() == 0 {
            return Err(error);
        }
        Ok(bytes)
    }
}

/// A file of a VM on its way to us, as [`AsyncRead`].
///
/// ```no_run
/// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// let mut file = vm.download("result.tar").await?;
/// println!("{:?} bytes", file.total());
/// let mut here = tokio::fs::File::create("result.tar").await?;
/// tokio::io::copy(&mut file, &mut here).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Download {
    vm: Vm,
    /// As it was at first.
    request: ReadFile,
    info: FileInfo,
    total: Option<u64>,
    inflow: Inflow,
    /// What earlier streams have brought.
    before: u64,
}

impl Download {
    async fn begin(
        vm: Vm,
        request: ReadFile,
        known: Option<blake3::Hasher>,
    ) -> Result<Self, ClientError> {
        let (started, mut inflow) = begin(&vm, &request).await?;
        if let Some(known) = known {
            inflow.goes_on_behind(known);
        }
        Ok(Self {
            vm,
            request,
            info: started.info,
            total: started.total,
            inflow,
            before: 0,
        })
    }

    /// The file as it was opened.
    pub fn info(&self) -> &FileInfo {
        &self.info
    }

    /// How many bytes there are to come in all; none when nobody can know.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// Where in the file the next piece begins that comes from the agent.
    pub fn offset(&self) -> u64 {
        self.request.offset.saturating_add(self.so_far())
    }

    fn so_far(&self) -> u64 {
        self.before.saturating_add(self.inflow.received())
    }

    /// The next piece; none at the end. Not to be mixed with reading bytes. Dropping the call
    /// loses nothing.
    pub async fn next_piece(&mut self) -> Result<Option<Piece>, ClientError> {
        poll_fn(|cx| self.inflow.poll_piece(cx)).await
    }

    /// After a lost connection: reads on where the old stream stopped, if the file is still the
    /// same one.
    pub async fn resume(&mut self) -> Result<(), ClientError> {
        if self.inflow.is_over() {
            return Ok(());
        }
        let path = || show(&self.request.path);
        if self.total.is_none() {
            return Err(ClientError::Changed {
                path: path(),
                what: "it is made as it is read, and has no place to go on from".into(),
            });
        }
        let mut request = self.request.clone();
        request.offset = self.offset();
        if request.checksum {
            // What we have already is checked, too.
            request.before = request.before.saturating_add(self.so_far());
        }
        request.length = request
            .length
            .map(|length| length.saturating_sub(self.so_far()));
        let begun = begin(&self.vm, &request).await;
        let (started, inflow) = match begun {
            // It has become shorter than what we have of it.
            Err(error) if error.code() == Some(protocol::ErrorCode::InvalidArgument) => {
                return Err(ClientError::Changed {
                    path: path(),
                    what: "it is shorter now".into(),
                });
            }
            begun => begun?,
        };
        let (old, new) = (&self.info, &started.info);
        let same = (old.inode, old.size, old.mtime_s, old.mtime_ns)
            == (new.inode, new.size, new.mtime_s, new.mtime_ns);
        if !same {
            return Err(ClientError::Changed {
                path: path(),
                what: "it is another one now; read it from its beginning".into(),
            });
        }
        self.before = self.so_far();
        self.inflow = inflow.continuing(&mut self.inflow);
        Ok(())
    }
}

async fn begin(vm: &Vm, request: &ReadFile) -> Result<(ReadStarted, Inflow), ClientError> {
    let begun = async {
        let (mut replies, requests) = vm.begin(request).await?;
        let started: ReadStarted = replies.answer().await?;
        let path = show(&request.path);
        let (sparse, checksum) = (request.sparse, request.checksum);
        let inflow = Inflow::new((replies, requests), path, started.total, sparse, checksum);
        Ok((started, inflow))
    };
    begun.await.map_err(ClientError::repeatable)
}

/// An error inside is a [`ClientError`]; after a lost connection [`Download::resume`] goes on.
impl AsyncRead for Download {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inflow.poll_read(cx, buffer)
    }
}
