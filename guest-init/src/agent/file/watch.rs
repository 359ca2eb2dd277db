//! Changes as they happen, by inotify. The queue is the kernel's, which is bounded and says when it
//! lost something; while the client does not take what is there, nothing is read from it. With
//! `recursive` every directory has a watch, also the ones that come later.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::{Mode, fstat};
use protocol::file::FileType;
use protocol::file::watch::{FileChange, FileEvent, FileEvents, WatchFiles, WatchStarted};
use protocol::{ErrorBody, ErrorCode};

use super::entries::{Entries, look};
use super::error::{refused, show};
use super::{info, path};
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};
use crate::agent::{Agent, unsupported};

/// Directories that one stream watches.
const MAX_WATCHED: usize = 8192;
/// Levels of directories that are looked through for new ones.
const MAX_DEPTH: usize = 128;
/// Nothing more is read from the kernel while so many bytes wait for the client.
const MAX_WAITING: usize = 256 << 10;
/// Changes in one message, and bytes of their paths after which it is full.
const BATCH: usize = 1024;
const BATCH_BYTES: usize = 64 << 10;
/// Changes, and bytes of their paths, that are held at once; what is more is told as lost.
const MAX_TOLD: usize = 8192;
const MAX_TOLD_BYTES: usize = 1 << 20;

/// Serves a watch until the client ends it.
pub(super) fn serve(
    agent: &Agent,
    request: WatchFiles,
    mut stream: Stream,
) -> Result<(), StreamError> {
    let begun = path::parse(request.path, &agent.workspace)
        .and_then(|path| Watch::begin(path, request.recursive));
    match begun {
        Ok((mut watch, missed)) => {
            let watched = u32::try_from(watch.paths.len()).unwrap_or(u32::MAX);
            stream.queue(&WatchStarted { watched })?;
            send(&mut stream, missed)?;
            watch.serve(stream)
        }
        Err(error) => stream.refuse(&error),
    }
}

fn send(stream: &mut Stream, told: Told) -> Result<(), StreamError> {
    let mut batch = Told::default();
    for event in told.events {
        if batch.events.len() >= BATCH || batch.bytes >= BATCH_BYTES {
            let events = std::mem::take(&mut batch).events;
            stream.queue(&FileEvents { events })?;
        }
        batch.push(event);
    }
    let events = batch.events;
    if !events.is_empty() {
        stream.queue(&FileEvents { events })?;
    }
    Ok(())
}

/// Changes on their way to the client, no more than memory should hold.
#[derive(Default)]
struct Told {
    events: Vec<FileEvent>,
    bytes: usize,
}

impl Told {
    fn push(&mut self, event: FileEvent) {
        self.bytes = self.bytes.saturating_add(event.path.len());
        self.events.push(event);
    }

    fn is_full(&self) -> bool {
        self.events.len() >= MAX_TOLD || self.bytes >= MAX_TOLD_BYTES
    }

    /// The client has to look for itself. What is not watched it could not see there.
    fn overflow(&mut self) {
        let mut events = std::mem::take(self).events;
        events.retain(|event| event.change == FileChange::NotWatched);
        self.push(event(FileChange::Overflow, Vec::new(), true));
        for event in events {
            self.push(event);
        }
    }
}

struct Watch {
    inotify: Inotify,
    root: PathBuf,
    recursive: bool,
    /// What is watched, relative to the root.
    paths: HashMap<WatchDescriptor, Vec<u8>>,
}

fn event(change: FileChange, path: Vec<u8>, directory: bool) -> FileEvent {
    FileEvent {
        change,
        path,
        directory,
        cookie: 0,
    }
}

