//! Small operations on files: one question, one answer.

use protocol::file::manage::{
    ChangeMode, ChangeOwner, FilesRemoved, LinkTarget, MakeDirectory, MakeSymlink, ReadLink,
    RemoveFile, RenameFile, ResizeFile, StatFile,
};
use protocol::file::{FileDone, FileInfo};

use crate::error::ClientError;
use crate::vm::{Repeat, Vm};

impl Vm {
    /// Looks at a file; links are followed.
    pub async fn stat(&self, path: impl AsRef<[u8]>) -> Result<FileInfo, ClientError> {
        self.look(path.as_ref(), true).await
    }

    /// Looks at a file; of a link, at the link, with where it points.
    pub async fn stat_link(&self, path: impl AsRef<[u8]>) -> Result<FileInfo, ClientError> {
        self.look(path.as_ref(), false).await
    }

    async fn look(&self, path: &[u8], follow: bool) -> Result<FileInfo, ClientError> {
        let path = path.to_vec();
        self.ask(&StatFile { path, follow }, Repeat::Safe).await
    }

    /// Makes a directory, which must not exist; `mode` is exact.
    pub async fn mkdir(&self, path: impl AsRef<[u8]>, mode: u32) -> Result<(), ClientError> {
        self.make_directory(path.as_ref(), mode, false).await
    }

    /// Makes a directory and its missing parents. One that exists is success.
    pub async fn mkdir_all(&self, path: impl AsRef<[u8]>) -> Result<(), ClientError> {
        self.make_directory(path.as_ref(), 0o755, true).await
    }

    async fn make_directory(
        &self,
        path: &[u8],
        mode: u32,
        parents: bool,
    ) -> Result<(), ClientError> {
        let request = MakeDirectory {
            path: path.to_vec(),
            mode,
            parents,
        };
        let repeat = if parents {
            Repeat::Safe
        } else {
            Repeat::Unsafe
        };
        self.ask(&request, repeat).await.map(|_: FileDone| ())
    }

    /// Gives a file another name, in the place of what has it.
    pub async fn rename(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
    ) -> Result<(), ClientError> {
        self.give_name(from.as_ref(), to.as_ref(), false).await
    }

    /// Gives a file another name, which must be free.
    pub async fn rename_new(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
    ) -> Result<(), ClientError> {
        self.give_name(from.as_ref(), to.as_ref(), true).await
    }

    async fn give_name(&self, from: &[u8], to: &[u8], no_replace: bool) -> Result<(), ClientError> {
        let request = RenameFile {
            from: from.to_vec(),
            to: to.to_vec(),
            no_replace,
        };
        self.ask(&request, Repeat::Unsafe)
            .await
            .map(|_: FileDone| ())
    }

    /// Removes a file, a link or an empty directory.
    pub async fn remove(&self, path: impl AsRef<[u8]>) -> Result<(), ClientError> {
        self.take_away(path.as_ref(), false).await.map(drop)
    }

    /// Removes a file, or a directory with all that is in it; gives the number of names. It goes
    /// on when the connection is lost.
    pub async fn remove_all(&self, path: impl AsRef<[u8]>) -> Result<u64, ClientError> {
        self.take_away(path.as_ref(), true).await
    }

    async fn take_away(&self, path: &[u8], recursive: bool) -> Result<u64, ClientError> {
        let path = path.to_vec();
        let request = RemoveFile { path, recursive };
        let removed: FilesRemoved = self.ask(&request, Repeat::Unsafe).await?;
        Ok(removed.count)
    }

    /// Makes a symbolic link at `path` that says `target`.
    pub async fn symlink(
        &self,
        target: impl AsRef<[u8]>,
        path: impl AsRef<[u8]>,
    ) -> Result<(), ClientError> {
        let request = MakeSymlink {
            target: target.as_ref().to_vec(),
            path: path.as_ref().to_vec(),
        };
        self.ask(&request, Repeat::Unsafe)
            .await
            .map(|_: FileDone| ())
    }

    /// Where a symbolic link points.
    pub async fn read_link(&self, path: impl AsRef<[u8]>) -> Result<Vec<u8>, ClientError> {
        let path = path.as_ref().to_vec();
        let link: LinkTarget = self.ask(&ReadLink { path }, Repeat::Safe).await?;
        Ok(link.target)
    }

    /// Sets the twelve permission bits; links are followed.
    pub async fn chmod(&self, path: impl AsRef<[u8]>, mode: u32) -> Result<(), ClientError> {
        let path = path.as_ref().to_vec();
        let done: Result<FileDone, _> = self.ask(&ChangeMode { path, mode }, Repeat::Safe).await;
        done.map(drop)
    }

    /// Sets owner and group, by name or number; empty leaves one as it is. Links are followed.
    pub async fn chown(
        &self,
        path: impl AsRef<[u8]>,
        user: &str,
        group: &str,
    ) -> Result<(), ClientError> {
        self.give_owner(path.as_ref(), user, group, true).await
    }

    /// The same for a link itself.
    pub async fn chown_link(
        &self,
        path: impl AsRef<[u8]>,
        user: &str,
        group: &str,
    ) -> Result<(), ClientError> {
        self.give_owner(path.as_ref(), user, group, false).await
    }

    async fn give_owner(
        &self,
        path: &[u8],
        user: &str,
        group: &str,
        follow: bool,
    ) -> Result<(), ClientError> {
        let request = ChangeOwner {
            path: path.to_vec(),
            user: user.into(),
            group: group.into(),
            follow,
        };
        self.ask(&request, Repeat::Safe).await.map(|_: FileDone| ())
    }

    /// Makes a file that exists longer, with zeros, or shorter.
    pub async fn truncate(&self, path: impl AsRef<[u8]>, length: u64) -> Result<(), ClientError> {
        let path = path.as_ref().to_vec();
        let done: Result<FileDone, _> = self.ask(&ResizeFile { path, length }, Repeat::Safe).await;
        done.map(drop)
    }
}
