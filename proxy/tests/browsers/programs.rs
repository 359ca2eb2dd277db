//! Programs of others: each in the network namespace it belongs to and in a namespace of process
//! identifiers of its own, so that nothing of it is left when it is ended or when the test dies.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::process::{Child, Command};

/// How long a program may take that ends by itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The Node packages that setup.sh fetches: `proxy/tests/browsers/npm`.
pub(crate) fn node_modules() -> PathBuf {
    let lock = sum(include_bytes!("npm/package-lock.json"));
    let found = cache().join(format!("node-{lock}/node_modules"));
    assert!(
        found.is_dir(),
        "{} is not there: run ./setup.sh, which fetches it",
        found.display()
    );
    found
}

/// The first 16 digits of what `sha256sum` says.
fn sum(bytes: &[u8]) -> String {
    let sum = ring::digest::digest(&ring::digest::SHA256, bytes);
    data_encoding::HEXLOWER.encode(&sum.as_ref()[..8])
}

fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    base.expect("neither XDG_CACHE_HOME nor HOME is set; set one of them")
        .join("supvm")
}

/// A program by its name, from the cache or installed.
pub(crate) fn tool(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(cache().join("programs"))
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{name} is not there: run ./setup.sh, which installs it"))
}

/// A script of this test.
pub(crate) fn script(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browsers/js");
    path.join(name).to_str().unwrap().to_owned()
}

/// The command for a program, with nothing of the test's environment.
pub(crate) fn command(place: Option<Arc<OwnedFd>>, home: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(tool(words[0]))
        .args(&words[1..])
        .current_dir(home)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env("TMPDIR", home)
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    // SAFETY: what runs between fork and exec are two system calls on values made before.
    unsafe { command.pre_exec(move || enter(place.as_deref())) };
    command
}

/// Ends this process with the thread that started it, which is the test's, and puts it in its place.
fn enter(place: Option<&OwnedFd>) -> io::Result<()> {
    // SAFETY: the arguments are numbers.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    match place {
        Some(place) => setns(place, CloneFlags::CLONE_NEWNET).map_err(io::Error::from),
        None => Ok(()),
    }
}

/// A program that goes on until this is dropped.
pub(crate) struct Program {
    name: String,
    output: PathBuf,
    _child: Child,
}

impl Program {
    pub(crate) fn start(mut command: Command, name: &str, output: PathBuf) -> Self {
        let file = std::fs::File::create(&output).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Self {
            name: name.to_owned(),
            output,
            _child: command.spawn().unwrap(),
        }
    }

    /// What it wrote.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).unwrap_or_default()).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Shown only when the test fails.
        let output = self.output();
        let from = output.len().saturating_sub(4000);
        let end = String::from_utf8_lossy(&output.as_bytes()[from..]);
        println!("--- what {} wrote last:\n{end}---", self.name);
    }
}

/// Runs a program to its end, which has to be a good one, and gives what it wrote.
pub(crate) async fn run(mut command: Command) -> Vec<u8> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let output = ended
        .unwrap_or_else(|_| panic!("{command:?} does not end"))
        .unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}
