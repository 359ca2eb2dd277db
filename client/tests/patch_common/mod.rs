//! A backend in memory that records what it is asked: for what the JavaScript side promises, not
//! for what a VM does. And a way to run a script against it.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use client::patch::backend::{
    Command, Content, Program, Record, Records, Sink, Source, VmFacts, Whence,
};
use client::patch::show::{self, Shown};
use client::patch::{
    Backend, Failure, Finished, Inputs, Interrupt, MEMORY, Patch, PatchError, Screen,
};
use client::protocol::id::{ProcessId, VmId};
use client::protocol::process::{ProcessEnd, ProcessEnded};

#[derive(Default)]
pub struct Recorded {
    pub commands: Vec<(String, Command)>,
    pub stdin: String,
    pub calls: Vec<String>,
    pub files: HashMap<String, Vec<u8>>,
    pub deleted: Vec<String>,
    pub created: u8,
    /// Whether processes have ended.
    pub killed: bool,
}

/// What holds a process back until a test lets it go on.
pub type Gate = Arc<Mutex<std::sync::mpsc::Receiver<()>>>;

#[derive(Clone, Default)]
pub struct Memory(pub Arc<Mutex<Recorded>>, pub Option<Gate>);

pub fn ended(end: ProcessEnd, exit_code: u8, message: &str) -> ProcessEnded {
    ProcessEnded {
        end,
        exit_code,
        signal: 0,
        output_open: false,
        message: message.into(),
    }
}

/// What a command prints and how it ends, by its text.
fn script(command: &Command) -> (Vec<(Source, Vec<u8>)>, ProcessEnded) {
    let line = match &command.program {
        Program::Shell(line) => line.clone(),
        Program::Argv(argv) => argv.join(" "),
    };
    let out = |text: &str| (Source::Stdout, text.as_bytes().to_vec());
    let err = |text: &str| (Source::Stderr, text.as_bytes().to_vec());
    let exited = |code| ended(ProcessEnd::Exited, code, "");
    match line.as_str() {
        "mixed" => (vec![out("one\n"), err("two\n"), out("three\n")], exited(0)),
        "cut" => (
            vec![
                (Source::Stdout, b"\xc3".to_vec()),
                err("-"),
                (Source::Stdout, b"\xa9\n".to_vec()),
            ],
            exited(0),
        ),
        "fail" => (vec![out("a\n"), err("b\n")], exited(3)),
        "missing" => (
            vec![],
            ended(ProcessEnd::NotFound, 127, "not found: missing"),
        ),
        "crash" => (
            vec![],
            ended(ProcessEnd::Signalled, 139, "killed by signal SIGSEGV"),
        ),
        "slow" => (vec![out("first\n"), out("second\n")], exited(0)),
        "big" => (vec![(Source::Stdout, vec![b'x'; 100 << 20])], exited(0)),
        _ => (vec![out(&format!("{line}\n"))], exited(0)),
    }
}

struct Reader {
    steps: std::vec::IntoIter<Record>,
    gate: Option<Gate>,
}

impl Records for Reader {
    fn next(&mut self) -> Result<Record, Failure> {
        let step = self.steps.next().unwrap_or(Record::Replayed);
        if let (Some(gate), Record::Data(_, bytes)) = (&self.gate, &step)
            && bytes == b"second\n"
        {
            gate.lock().unwrap().recv().unwrap();
        }
        Ok(step)
    }
}

impl Memory {
    fn check(&self, vm: &VmId) -> Result<std::sync::MutexGuard<'_, Recorded>, Failure> {
        let recorded = self.0.lock().unwrap();
        if recorded.deleted.contains(&vm.to_string()) {
            return Err(Failure::vm_not_found());
        }
        Ok(recorded)
    }
}

impl Backend for Memory {
    fn create(&self) -> Result<VmFacts, Failure> {
        let mut recorded = self.0.lock().unwrap();
        recorded.created += 1;
        let id = VmId::from_random([recorded.created; 8]);
        let url = format!("https://{}.example", &id.as_str()[3..]);
        Ok(VmFacts { id, url })
    }

    fn delete(&self, vm: &VmId) -> Result<(), Failure> {
        self.0.lock().unwrap().deleted.push(vm.to_string());
        Ok(())
    }

    fn exec(
        &self,
        vm: &VmId,
        command: &Command,
        sink: &mut Sink<'_>,
    ) -> Result<ProcessEnded, Failure> {
        self.check(vm)?
            .commands
            .push((vm.to_string(), command.clone()));
        if command.program == Program::Shell("unreachable".into()) {
            return Err(Failure::Host {
                code: "UNREACHABLE".into(),
                message: "nobody answers".into(),
            });
        }
        // A command in capitals fails with this code.
        if let Program::Shell(code) = &command.program
            && code.len() > 5
            && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
        {
            return Err(Failure::Host {
                code: code.clone(),
                message: "so it is".into(),
            });
        }
        let (output, end) = script(command);
        for (source, bytes) in output {
            sink(source, &bytes)?;
        }
        Ok(end)
    }

    fn start(&self, vm: &VmId, id: ProcessId, command: &Command) -> Result<(), Failure> {
        let mut recorded = self.check(vm)?;
        recorded.commands.push((vm.to_string(), command.clone()));
        recorded.calls.push(format!("start {id}"));
        Ok(())
    }

