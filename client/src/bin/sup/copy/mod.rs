//! `sup cp`: files and trees between this machine and VMs. A file has its name only when it is
//! whole, here as there; what broke is gone on from, in this run and in the next one. What a VM
//! sends is never believed: nothing outside the destination is written.

mod ahead;
mod archive;
mod beneath;
mod fetch;
mod notes;
mod pack;
mod patience;
mod place;
mod send;
mod unpack;
mod waiting;

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use client::file::{FileRead, FileWrite, TreeRead};
use client::protocol::ErrorCode;
use client::protocol::file::FileType;
use client::protocol::vm::VmRef;
use client::{Client, ClientError, Vm};
use tokio::sync::mpsc;

use crate::complaint::Complaint;
use crate::session::{INTERRUPTED, Interrupts, READER_GONE};
use notes::{Counted, Notes};
use place::Place;

/// How long an interrupted copy may take to put away what it has begun.
const PUTTING_AWAY: Duration = Duration::from_secs(5);

/// `sup cp`.
#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// What to copy, and at the end where to: PATH here, VM:PATH in a VM, `-` for standard input or
    /// output. A relative path in a VM starts at /workspace; `./a:b` is a file here
    #[arg(required = true, num_args = 2.., value_name = "PATH", value_parser = place::parser())]
    places: Vec<Place>,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    /// Keep holes: files take no more room than before
    #[arg(long)]
    sparse: bool,
    /// Take links from a VM that lead out of what is copied, too
    #[arg(long)]
    all_links: bool,
    /// Directories are copied with or without it
    #[arg(short, long, hide = true)]
    recursive: bool,
}

/// What is the same for everything that one call copies.
struct Job<'c> {
    client: &'c Client,
    sparse: bool,
    all_links: bool,
    notes: Notes,
    /// Nobody reads our standard output any more.
    reader_gone: Cell<bool>,
    /// Held by the threads that have something to put away when we leave.
    busy: mpsc::Sender<()>,
}

/// Where to, with what is known of it.
enum Target {
    Local {
        path: PathBuf,
        directory: bool,
    },
    Remote {
        vm: Vm,
        path: Vec<u8>,
        directory: bool,
    },
    Stdout,
}

pub(crate) async fn run(client: &Client, copy: Copy) -> Result<u8, Complaint> {
    let mut interrupts = Interrupts::new()?;
    let mut sources = copy.places;
    let Some(destination) = sources.pop() else {
        return Err(usage("there is nothing to copy"));
    };
    check(&sources, &destination)?;
    let (busy, mut idle) = mpsc::channel(1);
    let job = Job {
        client,
        sparse: copy.sparse,
        all_links: copy.all_links,
        notes: Notes::new(copy.quiet),
        reader_gone: Cell::new(false),
        busy,
    };
    let result = tokio::select! {
        result = job.all(sources, destination) => result,
        () = interrupts.next() => Ok(INTERRUPTED),
    };
    let (left_out, reader_gone) = (job.notes.left_out(), job.reader_gone.get());
    job.notes.clear();
    drop(job);
    // Only an interrupted copy has any left.
    let _ = tokio::time::timeout(PUTTING_AWAY, idle.recv()).await;
    match result {
        Ok(0) if reader_gone => Ok(READER_GONE),
        Ok(0) if left_out > 0 => Ok(1),
        result => result,
    }
}

fn usage(why: &str) -> Complaint {
    Complaint::new("reading what to copy", why)
        .advice("`sup help cp` says how to write it")
        .usage()
}

fn check(sources: &[Place], destination: &Place) -> Result<(), Complaint> {
    let local = |place: &Place| !matches!(place, Place::Vm { .. });
    if local(destination) && sources.iter().any(local) {
        return Err(usage("neither side is in a VM"));
    }
    let many = sources.len() > 1;
    if many && matches!(destination, Place::Standard) {
        return Err(usage("standard output takes one file"));
    }
    if many && sources.iter().any(|place| matches!(place, Place::Standard)) {
        return Err(usage("standard input cannot be one of several files"));
    }
    Ok(())
}

