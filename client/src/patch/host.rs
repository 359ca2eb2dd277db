//! What the JavaScript side of a patch can ask for, as plain functions of Rust values: VMs through
//! the backend, transfers, the store, media and the screen. Nothing here knows JavaScript; the
//! `natives` module connects the two.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{ProcessId, VmId};
use serde::Deserialize;

use super::backend::{self, Backend, Command, Ending, Program, Record, Source, VmFacts, Whence};
use super::fetch::{self, Fetched};
use super::media::{self, Class, Media, Room};
use super::output::{Collected, Pieces, last_lines};
use super::screen::Screen;
use super::store::{Scope, Store, StoreError};
use super::transfer::{Product, Transfers};
use super::{Failure, Interrupt, input};

/// The largest file that `cat` returns.
const MAX_CAT: u64 = 32 << 20;
/// The most generators that read output at one time. Each has a stream of the connection, which has 256
/// at most, and commands and transfers need some, too.
const MAX_READERS: usize = 128;
/// Where relative paths begin.
const WORKSPACE: &str = "/workspace";

/// A command as the JavaScript side passes it on.
#[derive(Deserialize)]
struct Ordered {
    shell: Option<String>,
    #[serde(default)]
    argv: Vec<String>,
    cwd: Option<String>,
    #[serde(default)]
    env: Vec<(String, Option<String>)>,
}

/// A command's output and end.
pub(super) struct Ran {
    pub(super) collected: Collected,
    pub(super) ending: Ending,
}

pub(super) struct Host {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) interrupt: Interrupt,
    pub(super) room: Arc<Room>,
    pub(super) transfers: RefCell<Transfers>,
    pub(super) screen: RefCell<Screen>,
    pub(super) readers: RefCell<HashMap<u32, Pieces>>,
    pub(super) next_reader: RefCell<u32>,
    pub(super) store: OnceCell<Store>,
    pub(super) store_directory: PathBuf,
    pub(super) patch: String,
    pub(super) chat: String,
    pub(super) user: String,
}

impl Host {
    pub(super) fn create(&self) -> Result<VmFacts, Failure> {
        self.backend.create()
    }

    pub(super) fn delete(&self, vm: &str) -> Result<(), Failure> {
        self.backend.delete(&vm_id(vm)?)
    }

    /// Runs a command to its end. A failure is only what leaves no result.
    pub(super) fn exec(&self, vm: &str, order: &str) -> Result<Ran, Failure> {
        let command = command(order)?;
        let vm = vm_id(vm)?;
        let mut collected = Collected::default();
        let ended = self.backend.exec(&vm, &command, &mut |source, bytes| {
            collected.push(source, bytes)
        });
        settle(collected, ended.map(|ended| Ending::from(&ended)))
    }

