//! `sup` as a program.

use std::path::Path;
use std::process::{Output, Stdio};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::TOKEN;
use super::real::{Machine, soon};

/// `sup` with this home and nothing configured.
pub(crate) fn bare(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sup"));
    command
        .env_clear()
        .env("HOME", home)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub(crate) fn sup(machine: &Machine, arguments: &[&str]) -> Command {
    let mut command = bare(machine.appliance.dir.path());
    command
        .env("SUP_ENDPOINT", machine.endpoint().to_string())
        .env("SUP_TOKEN", TOKEN)
        .args(arguments);
    command
}

pub(crate) fn told(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

pub(crate) async fn run(machine: &Machine, arguments: &[&str]) -> (i32, String, String) {
    told(soon(sup(machine, arguments).output()).await.unwrap())
}

pub(crate) fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

pub(crate) async fn read_until(from: &mut (impl AsyncRead + Unpin), what: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(what) {
        let count = soon(from.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    seen
}
