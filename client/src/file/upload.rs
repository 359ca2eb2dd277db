//! Writing one file of a VM. It appears whole or not at all; an agent that refuses in the middle is
//! heard at once.

use protocol::file::FileDone;
use protocol::file::transfer::{
    DropUpload, FileHole, FileWritten, QueryUpload, UploadId, UploadState, WriteEnd, WriteFile,
    WriteMode,
};
use protocol::frame::MAX_DATA;
use protocol::{Frame, Kind};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::show;
use crate::agent::{Replies, Requests, converse};
use crate::error::ClientError;
use crate::vm::{Repeat, Vm};

/// What to write, and how. A path alone is one, too: replace the file in one step.
///
/// ```
/// let script = client::file::FileWrite::new("run.sh").permissions(0o755).checked();
/// # let _ = script;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileWrite {
    pub(super) request: WriteFile,
    pub(super) sparse: bool,
}

impl FileWrite {
    /// Replaces the file in one step when everything is there. Missing parents are made.
    pub fn new(path: impl AsRef<[u8]>) -> Self {
        Self {
            request: WriteFile {
                path: path.as_ref().to_vec(),
                mode: WriteMode::Replace,
                permissions: None,
                size: None,
                checksum: false,
                upload: None,
                offset: 0,
            },
            sparse: false,
        }
    }

    /// Adds to the file's end, as it comes. When that fails half-way,
    /// [`FileError::appended`](super::FileError::appended) says how much got in.
    #[must_use]
    pub fn append(mut self) -> Self {
        self.request.mode = WriteMode::Append;
        self
    }

    /// Refuses a file that exists.
    #[must_use]
    pub fn create_new(mut self) -> Self {
        self.request.mode = WriteMode::Create;
        self
    }

    /// Permission bits; without this those of the old file stay, or 0644.
    #[must_use]
    pub fn permissions(mut self, bits: u32) -> Self {
        self.request.permissions = Some(bits);
        self
    }

    /// How long the file will be; another length is then refused.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Self {
        self.request.size = Some(bytes);
        self
    }

    /// Compares BLAKE3 checksums before the file appears.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.request.checksum = true;
        self
    }

    /// Leaves holes where there are 64 KiB of zeros. An append has none: it sends the zeros.
    #[must_use]
    pub fn sparse(mut self) -> Self {
        self.sparse = true;
        self
    }

    /// Keeps what arrived under this name when the stream breaks; for
    /// [`Vm::upload_resumable`], which makes one up without this.
    #[must_use]
    pub fn upload_id(mut self, upload: UploadId) -> Self {
        self.request.upload = Some(upload);
        self
    }
}

impl<P: AsRef<[u8]> + ?Sized> From<&P> for FileWrite {
    fn from(path: &P) -> Self {
        Self::new(path)
    }
}

impl Vm {
    /// Writes everything that `source` gives to a file, and returns when it is on the VM's disk.
    ///
    /// ```no_run
    /// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// vm.upload("hello.txt", &b"hello"[..]).await?;
    /// let image = tokio::fs::File::open("photo.png").await?;
    /// vm.upload("photo.png", image).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn upload(
        &self,
        to: impl Into<FileWrite>,
        source: impl AsyncRead + Unpin,
    ) -> Result<FileWritten, ClientError> {
        let FileWrite { request, sparse } = to.into();
        let sparse = sparse && request.mode != WriteMode::Append;
        let hasher = request.checksum.then(blake3::Hasher::new);
        let (replies, requests) = self.begin(&request).await?;
        let written = write(replies, requests, &request, hasher, sparse, source).await;
        written.map_err(ClientError::unwrapped)
    }

    /// How far an upload has come that broke.
    pub async fn query_upload(
        &self,
        path: impl AsRef<[u8]>,
        upload: UploadId,
    ) -> Result<UploadState, ClientError> {
        let path = path.as_ref().to_vec();
        self.ask(&QueryUpload { path, upload }, Repeat::Safe).await
    }

    /// Throws away what a broken upload has left.
    pub async fn drop_upload(
        &self,
        path: impl AsRef<[u8]>,
        upload: UploadId,
    ) -> Result<(), ClientError> {
        let path = path.as_ref().to_vec();
        let request = DropUpload { path, upload };
        self.ask(&request, Repeat::Unsafe)
            .await
            .map(|_: FileDone| ())
    }
}

/// Sends the content behind a request, to the agent's last word.
pub(super) async fn write(
    mut replies: Replies,
    mut requests: Requests,
    request: &WriteFile,
    mut hasher: Option<blake3::Hasher>,
    sparse: bool,
    source: impl AsyncRead + Unpin,
) -> Result<FileWritten, ClientError> {
    let mut sent = request.offset;
    let saying = async {
        pour(&mut requests, source, sparse, |bytes| {
            sent = sent.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            if let Some(hasher) = &mut hasher {
                hasher.update(bytes);
            }
        })
        .await?;
        let blake3 = hasher.as_ref().map(|hasher| *hasher.finalize().as_bytes());
        requests.send(&WriteEnd { blake3 }).await
    };
    let is_aside = |frame: &Frame| frame.kind == Kind::WRITE_STARTED;
    let answer = converse(&mut replies, saying, is_aside).await?;
    let written: FileWritten = protocol::decode(&answer)?;
    let whole = request.mode != WriteMode::Append;
    if whole && written.size != sent {
        return Err(ClientError::Broken(format!(
            "the agent wrote {} bytes of {}; {sent} were sent",
            written.size,
            show(&request.path)
        )));
    }
    Ok(written)
}

/// Sends what the source gives in data frames, and tells of all of it.
pub(super) async fn pour(
    requests: &mut Requests,
    mut source: impl AsyncRead + Unpin,
    sparse: bool,
    mut seen: impl FnMut(&[u8]),
) -> Result<(), ClientError> {
    static ZEROS: [u8; MAX_DATA] = [0; MAX_DATA];
    let mut buffer = vec![0; MAX_DATA];
    let mut hole: u64 = 0;
    loop {
        let bytes = fill(&mut source, &mut buffer).await?;
        seen(bytes);
        if sparse && bytes == ZEROS {
            hole = hole.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            continue;
        }
        if hole > 0 {
            requests.send(&FileHole { length: hole }).await?;
            hole = 0;
        }
        if !bytes.is_empty() {
            requests.send_raw(Kind::FILE_DATA, bytes).await?;
        }
        if bytes.len() < MAX_DATA {
            return Ok(());
        }
    }
}

/// Reads until the buffer is full or the source has no more.
async fn fill<'b>(
    source: &mut (impl AsyncRead + Unpin),
    buffer: &'b mut [u8],
) -> Result<&'b [u8], ClientError> {
    let mut end: usize = 0;
    loop {
        let room = buffer.get_mut(end..).unwrap_or_default();
        if room.is_empty() {
            break;
        }
        // Kept apart from errors of our own stream, whatever is inside.
        match source.read(room).await.map_err(ClientError::Source)? {
            0 => break,
            count => end = end.saturating_add(count),
        }
    }
    Ok(buffer.get(..end).unwrap_or_default())
}