    /// Starts a process; beside its identifier, why the VM could not even try.
    pub(super) fn start(&self, vm: &str, order: &str) -> Result<(String, Option<String>), Failure> {
        let command = command(order)?;
        let vm = vm_id(vm)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| Failure::Host {
            code: "NO_RANDOM".into(),
            message: format!("no random numbers from the system: {error}"),
        })?;
        let id = ProcessId(random);
        match self.backend.start(&vm, id, &command) {
            Ok(()) => Ok((id.to_string(), None)),
            Err(failure) => match failure.as_result() {
                Some(message) => Ok((id.to_string(), Some(message.to_owned()))),
                None => Err(failure),
            },
        }
    }

    pub(super) fn block(&self, vm: &str, process: &str) -> Result<Ran, Failure> {
        let mut collected = Collected::default();
        let ended = self.follow(vm, process, &mut collected);
        settle(collected, ended)
    }

    fn follow(&self, vm: &str, process: &str, into: &mut Collected) -> Result<Ending, Failure> {
        let (vm, id) = (vm_id(vm)?, process_id(process)?);
        let mut records = self.backend.attach(&vm, id, Whence::Oldest, true)?;
        loop {
            match records.next()? {
                Record::Data(source, bytes) => into.push(source, &bytes)?,
                Record::Gap(bytes) => into.gap(bytes)?,
                Record::Ended(ended) => return Ok(Ending::from(&ended)),
                Record::Replayed => {
                    return Err(Failure::Host {
                        code: "BROKEN".into(),
                        message: "the output ended before its process did".into(),
                    });
                }
            }
        }
    }

    /// How a process ended; none while it runs.
    pub(super) fn status(&self, vm: &str, process: &str) -> Result<Option<Ending>, Failure> {
        let (vm, id) = (vm_id(vm)?, process_id(process)?);
        match self.backend.status(&vm, id) {
            Ok(ended) => Ok(ended.as_ref().map(Ending::from)),
            Err(failure) => settled(Err(failure)).map(Some),
        }
    }

    pub(super) fn tail(&self, vm: &str, process: &str, lines: f64) -> Result<Vec<String>, Failure> {
        // Not a number counts as none; a cast of what is too large saturates.
        let lines = if lines >= 1.0 { lines as u32 } else { 0 };
        if lines == 0 {
            return Ok(Vec::new());
        }
        let (vm, id) = (vm_id(vm)?, process_id(process)?);
        let whence = Whence::Lines(lines.into());
        let mut collected = Collected::default();
        let mut read = || -> Result<(), Failure> {
            let mut records = self.backend.attach(&vm, id, whence, false)?;
            loop {
                match records.next()? {
                    Record::Data(source, bytes) => collected.push(source, &bytes)?,
                    Record::Gap(bytes) => collected.gap(bytes)?,
                    Record::Ended(_) | Record::Replayed => return collected.finish(),
                }
            }
        };
        // What can be had, and be it nothing: of the VM's state the status tells.
        quiet(read())?;
        let lines = usize::try_from(lines).unwrap_or(usize::MAX);
        Ok(last_lines(&collected.output, lines))
    }

    pub(super) fn send_stdin(&self, vm: &str, process: &str, text: &str) -> Result<(), Failure> {
        self.backend
            .stdin(&vm_id(vm)?, process_id(process)?, text.as_bytes())
    }

    pub(super) fn send_eof(&self, vm: &str, process: &str) -> Result<(), Failure> {
        self.backend.stdin_end(&vm_id(vm)?, process_id(process)?)
    }

    pub(super) fn kill(&self, vm: &str, process: &str) -> Result<(), Failure> {
        self.backend.kill(&vm_id(vm)?, process_id(process)?)
    }

    /// A reader for a generator; none where the VM has nothing to read any more.
    pub(super) fn open_reader(
        &self,
        vm: &str,
        process: &str,
        which: &str,
    ) -> Result<Option<u32>, Failure> {
        let (vm, id) = (vm_id(vm)?, process_id(process)?);
        let only = match which {
            "stdout" => Some(Source::Stdout),
            "stderr" => Some(Source::Stderr),
            _ => None,
        };
        if self.readers.borrow().len() >= MAX_READERS {
            return Err(Failure::Host {
                code: "TOO_MANY_READERS".into(),
                message: format!(
                    "{MAX_READERS} generators read output at once: leave their loops, or call \
                     return() on those that are not read to the end"
                ),
            });
        }
        let Some(records) = quiet(self.backend.attach(&vm, id, Whence::Oldest, true))? else {
            return Ok(None);
        };
        let mut next = self.next_reader.borrow_mut();
        let number = *next;
        *next = next.wrapping_add(1);
        self.readers
            .borrow_mut()
            .insert(number, Pieces::new(records, only));
        Ok(Some(number))
    }

    pub(super) fn read(&self, reader: u32) -> Result<Option<String>, Failure> {
        // It is taken out while it waits, so that nothing else waits for the table.
        let Some(mut pieces) = self.readers.borrow_mut().remove(&reader) else {
            return Ok(None);
        };
        let piece = quiet(pieces.next())?.flatten();
        if piece.is_some() {
            self.readers.borrow_mut().insert(reader, pieces);
        }
        Ok(piece)
    }

    pub(super) fn close_reader(&self, reader: u32) {
        self.readers.borrow_mut().remove(&reader);
    }

    pub(super) fn upload(
        &self,
        vm: &str,
        dest: Option<String>,
        kind: &str,
        payload: String,
    ) -> Result<u32, Failure> {
        let vm = vm_id(vm)?;
        if let Some(dest) = &dest {
            file_path(dest)?;
        }
        let content = match kind {
            "media" => Content::Media(Box::new(parse(&payload)?)),
            _ if fetch::is_url(&payload) => Content::Url(payload),
            _ => Content::Text(payload),
        };
        let backend = Arc::clone(&self.backend);
        let interrupt = self.interrupt.clone();
        let what = format!("upload to {}", dest.as_deref().unwrap_or("the VM"));
        self.transfers.borrow_mut().start(what, move |report| {
            let (mut source, size, name) = content.open(&interrupt)?;
            let dest = dest.unwrap_or(name);
            let path = file_path(&dest)?;
            backend.upload(&vm, &path, &mut source, size, &mut |done| {
                report.at(done, size);
            })?;
            Ok(Product::Path(dest))
        })
    }

    pub(super) fn download(&self, vm: &str, shown: String) -> Result<u32, Failure> {
        let vm = vm_id(vm)?;
        let path = file_path(&shown)?;
        let backend = Arc::clone(&self.backend);
        let interrupt = self.interrupt.clone();
        let room = Arc::clone(&self.room);
        let what = format!("download of {shown}");
        self.transfers.borrow_mut().start(what, move |report| {
            let (mut file, place) = room.file()?;
            backend.download(&vm, &path, &mut file, &mut |done, size| {
                if interrupt.is_set() {
                    return Err(Failure::Interrupted);
                }
                report.at(done, Some(size));
                Ok(())
            })?;
            let name = shown.rsplit('/').next().unwrap_or_default();
            Ok(Product::Media(Box::new(room.received(&place, name)?)))
        })
    }

    pub(super) fn cat(&self, vm: &str, shown: &str) -> Result<String, Failure> {
        let path = file_path(shown)?;
        let mut bytes = Bounded(Vec::new());
        let read = self
            .backend
            .download(&vm_id(vm)?, &path, &mut bytes, &mut |done, size| {
                if size.max(done) > MAX_CAT {
                    return Err(Failure::file(
                        "EFBIG",
                        shown,
                        format!(
                            "{shown} has {size} bytes, and cat returns {} MiB at most: use download",
                            MAX_CAT >> 20
                        ),
                    ));
                }
                Ok(())
            });
        read.map(|()| String::from_utf8_lossy(&bytes.0).into_owned())
    }

    pub(super) fn open_media(&self, class: &str, name: &str) -> Result<Media, Failure> {
        input::open(&self.room, parse_class(class)?, name)
    }

    pub(super) fn media_of_bytes(&self, class: &str, bytes: &[u8]) -> Result<Media, Failure> {
        let media = self.room.made_of(bytes)?;
        input::expect(media, parse_class(class)?, "the content")
    }

    pub(super) fn keep_media(&self, path: &str) -> Result<String, Failure> {
        self.store()?.keep(path.as_ref()).map_err(store_failed)
    }

    pub(super) fn kept_media(&self, name: &str) -> Result<String, Failure> {
        let path = self.store()?.kept(name).map_err(store_failed)?;
        Ok(path.to_string_lossy().into_owned())
    }

    pub(super) fn get(&self, scope: &str, key: &str) -> Result<Option<String>, Failure> {
        let scope = self.scope(scope);
        self.store()?.get(&scope, key).map_err(store_failed)
    }

    pub(super) fn set(&self, scope: &str, key: &str, value: Option<String>) -> Result<(), Failure> {
        let scope = self.scope(scope);
        let store = self.store()?;
        match value {
            Some(value) => store.set(&scope, key, &value),
            None => store.remove(&scope, key),
        }
        .map_err(store_failed)
    }

    pub(super) fn keys(&self, scope: &str) -> Result<Vec<String>, Failure> {
        let scope = self.scope(scope);
        self.store()?.keys(&scope).map_err(store_failed)
    }

    pub(super) fn sleep(&self, milliseconds: f64) -> Result<(), Failure> {
        if !(0.0..=1e15).contains(&milliseconds) {
            return Err(Failure::Usage(format!(
                "sup.sleep({milliseconds}): it takes milliseconds from 0"
            )));
        }
        if self
            .interrupt
            .sleep(Duration::from_secs_f64(milliseconds / 1000.0))
        {
            Ok(())
        } else {
            Err(Failure::Interrupted)
        }
    }

    fn scope(&self, name: &str) -> Scope {
        match name {
            "chat" => Scope::Chat(self.chat.clone()),
            "user" => Scope::User(self.user.clone()),
            _ => Scope::Global,
        }
    }

    /// The store, opened when it is first used.
    fn store(&self) -> Result<&Store, Failure> {
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let store = Store::open(&self.store_directory, &self.patch).map_err(store_failed)?;
        Ok(self.store.get_or_init(|| store))
    }
}

