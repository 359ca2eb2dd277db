//! From a tree here to an archive for a VM. Links are packed as links and never followed, except
//! that the tree itself may be named by one. A file that becomes shorter meanwhile is filled with
//! zeros, because its length has been said.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};
use tar::{Builder, EntryType, Header};

use super::notes::Notes;

const BLOCK: usize = 512;
const MOST_LEVELS: usize = 256;

/// A file in more pieces is packed with its zeros.
const MOST_STRETCHES: usize = 65_536;

/// Longest name in a header.
const MOST_NAME: usize = 100;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a tree cannot be packed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PackError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: io::Error },
    #[error("{} has more than {MOST_LEVELS} levels; copy a part of it", path.display())]
    Deep { path: PathBuf },
    /// Whoever reads the archive has left.
    #[error("the archive was not taken: {0}")]
    Write(#[from] io::Error),
}

/// Packs all of it.
pub(super) fn pack(
    top: &Path,
    sparse: bool,
    out: impl Write,
    notes: &Notes,
) -> Result<(), PackError> {
    let mut pack = Pack {
        out: Builder::new(out),
        sparse,
        notes,
        buffer: vec![0; 256 << 10],
    };
    let about = std::fs::metadata(top).map_err(|cause| unreadable(top, cause))?;
    pack.header(&about, EntryType::Directory, b"./", b"", 0)?;
    let mut levels = vec![(top.to_owned(), Vec::new(), children(top)?)];
    while let Some((directory, prefix, rest)) = levels.last_mut() {
        let Some(child) = rest.pop() else {
            levels.pop();
            continue;
        };
        let path = directory.join(&child);
        let mut name: Vec<u8> = prefix.clone();
        name.extend_from_slice(child.as_bytes());
        let about = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let shown = path.display();
                notes.leave_out(&format!("{shown}, which is gone meanwhile"));
                continue;
            }
            about => about.map_err(|cause| unreadable(&path, cause))?,
        };
        if about.is_dir() {
            if levels.len() >= MOST_LEVELS {
                return Err(PackError::Deep { path });
            }
            name.push(b'/');
            pack.header(&about, EntryType::Directory, &name, b"", 0)?;
            let inner = children(&path)?;
            levels.push((path, name, inner));
        } else {
            pack.one(&path, &name, &about)?;
        }
    }
    // Its end is two empty blocks.
    let mut out = pack.out.into_inner()?;
    out.flush()?;
    Ok(())
}

/// The names of a directory, the last first.
fn children(path: &Path) -> Result<Vec<OsString>, PackError> {
    let names = || -> io::Result<Vec<OsString>> {
        std::fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    };
    let mut names = names().map_err(|cause| unreadable(path, cause))?;
    names.sort_by(|one, other| other.cmp(one));
    Ok(names)
}

fn unreadable(path: &Path, cause: io::Error) -> PackError {
    let path = path.to_owned();
    PackError::Read { path, cause }
}

struct Pack<'n, W: Write> {
    out: Builder<W>,
    sparse: bool,
    notes: &'n Notes,
    buffer: Vec<u8>,
}

