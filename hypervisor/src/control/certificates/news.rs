//! News of files: that one of them may have changed. The kernel tells what happens in their
//! directories, and in those that links to them lead to, because tools replace files by new ones
//! and links by new links.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Links that are followed from one file.
const MAX_LINKS: usize = 8;

pub(super) struct News(AsyncFd<Watch>);

struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl News {
    /// Of these files, from now on. A directory that is not there is waited for in the one above.
    pub(super) fn of<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        for file in files {
            let mut file = file.clone();
            for _ in 0..MAX_LINKS {
                watch(&inotify, &file)?;
                match std::fs::read_link(&file) {
                    Ok(target) => {
                        file = file.parent().unwrap_or(Path::new("/")).join(target);
                    }
                    Err(_) => break,
                }
            }
        }
        // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
        // dropped: nothing here takes it out again.
        let registered = unsafe { AsyncFd::register(Watch(inotify)) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Waits until there was some. What it was does not matter: the reader looks at everything.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.get_inner().0.read_events() {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => guard.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The directories above a file, the nearest that is there and the one above it: a directory may
/// be a link that is replaced, too.
fn watch(inotify: &Inotify, file: &Path) -> io::Result<()> {
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    let mut watched = 0_u8;
    for directory in file.ancestors().skip(1) {
        let directory = match directory.as_os_str().is_empty() {
            true => Path::new("."),
            false => directory,
        };
        match inotify.add_watch(directory, flags) {
            Ok(_) => watched = watched.saturating_add(1),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
        if watched == 2 {
            break;
        }
    }
    Ok(())
}