/// What is uploaded.
enum Content {
    Text(String),
    Url(String),
    Media(Box<Media>),
}

type Opened = (Box<dyn backend::Content + Send>, Option<u64>, String);

impl Content {
    /// The bytes, how many, and the name for whoever gave none.
    fn open(self, interrupt: &Interrupt) -> Result<Opened, Failure> {
        match self {
            Self::Text(text) => {
                let bytes = text.into_bytes();
                let head = bytes.get(..media::HEAD).unwrap_or(&bytes);
                let name = media::name_by_type(&media::detect(head, ""));
                let size = bytes.len() as u64;
                Ok((Box::new(io::Cursor::new(bytes)), Some(size), name))
            }
            Self::Url(url) => {
                let Fetched { mut body, size } = fetch::get(&url, interrupt)?;
                let mut head = Vec::new();
                let name = match fetch::name_of(&url) {
                    Some(name) => name,
                    None => {
                        (&mut body)
                            .take(media::HEAD as u64)
                            .read_to_end(&mut head)
                            .map_err(|error| Failure::io(&url, "fetching", &error))?;
                        media::name_by_type(&media::detect(&head, ""))
                    }
                };
                let body = fetch::Again::new(url, interrupt.clone(), head, body);
                Ok((Box::new(body), size, name))
            }
            Self::Media(media) => {
                let shown = media.path.display().to_string();
                let file = std::fs::File::open(&media.path)
                    .map_err(|error| Failure::io(&shown, "opening", &error))?;
                let size = file
                    .metadata()
                    .map_err(|error| Failure::io(&shown, "opening", &error))?
                    .len();
                let name = media::name_by_type(&media.mime_type);
                Ok((Box::new(file), Some(size), name))
            }
        }
    }
}