impl<W: Write> Pack<'_, W> {
    /// What is no directory.
    fn one(&mut self, path: &Path, name: &[u8], about: &Metadata) -> Result<(), PackError> {
        if about.is_symlink() {
            let target = std::fs::read_link(path).map_err(|cause| unreadable(path, cause))?;
            let target = target.as_os_str().as_bytes();
            return self.header(about, EntryType::Symlink, name, target, 0);
        }
        if !about.is_file() {
            let shown = path.display();
            self.notes
                .leave_out(&format!("{shown}, a device, a pipe or a socket"));
            return Ok(());
        }
        // What was a file a moment ago may be a link or a pipe now: neither is waited for.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let open = || -> io::Result<(File, Metadata)> {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(flags.bits())
                .open(path)?;
            let about = file.metadata()?;
            Ok((file, about))
        };
        let (mut file, about) = open().map_err(|cause| unreadable(path, cause))?;
        if !about.is_file() {
            let shown = path.display();
            self.notes
                .leave_out(&format!("{shown}, which is no file any more"));
            return Ok(());
        }
        let size = about.len();
        let map = match self.sparse && about.blocks().saturating_mul(512) < size {
            true => stretches(&file, size),
            false => None,
        };
        let Some(map) = map else {
            self.header(&about, EntryType::Regular, name, b"", size)?;
            self.stretch(&mut file, path, 0, size)?;
            return self.pad(size);
        };
        let content = self.map(&about, name, size, &map)?;
        for (offset, length) in map {
            self.stretch(&mut file, path, offset, length)?;
        }
        self.pad(content)
    }

    fn header(
        &mut self,
        about: &Metadata,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        size: u64,
    ) -> Result<(), PackError> {
        let time = time(about);
        let mut records: Vec<(&str, &[u8])> = Vec::new();
        if name.len() > MOST_NAME {
            records.push(("path", name));
        }
        if link.len() > MOST_NAME {
            records.push(("linkpath", link));
        }
        if let Some(time) = &time {
            records.push(("mtime", time.as_bytes()));
        }
        self.out.append_pax_extensions(records)?;
        self.plain_header(about, kind, name, link, size)
    }

    fn plain_header(
        &mut self,
        about: &Metadata,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        size: u64,
    ) -> Result<(), PackError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(about.mode() & 0o7777);
        header.set_uid(u64::from(about.uid()));
        header.set_gid(u64::from(about.gid()));
        header.set_mtime(u64::try_from(about.mtime()).unwrap_or(0));
        header.set_size(size);
        let fields = header.as_old_mut();
        for (field, text) in [(&mut fields.name, name), (&mut fields.linkname, link)] {
            for (to, from) in field.iter_mut().zip(text) {
                *to = *from;
            }
        }
        header.set_cksum();
        Ok(self.out.get_mut().write_all(header.as_bytes())?)
    }

    /// The header of a file with holes and the map of its content, in GNU's format 1.0. Gives the
    /// length of the content.
    fn map(
        &mut self,
        about: &Metadata,
        name: &[u8],
        size: u64,
        map: &[(u64, u64)],
    ) -> Result<u64, PackError> {
        let mut text = format!("{}\n", map.len()).into_bytes();
        for (offset, length) in map {
            text.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
        }
        text.resize(text.len().next_multiple_of(BLOCK), 0);
        let content = map
            .iter()
            .fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
        let (size, time) = (size.to_string(), time(about));
        let mut records: Vec<(&str, &[u8])> = vec![
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", size.as_bytes()),
        ];
        if let Some(time) = &time {
            records.push(("mtime", time.as_bytes()));
        }
        self.out.append_pax_extensions(records)?;
        let stored = u64::try_from(text.len()).unwrap_or(0);
        let stored = stored.saturating_add(content);
        let stand_in = b"GNUSparseFile.0/file";
        self.plain_header(about, EntryType::Regular, stand_in, b"", stored)?;
        self.out.get_mut().write_all(&text)?;
        Ok(content)
    }

    /// Exactly so many bytes of a file.
    fn stretch(
        &mut self,
        file: &mut File,
        path: &Path,
        offset: u64,
        length: u64,
    ) -> Result<(), PackError> {
        let wrong = |cause| unreadable(path, cause);
        file.seek(SeekFrom::Start(offset)).map_err(wrong)?;
        let mut left = length;
        let mut is_short = false;
        while left > 0 {
            let turn = usize::try_from(left).unwrap_or(usize::MAX);
            let turn = turn.min(self.buffer.len());
            let room = self.buffer.get_mut(..turn).unwrap_or_default();
            let count = file.read(room).map_err(wrong)?;
            if count == 0 && !is_short {
                is_short = true;
                let shown = path.display();
                self.notes.leave_out(&format!(
                    "the end of {shown}, which became shorter meanwhile"
                ));
            }
            // Its length was told already: zeros stand for what is missing.
            let bytes = match count {
                0 => ZEROS.get(..turn).unwrap_or(&ZEROS),
                count => room.get(..count).unwrap_or_default(),
            };
            self.out.get_mut().write_all(bytes)?;
            left = left.saturating_sub(u64::try_from(bytes.len()).unwrap_or(left));
        }
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<(), PackError> {
        let block = u64::try_from(BLOCK).unwrap_or(512);
        let padding = size.next_multiple_of(block).saturating_sub(size);
        let padding = usize::try_from(padding).unwrap_or(0);
        let zeros = ZEROS.get(..padding).unwrap_or_default();
        Ok(self.out.get_mut().write_all(zeros)?)
    }
}

/// The time of its last change, where a header has no room for it.
fn time(about: &Metadata) -> Option<String> {
    (about.mtime() >= 0 && about.mtime_nsec() > 0)
        .then(|| format!("{}.{:09}", about.mtime(), about.mtime_nsec()))
}

/// Where the content of a file is; none when it is in too many places or cannot be asked. A file
/// that ends in a hole has an empty stretch at its end.
fn stretches(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    let seek = |at: u64, whence| {
        let found = lseek(file, i64::try_from(at).ok()?, whence).ok()?;
        u64::try_from(found).ok()
    };
    let mut map = Vec::new();
    let mut at = 0;
    while at < size {
        // None: no content is left.
        let Some(data) = seek(at, Whence::SeekData).filter(|data| *data < size) else {
            break;
        };
        let hole = seek(data, Whence::SeekHole)?.min(size);
        if map.len() >= MOST_STRETCHES || hole <= data {
            return None;
        }
        map.push((data, hole.saturating_sub(data)));
        at = hole;
    }
    if at < size {
        map.push((size, 0));
    }
    Some(map)
}