impl Job<'_> {
    async fn all(&self, sources: Vec<Place>, destination: Place) -> Result<u8, Complaint> {
        let many = sources.len() > 1;
        let target = self.target(&destination).await?;
        if many && !target.is_directory() {
            return Err(Complaint::new(
                &format!("copying to {destination}"),
                "several files need a directory, and it is none",
            )
            .advice("make it first"));
        }
        let mut code = 0;
        for source in sources {
            if let Err(complaint) = self.one(&source, &target).await {
                if !many {
                    return Err(complaint);
                }
                self.notes.say(|| complaint.print());
                code = 1;
            }
        }
        Ok(code)
    }

    async fn target(&self, destination: &Place) -> Result<Target, Complaint> {
        let what = format!("copying to {destination}");
        let no_directory = |must: bool, is: bool| match must && !is {
            true => Err(Complaint::new(&what, "there is no such directory")),
            false => Ok(()),
        };
        Ok(match destination {
            Place::Standard => Target::Stdout,
            Place::Local(path) => {
                let directory = path.is_dir();
                no_directory(ends_with_slash(path.as_os_str().as_bytes()), directory)?;
                Target::Local {
                    path: path.clone(),
                    directory,
                }
            }
            Place::Vm { vm, path } => {
                let vm = self.client.vm(vm.clone());
                let directory = match patience::again(|| vm.stat(path)).await {
                    Ok(info) => info.file_type == FileType::Directory,
                    Err(error) if is_missing(&error) => false,
                    Err(error) => return Err(Complaint::of(&what, &error)),
                };
                no_directory(ends_with_slash(path), directory)?;
                Target::Remote {
                    vm,
                    path: path.clone(),
                    directory,
                }
            }
        })
    }

    async fn one(&self, source: &Place, target: &Target) -> Result<(), Complaint> {
        let what = format!("copying {source}");
        match (source, target) {
            (Place::Local(from), Target::Remote { vm, .. }) => {
                let to = target.remote(&what, || base(from.as_os_str().as_bytes()))?;
                send::send(self, from, vm, &to, &what).await
            }
            (
                Place::Standard,
                Target::Remote {
                    vm,
                    path,
                    directory,
                },
            ) => {
                if *directory {
                    return Err(Complaint::new(&what, "the file there needs a name")
                        .advice("write it after the directory"));
                }
                let written = vm.upload(FileWrite::new(path), tokio::io::stdin()).await;
                written
                    .map(drop)
                    .map_err(|error| Complaint::of(&what, &error))
            }
            (
                Place::Vm { vm, path },
                Target::Local {
                    path: to,
                    directory,
                },
            ) => {
                let from = self.client.vm(vm.clone());
                let to = if *directory {
                    let name = base(path).ok_or_else(|| nameless(&what))?;
                    to.join(OsStr::from_bytes(name))
                } else {
                    to.clone()
                };
                fetch::fetch(self, &from, path, &to, &what).await
            }
            (Place::Vm { vm, path }, Target::Stdout) => {
                fetch::print(self, &self.client.vm(vm.clone()), path, &what).await
            }
            (Place::Vm { vm, path }, Target::Remote { vm: there, .. }) => {
                let to = target.remote(&what, || base(path))?;
                self.across(vm, path, there, &to, &what).await
            }
            (Place::Local(_) | Place::Standard, Target::Local { .. } | Target::Stdout) => {
                Err(usage("neither side is in a VM"))
            }
        }
    }

    /// From VM to VM, through us and kept nowhere.
    async fn across(
        &self,
        vm: &VmRef,
        from: &[u8],
        there: &Vm,
        to: &[u8],
        what: &str,
    ) -> Result<(), Complaint> {
        let wrong = |error: ClientError| Complaint::of(what, &error);
        let here = self.client.vm(vm.clone());
        let info = here.stat(from).await.map_err(wrong)?;
        let bar = self.notes.bar(from, None);
        if info.file_type == FileType::Directory {
            let mut read = TreeRead::new(from).checked();
            if self.sparse {
                read = read.sparse();
            }
            let archive = here.pack(read).await.map_err(wrong)?;
            let unpacked = there.unpack(to, Counted::new(archive, &bar)).await;
            unpacked.map_err(wrong)?;
        } else {
            let mut write = FileWrite::new(to).permissions(info.mode & 0o777).checked();
            if self.sparse {
                write = write.sparse();
            }
            let content = here.download(FileRead::new(from).checked()).await;
            let content = Counted::new(content.map_err(wrong)?, &bar);
            there.upload(write, content).await.map_err(wrong)?;
        }
        bar.finish();
        Ok(())
    }
}

impl Target {
    fn is_directory(&self) -> bool {
        match self {
            Self::Local { directory, .. } | Self::Remote { directory, .. } => *directory,
            Self::Stdout => false,
        }
    }

    /// The path of what gets this name there.
    fn remote<'n>(
        &self,
        what: &str,
        name: impl Fn() -> Option<&'n [u8]>,
    ) -> Result<Vec<u8>, Complaint> {
        let Self::Remote {
            path, directory, ..
        } = self
        else {
            return Err(usage("neither side is in a VM"));
        };
        if !directory {
            return Ok(path.clone());
        }
        let name = name().ok_or_else(|| nameless(what))?;
        let mut path = path.clone();
        if !path.is_empty() && !ends_with_slash(&path) {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Ok(path)
    }
}

fn nameless(what: &str) -> Complaint {
    Complaint::new(what, "what is copied has no name of its own to get there")
        .advice("name a destination that does not exist yet")
}

fn is_missing(error: &ClientError) -> bool {
    error.code() == Some(ErrorCode::NoSuchFile)
}

fn ends_with_slash(path: &[u8]) -> bool {
    path.last() == Some(&b'/')
}

/// The last name of a path; none of one that ends in `.` or `..`, or has none.
fn base(path: &[u8]) -> Option<&[u8]> {
    let end = path.iter().rposition(|byte| *byte != b'/')?;
    let path = path.get(..=end)?;
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    (name != b"." && name != b"..").then_some(name)
}

/// For people, and harmless to a terminal.
fn show(path: &Path) -> String {
    crate::complaint::harmless(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_copy_is_the_last_name_that_the_user_wrote() {
        for (path, name) in [("a", "a"), ("/a/b", "b"), ("a/b//", "b"), ("../c", "c")] {
            assert_eq!(base(path.as_bytes()), Some(name.as_bytes()), "{path}");
        }
        for path in ["", "/", ".", "..", "a/..", "a/./"] {
            assert_eq!(base(path.as_bytes()), None, "{path}");
        }
    }
}