/// Memory for a file that `cat` returns, whatever its size is said to be.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) as u64 > MAX_CAT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a generator or `tail` gives when the VM fails them: nothing more, as of a process that ended.
/// The handle's status and `block()` say why. An appliance that fails them is no end of the output.
fn quiet<T>(result: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Failure::Vm { .. }) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// A command's output and how it went, which is an ending unless nothing can be told of it.
fn settle(mut collected: Collected, ended: Result<Ending, Failure>) -> Result<Ran, Failure> {
    let ended = match ended.map(|ending| (ending, collected.finish())) {
        Ok((ending, Ok(()))) => Ok(ending),
        Ok((_, Err(failure))) | Err(failure) => Err(failure),
    };
    let ending = settled(ended)?;
    collected.shorten();
    Ok(Ran { collected, ending })
}

/// Failures that a result can tell of are endings.
fn settled(ending: Result<Ending, Failure>) -> Result<Ending, Failure> {
    ending.or_else(|failure| match failure.as_result() {
        Some(message) => Ok(Ending::failed(message.to_owned())),
        None => Err(failure),
    })
}

fn command(order: &str) -> Result<Command, Failure> {
    let order: Ordered = parse(order)?;
    let program = match order.shell {
        Some(line) => Program::Shell(line),
        None if order.argv.is_empty() => {
            return Err(Failure::Usage("the command is an empty array".into()));
        }
        None => Program::Argv(order.argv),
    };
    let texts = match &program {
        Program::Shell(line) => std::slice::from_ref(line),
        Program::Argv(argv) => argv,
    };
    if texts
        .iter()
        .chain(&order.cwd)
        .any(|text| text.contains('\0'))
    {
        return Err(Failure::Usage(
            "a command and its directory cannot contain the character NUL".into(),
        ));
    }
    for (key, value) in &order.env {
        let nul = value.as_ref().is_some_and(|value| value.contains('\0'));
        if key.is_empty() || key.contains(['=', '\0']) || nul {
            return Err(Failure::Usage(format!(
                "the environment variable {key:?}: keys are not empty and have no `=` or NUL, \
                 values no NUL"
            )));
        }
    }
    Ok(Command {
        program,
        cwd: order.cwd,
        env: order.env,
    })
}

/// A path of a file in a VM, absolute.
fn file_path(shown: &str) -> Result<String, Failure> {
    if shown.contains('\0') {
        return Err(Failure::Usage("a path cannot contain NUL".into()));
    }
    let last = shown.rsplit('/').next().unwrap_or_default();
    if matches!(last, "" | "." | "..") {
        return Err(Failure::file(
            "EISDIR",
            shown,
            format!("`{shown}` names a directory: name a file"),
        ));
    }
    Ok(if shown.starts_with('/') {
        shown.to_owned()
    } else {
        format!("{WORKSPACE}/{shown}")
    })
}

fn vm_id(text: &str) -> Result<VmId, Failure> {
    text.parse()
        .map_err(|error: protocol::id::IdError| Failure::Usage(error.to_string()))
}

fn process_id(text: &str) -> Result<ProcessId, Failure> {
    u128::from_str_radix(text, 16)
        .ok()
        .filter(|_| text.len() == 32)
        .map(|number| ProcessId(number.to_be_bytes()))
        .ok_or_else(|| Failure::Usage(format!("`{text}` is no process id")))
}

fn parse_class(text: &str) -> Result<Class, Failure> {
    serde_json::from_value(text.into()).map_err(|error| Failure::Usage(error.to_string()))
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::Usage(format!("not usable: {error}")))
}

fn store_failed(error: StoreError) -> Failure {
    match error {
        StoreError::Key(_) | StoreError::Value(_) | StoreError::Content(_) => {
            Failure::Usage(error.to_string())
        }
        _ => Failure::Host {
            code: "STORE".into(),
            message: error.to_string(),
        },
    }
}