impl Watch {
    fn begin(root: PathBuf, recursive: bool) -> Result<(Self, Told), ErrorBody> {
        let failed = |errno| match errno {
            Errno::ENOSPC | Errno::EMFILE => {
                let message = format!(
                    "cannot watch {}: as much is watched in the VM as fs.inotify allows",
                    show(&root)
                );
                ErrorBody::guest(ErrorCode::FileFailed, message)
                    .with_detail(format!("{errno:?}\n{}", show(&root)))
            }
            errno => refused("watch", &root, errno),
        };
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        let handle =
            open(&root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
        let about = fstat(&handle).map_err(failed)?;
        let mut watch = Self {
            inotify,
            root: root.clone(),
            recursive: recursive && info::file_type(&about) == FileType::Directory,
            paths: HashMap::new(),
        };
        watch.add(handle.as_fd(), Vec::new()).map_err(failed)?;
        let mut missed = Told::default();
        if watch.recursive {
            let top = Entries::open(&root).map_err(failed)?;
            watch.look_through(top, Vec::new(), false, &mut missed);
        }
        Ok((watch, missed))
    }

    fn serve(&mut self, mut stream: Stream) -> Result<(), StreamError> {
        let mut frames = Vec::new();
        loop {
            stream.flush()?;
            let room = stream.pending() < MAX_WAITING;
            let mut interests = [
                stream.interest(room),
                if room {
                    Interest::new(self.inotify.as_fd(), true, false)
                } else {
                    Interest::NONE
                },
            ];
            poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
            let [client, changes] = interests;
            if client.has_input() && room {
                stream.read(&mut frames)?;
                for frame in frames.drain(..) {
                    stream.queue(&unsupported(frame.kind))?;
                }
            } else if client.hung_up() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
            if changes.readable() {
                let raw = match self.inotify.read_events() {
                    Ok(raw) => raw,
                    Err(Errno::EAGAIN | Errno::EINTR) => continue,
                    Err(errno) => {
                        return stream.refuse(&refused("watch", &self.root, errno));
                    }
                };
                let mut told = Told::default();
                for one in raw {
                    self.take(one, &mut told);
                }
                send(&mut stream, told)?;
            }
        }
    }

    /// Watches what is open. A directory that is watched already gets its new path.
    fn add(&mut self, handle: BorrowedFd<'_>, path: Vec<u8>) -> Result<(), Errno> {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        let name = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let descriptor = self.inotify.add_watch(name.as_str(), flags)?;
        if self.paths.len() >= MAX_WATCHED && !self.paths.contains_key(&descriptor) {
            // It ends with the directory if not here.
            let _ = self.inotify.rm_watch(descriptor);
            return Err(Errno::ENOSPC);
        }
        self.paths.insert(descriptor, path);
        Ok(())
    }

    /// Watches the directories below `top`, and with `tell` says what is in them: it came before
    /// anybody watched. All of them are watched, also when there is too much in them to be told.
    fn look_through(&mut self, top: Entries, path: Vec<u8>, mut tell: bool, told: &mut Told) {
        let mut levels = vec![(top, path.len())];
        let start = path.len();
        let mut path = path;
        while let Some((entries, prefix)) = levels.last_mut() {
            path.truncate(*prefix);
            // One that cannot be read any more has gone, which its own watch tells.
            let Ok(Some((name, kind))) = entries.next_owned() else {
                levels.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            let is_directory = match kind {
                libc::DT_UNKNOWN => look(entries.as_fd(), &name)
                    .is_ok_and(|about| info::file_type(&about) == FileType::Directory),
                kind => kind == libc::DT_DIR,
            };
            if tell {
                told.push(event(FileChange::Created, path.clone(), is_directory));
                if told.is_full() {
                    told.overflow();
                    tell = false;
                }
            }
            if !is_directory {
                continue;
            }
            let Ok(below) = Entries::open_in(entries.as_fd(), &name) else {
                continue;
            };
            let watched = if levels.len() < MAX_DEPTH {
                self.add(below.as_fd(), path.clone())
            } else {
                Err(Errno::ENAMETOOLONG)
            };
            match watched {
                Ok(()) => levels.push((below, path.len())),
                Err(_) => told.push(event(FileChange::NotWatched, path.clone(), true)),
            }
            if told.is_full() {
                told.overflow();
                tell = false;
            }
            if told.is_full() {
                // More directories are not watched than can be named.
                path.truncate(start);
                *told = Told::default();
                told.overflow();
                told.push(event(FileChange::NotWatched, path, true));
                return;
            }
        }
    }

    fn take(&mut self, raw: InotifyEvent, events: &mut Told) {
        let mask = raw.mask;
        let has = |flag| mask.contains(flag);
        if has(AddWatchFlags::IN_Q_OVERFLOW) {
            events.push(event(FileChange::Overflow, Vec::new(), true));
            self.again(events);
            return;
        }
        let Some(watched) = self.paths.get(&raw.wd) else {
            return;
        };
        let is_root = watched.is_empty();
        if has(AddWatchFlags::IN_IGNORED) {
            self.paths.remove(&raw.wd);
            return;
        }
        let mut path = watched.clone();
        let directory = has(AddWatchFlags::IN_ISDIR);
        if has(AddWatchFlags::IN_DELETE_SELF)
            || has(AddWatchFlags::IN_MOVE_SELF)
            || has(AddWatchFlags::IN_UNMOUNT)
        {
            // Of another one the directory that it is in tells.
            if is_root {
                events.push(event(FileChange::Gone, path, directory));
            }
            return;
        }
        if let Some(name) = raw.name {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name.into_vec());
        } else if !is_root {
            // Told by the directory that it is in, too.
            return;
        }
        let changes = [
            (AddWatchFlags::IN_CREATE, FileChange::Created),
            (AddWatchFlags::IN_MODIFY, FileChange::Modified),
            (AddWatchFlags::IN_CLOSE_WRITE, FileChange::Closed),
            (AddWatchFlags::IN_ATTRIB, FileChange::Attributes),
            (AddWatchFlags::IN_DELETE, FileChange::Removed),
            (AddWatchFlags::IN_MOVED_FROM, FileChange::MovedFrom),
            (AddWatchFlags::IN_MOVED_TO, FileChange::MovedTo),
        ];
        let Some((_, change)) = changes.into_iter().find(|(flag, _)| has(*flag)) else {
            return;
        };
        events.push(FileEvent {
            change,
            path: path.clone(),
            directory,
            cookie: raw.cookie,
        });
        if !self.recursive || !directory {
            return;
        }
        match change {
            FileChange::Created | FileChange::MovedTo => self.watch_new(path, events),
            FileChange::MovedFrom => self.forget(&path),
            _ => {}
        }
    }

    /// A directory has come: it is watched, and what is in it already is told.
    fn watch_new(&mut self, path: Vec<u8>, events: &mut Told) {
        let place = self.root.join(OsStr::from_bytes(&path));
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(directory) = open(&place, flags, Mode::empty()) else {
            return;
        };
        match self.add(directory.as_fd(), path.clone()) {
            Ok(()) => self.look_through(Entries::new(directory), path, true, events),
            Err(_) => events.push(event(FileChange::NotWatched, path, true)),
        }
    }

    /// A directory has gone elsewhere: what happens in it is not ours any more.
    fn forget(&mut self, path: &[u8]) {
        let below = |other: &[u8]| {
            other
                .strip_prefix(path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let gone: Vec<WatchDescriptor> = self
            .paths
            .iter()
            .filter(|(_, other)| below(other))
            .map(|(descriptor, _)| *descriptor)
            .collect();
        for descriptor in gone {
            self.paths.remove(&descriptor);
            // It may have ended by itself.
            let _ = self.inotify.rm_watch(descriptor);
        }
    }

    /// Directories may have come unseen.
    fn again(&mut self, events: &mut Told) {
        if self.recursive
            && let Ok(top) = Entries::open(&self.root)
        {
            self.look_through(top, Vec::new(), false, events);
        }
    }
}
