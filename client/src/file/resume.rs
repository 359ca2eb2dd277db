//! An upload that survives lost connections: what arrived is kept in the VM under a name, compared
//! with the source by its checksum, and gone on from.

use std::io::SeekFrom;
use std::time::Duration;

use protocol::file::transfer::{FileWritten, UploadId};
use protocol::{ErrorCode, Fault, Retry};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeek, AsyncSeekExt};

use super::upload::{self, FileWrite};
use crate::error::ClientError;
use crate::vm::Vm;

/// How often in a row an upload may break without having come further.
const ATTEMPTS: u32 = 5;

/// The first pause before going on; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A fresh name for an upload.
fn new_upload_id() -> Result<UploadId, ClientError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(ClientError::Random)?;
    Ok(UploadId(id))
}

impl Vm {
    /// Writes all of `source`, from its beginning, to a file, and goes on where it was when the
    /// connection is lost. With an [`upload_id`](FileWrite::upload_id) it also goes on with what
    /// an earlier program left. Checksums are always compared; an append cannot be resumed.
    ///
    /// ```no_run
    /// # async fn example(vm: client::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// let image = tokio::fs::File::open("disk.img").await?;
    /// vm.upload_resumable("disk.img", image).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn upload_resumable(
        &self,
        to: impl Into<FileWrite>,
        mut source: impl AsyncRead + AsyncSeek + Unpin,
    ) -> Result<FileWritten, ClientError> {
        let mut to = to.into();
        to.request.checksum = true;
        // Of a name that nobody has used there is nothing to ask.
        let mut may_exist = to.request.upload.is_some();
        let upload = match to.request.upload {
            Some(upload) => upload,
            None => new_upload_id()?,
        };
        let ours = to.request.upload.is_none();
        to.request.upload = Some(upload);
        let (mut farthest, mut left, mut pause) = (0, ATTEMPTS, FIRST_PAUSE);
        loop {
            let attempt = self.attempt(&mut to, upload, may_exist, &mut source);
            let error = match attempt.await {
                Ok(written) => return Ok(written),
                Err(error) => error,
            };
            if to.request.offset > farthest {
                farthest = to.request.offset;
                (left, pause) = (ATTEMPTS, FIRST_PAUSE);
            }
            left = left.saturating_sub(1);
            if left == 0 || !may_go_on(&error) {
                if ours {
                    self.forget(&to.request.path, upload, &error).await;
                }
                return Err(error.unwrapped());
            }
            may_exist = true;
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2);
        }
    }

    /// Removes what nobody can go on with, because nobody else knows its name. Where that fails, the
    /// agent does it some day.
    async fn forget(&self, path: &[u8], upload: UploadId, why: &ClientError) {
        if is_out_of_reach(why) {
            return;
        }
        let mut pause = FIRST_PAUSE;
        for _ in 0..ATTEMPTS {
            let dropped = self.drop_upload(path, upload).await;
            // The stream that wrote it may not have ended yet.
            let busy = dropped.is_err_and(|error| error.code() == Some(ErrorCode::FileBusy));
            if !busy {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2);
        }
    }

    async fn attempt(
        &self,
        to: &mut FileWrite,
        upload: UploadId,
        may_exist: bool,
        source: &mut (impl AsyncRead + AsyncSeek + Unpin),
    ) -> Result<FileWritten, ClientError> {
        let kept = if may_exist {
            match self.query_upload(&to.request.path, upload).await {
                Ok(state) => Some(state),
                Err(error) if is_nothing(&error) => None,
                Err(error) => return Err(error),
            }
        } else {
            None
        };
        to.request.offset = 0;
        let mut hasher = blake3::Hasher::new();
        if let Some(kept) = kept.filter(|kept| kept.offset > 0) {
            seek(source, 0).await?;
            let whole = hash(source, kept.offset, &mut hasher).await?;
            if whole && *hasher.finalize().as_bytes() == kept.blake3 {
                to.request.offset = kept.offset;
            } else {
                // Of another source, or of this one before it was changed.
                hasher = blake3::Hasher::new();
            }
        }
        seek(source, to.request.offset).await?;
        let (replies, requests) = self.begin(&to.request).await?;
        let request = &to.request;
        upload::write(replies, requests, request, Some(hasher), to.sparse, source).await
    }
}

async fn seek(source: &mut (impl AsyncSeek + Unpin), to: u64) -> Result<(), ClientError> {
    let sought = source.seek(SeekFrom::Start(to)).await;
    sought.map(drop).map_err(ClientError::Source)
}

/// Hashes so many bytes; false when the source has fewer.
async fn hash(
    source: &mut (impl AsyncRead + Unpin),
    length: u64,
    hasher: &mut blake3::Hasher,
) -> Result<bool, ClientError> {
    let mut source = source.take(length);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = source.read(&mut buffer).await;
        let count = read.map_err(ClientError::Source)?;
        if count == 0 {
            return Ok(source.limit() == 0);
        }
        hasher.update(buffer.get(..count).unwrap_or_default());
    }
}

/// Nothing is kept of the upload.
fn is_nothing(error: &ClientError) -> bool {
    matches!(
        error.code(),
        Some(ErrorCode::NoSuchUpload | ErrorCode::NoSuchFile)
    )
}

/// Asking once more would only wait once more.
fn is_out_of_reach(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Connect { .. }
            | ClientError::Tls { .. }
            | ClientError::TooSlow { .. }
            | ClientError::Lost { .. }
            | ClientError::AgentGone
    )
}

fn may_go_on(error: &ClientError) -> bool {
    match error {
        ClientError::Lost { .. } | ClientError::AgentGone => true,
        _ => error.body().is_some_and(|body| {
            // The stream before may not have been noticed to be broken.
            matches!(body.code, ErrorCode::FileBusy | ErrorCode::NoSuchUpload)
                || (body.fault == Fault::Host && body.retry != Retry::No)
        }),
    }
}
