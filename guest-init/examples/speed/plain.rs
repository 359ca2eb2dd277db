//! What the system does without an agent: a shell, a pipe, and this program at its other end.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::content;

pub(crate) fn shell(line: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    command
}

/// `sh -c LINE | reader`
pub(crate) fn output(line: &str, size: u64) {
    let mut child = shell(line).stdout(Stdio::piped()).spawn().unwrap();
    content::check(child.stdout.as_mut().unwrap(), size);
    assert!(child.wait().unwrap().success());
}

/// `writer | cat >f`, on a disk with `sync f`.
pub(crate) fn upload(path: &Path, size: u64, sync: bool) {
    let path = path.display();
    let line = if sync {
        format!("cat >{path}; sync {path}")
    } else {
        format!("cat >{path}")
    };
    let mut child = shell(&line).stdin(Stdio::piped()).spawn().unwrap();
    content::feed(&mut child.stdin.take().unwrap(), size);
    assert!(child.wait().unwrap().success());
}