    fn attach(
        &self,
        vm: &VmId,
        id: ProcessId,
        whence: Whence,
        follow: bool,
    ) -> Result<Box<dyn Records>, Failure> {
        let mut recorded = self.check(vm)?;
        recorded
            .calls
            .push(format!("attach {id} {whence:?} {follow}"));
        let (_, command) = recorded.commands.last().unwrap();
        let (output, end) = script(command);
        let mut steps: Vec<Record> = output
            .into_iter()
            .map(|(source, bytes)| Record::Data(source, bytes))
            .collect();
        if *command == shell("gap") {
            steps.insert(0, Record::Gap(7));
        }
        steps.push(Record::Ended(end));
        Ok(Box::new(Reader {
            steps: steps.into_iter(),
            gate: self.1.clone(),
        }))
    }

    fn status(&self, vm: &VmId, _: ProcessId) -> Result<Option<ProcessEnded>, Failure> {
        let recorded = self.check(vm)?;
        if recorded.killed {
            return Ok(Some(ended(ProcessEnd::Killed, 143, "killed")));
        }
        let (_, command) = recorded.commands.last().unwrap();
        Ok((*command != shell("server")).then(|| script(command).1))
    }

    fn stdin(&self, vm: &VmId, _: ProcessId, bytes: &[u8]) -> Result<(), Failure> {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        self.check(vm)?.stdin.push_str(&text);
        Ok(())
    }

    fn stdin_end(&self, vm: &VmId, _: ProcessId) -> Result<(), Failure> {
        self.check(vm)?.stdin.push_str("<EOF>");
        Ok(())
    }

    fn kill(&self, vm: &VmId, _: ProcessId) -> Result<(), Failure> {
        self.check(vm)?.killed = true;
        Ok(())
    }

    fn upload(
        &self,
        vm: &VmId,
        path: &str,
        source: &mut dyn Content,
        _: Option<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let mut bytes = Vec::new();
        let mut part = [0; 1000];
        loop {
            let count = source
                .read(&mut part)
                .map_err(|error| Failure::io(path, "reading", &error))?;
            if count == 0 {
                break;
            }
            bytes.extend_from_slice(&part[..count]);
            progress(bytes.len() as u64);
        }
        if path.ends_with("/full") {
            return Err(Failure::file("ENOSPC", path, "no space left"));
        }
        self.check(vm)?.files.insert(path.into(), bytes);
        Ok(())
    }

    fn download(
        &self,
        vm: &VmId,
        path: &str,
        sink: &mut dyn Write,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let bytes = self.check(vm)?.files.get(path).cloned();
        let bytes = bytes.ok_or_else(|| {
            Failure::file("ENOENT", path, format!("{path}: no such file or directory"))
        })?;
        progress(0, bytes.len() as u64)?;
        sink.write_all(&bytes)
            .map_err(|error| Failure::io(path, "writing", &error))?;
        progress(bytes.len() as u64, bytes.len() as u64)
    }
}

pub fn shell(line: &str) -> Command {
    Command {
        program: Program::Shell(line.into()),
        cwd: None,
        env: Vec::new(),
    }
}

/// Where a run's values and files are.
pub struct World {
    pub memory: Memory,
    pub directory: tempfile::TempDir,
    pub interrupt: Interrupt,
    pub inputs: Inputs,
    pub limit: usize,
    pub chat: String,
    pub screen: Arc<Mutex<Vec<u8>>>,
}

impl World {
    pub fn new() -> Self {
        Self {
            memory: Memory::default(),
            directory: tempfile::tempdir().unwrap(),
            interrupt: Interrupt::default(),
            inputs: Inputs::default(),
            limit: MEMORY,
            chat: "default".into(),
            screen: Arc::default(),
        }
    }

    pub fn try_run(&self, source: &str) -> Result<Finished, PatchError> {
        let screen = Screen::lines(Box::new(Tee(Arc::clone(&self.screen))));
        self.run_on(source, screen)
    }

    pub fn run_on(&self, source: &str, screen: Screen) -> Result<Finished, PatchError> {
        let patch = Patch {
            name: "patch.js".into(),
            source: source.into(),
            identity: "test".into(),
            chat: self.chat.clone(),
            user: "someone".into(),
            store: self.directory.path().join("store"),
            inputs: self.inputs.clone(),
            memory: self.limit,
        };
        client::patch::run(
            &patch,
            Arc::new(self.memory.clone()),
            screen,
            &self.interrupt,
        )
    }

    pub fn run(&self, source: &str) -> Shown {
        match self.try_run(source) {
            Ok(finished) => finished.result,
            Err(error) => panic!("{error}"),
        }
    }

    /// The result as a person sees it.
    pub fn text(&self, source: &str) -> String {
        match self.try_run(source) {
            Ok(finished) => show::text(&finished.result, &self.out()).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }

    /// The result as programs see it.
    pub fn json(&self, source: &str) -> serde_json::Value {
        match self.try_run(source) {
            Ok(finished) => show::json(&finished.result, &self.out()).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn error(&self, source: &str) -> String {
        match self.try_run(source) {
            Ok(finished) => panic!("no error but {:?}", finished.result),
            Err(error) => error.to_string(),
        }
    }

    pub fn out(&self) -> std::path::PathBuf {
        self.directory.path().join("out")
    }

    pub fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        Path::to_string_lossy(&path).into_owned()
    }

    pub fn said(&self) -> String {
        String::from_utf8(self.screen.lock().unwrap().clone()).unwrap()
    }
}

pub struct Tee(pub Arc<Mutex<Vec<u8>>>);

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
