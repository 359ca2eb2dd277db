//! A root shell inside the appliance, on its second serial port: busybox, which qemu-test appends
//! to the initramfs. It looks at processes and breaks them; it must never do what the API can do.

use std::io;
use std::path::Path;
use std::time::Duration;

use data_encoding::HEXLOWER;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

/// The longest command: a serial terminal's line holds 4,096 bytes.
const MAX_COMMAND: usize = 3_500;

/// The longest output of one command.
const MAX_OUTPUT: usize = 8 << 20;

/// How long the shell may take to come up, and a command unless it says otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

/// The shell function `role NAME`: the process numbers of supvm's role of that name, one a line.
const ROLE: &str = "role() { for p in /proc/[0-9]*; do \
    case \"$({ tr '\\0' ' ' <$p/cmdline; } 2>/dev/null)\" in \"supvm $1 \"*) echo ${p#/proc/};; esac; \
    done; }";

/// Why a command could not be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The socket failed.
    #[error("probe: {0}")]
    Io(#[from] io::Error),
    /// A line for the terminal would be cut.
    #[error("probe: a command of {0} bytes; a serial line holds {MAX_COMMAND}")]
    TooLong(usize),
    /// No answer.
    #[error("probe: `{command}` gave no answer in time; it said so far: {output}")]
    Deadline {
        /// The command.
        command: String,
        /// The last of what came.
        output: String,
    },
    /// The command ended with another code than 0.
    #[error("probe: `{command}` ended with {code}: {output}")]
    Failed {
        /// The command.
        command: String,
        /// Its exit code.
        code: i32,
        /// What it said.
        output: String,
    },
}

/// What a command left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Its exit code.
    pub(crate) code: i32,
    /// What it wrote to standard output and standard error, without the final line end.
    pub(crate) text: String,
}

/// The shell.
#[derive(Debug)]
pub(crate) struct Probe {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Probe {
    /// Connects to the serial port's socket and makes sure that a shell answers.
    pub(crate) async fn connect(path: &Path) -> Result<Self, ProbeError> {
        let stream = UnixStream::connect(path).await?;
        Self::take_over(stream).await
    }

    async fn take_over(mut stream: UnixStream) -> Result<Self, ProbeError> {
        // Ends whatever a former user of the port left half typed.
        stream.write_all(b"\x03\n").await?;
        let mut probe = Self {
            stream,
            pending: Vec::new(),
        };
        let set_up = "stty -echo; PS1=; PS2=; export PATH=/debug/bin:$PATH";
        probe.outcome(set_up, PATIENCE).await?;
        probe.run(ROLE).await?;
        Ok(probe)
    }

    /// Runs a command that must succeed and gives its output.
    pub(crate) async fn run(&mut self, command: &str) -> Result<String, ProbeError> {
        let outcome = self.outcome(command, PATIENCE).await?;
        if outcome.code != 0 {
            return Err(ProbeError::Failed {
                command: command.to_owned(),
                code: outcome.code,
                output: outcome.text,
            });
        }
        Ok(outcome.text)
    }

    /// Runs a command and gives its exit code and output.
    pub(crate) async fn outcome(
        &mut self,
        command: &str,
        patience: Duration,
    ) -> Result<Outcome, ProbeError> {
        if command.len() > MAX_COMMAND || command.contains('\n') {
            return Err(ProbeError::TooLong(command.len()));
        }
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let nonce = HEXLOWER.encode(&random);
        let (left, right) = nonce.split_at(8);
        // The terminal may echo the line; the marks are put together only by the shell, so that
        // an echo is never taken for one.
        let line = format!(
            "printf '\\n%s%s<\\n' {left} {right}; {{ {command}\n}} 2>&1; printf '\\n>%s%s:%d.\\n' {left} {right} $?\n"
        );
        self.stream.write_all(line.as_bytes()).await?;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(outcome) = take_outcome(&mut self.pending, &nonce) {
                return Ok(outcome);
            }
            let mut chunk = vec![0; 16 << 10];
            let read = timeout_at(deadline, self.stream.read(&mut chunk)).await;
            match read {
                Ok(Ok(0)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => self
                    .pending
                    .extend_from_slice(chunk.get(..read?).unwrap_or_default()),
                Err(_) => {
                    let text = String::from_utf8_lossy(&self.pending).into_owned();
                    let skip = text.chars().count().saturating_sub(2_000);
                    return Err(ProbeError::Deadline {
                        command: command.to_owned(),
                        output: text.chars().skip(skip).collect(),
                    });
                }
            }
            if self.pending.len() > MAX_OUTPUT {
                return Err(io::Error::other("a command's output is over 8 MiB").into());
            }
        }
    }
}

/// Cuts the output between the two marks of `nonce` out of what came, once both are there.
fn take_outcome(pending: &mut Vec<u8>, nonce: &str) -> Option<Outcome> {
    let text = String::from_utf8_lossy(pending).replace('\r', "");
    let begin = text.find(&format!("\n{nonce}<\n"))? + nonce.len() + 3;
    let rest = text.get(begin..)?;
    let mark = format!("\n>{nonce}:");
    let end = rest.find(&mark)?;
    let code = rest.get(end + mark.len()..)?;
    let code = code.get(..code.find('.')?)?.parse().ok()?;
    let output = rest.get(..end)?;
    let text = output.strip_suffix('\n').unwrap_or(output).to_owned();
    pending.clear();
    Some(Outcome { code, text })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::Stdio;

    use nix::pty::openpty;
    use tokio::process::Command;

    use super::*;

    /// A shell on a real terminal with echo, joined to a socket as QEMU would.
    async fn shell() -> (Probe, tokio::process::Child) {
        let pty = openpty(None, None).unwrap();
        let clone = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
        let child = Command::new("sh")
            .arg("-i")
            .stdin(clone(&pty.slave))
            .stdout(clone(&pty.slave))
            .stderr(clone(&pty.slave))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        drop(pty.slave);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut from_probe, mut to_probe) = theirs.into_split();
        let writer = std::fs::File::from(pty.master);
        let reader = writer.try_clone().unwrap();
        let mut writer = tokio::fs::File::from_std(writer);
        let mut reader = tokio::fs::File::from_std(reader);
        tokio::spawn(async move { tokio::io::copy(&mut from_probe, &mut writer).await });
        tokio::spawn(async move { tokio::io::copy(&mut reader, &mut to_probe).await });
        (Probe::take_over(ours).await.unwrap(), child)
    }

    #[tokio::test]
    async fn output_and_exit_code_come_back_and_echo_is_not_mistaken_for_them() {
        let (mut probe, _child) = shell().await;
        assert_eq!(
            probe.run("echo one; echo two >&2").await.unwrap(),
            "one\ntwo"
        );
        assert_eq!(probe.run("printf 'no end'").await.unwrap(), "no end");
        assert_eq!(probe.run("true").await.unwrap(), "");
        let outcome = probe.outcome("echo bad; (exit 7)", PATIENCE).await.unwrap();
        assert_eq!((outcome.code, outcome.text.as_str()), (7, "bad"));
        assert!(matches!(
            probe.run("false").await,
            Err(ProbeError::Failed { code: 1, .. })
        ));
        let long = probe.run("seq 1 20000").await.unwrap();
        assert_eq!(long.lines().count(), 20_000);
    }

    #[tokio::test]
    async fn a_command_that_never_ends_is_given_up_at_the_deadline() {
        let (mut probe, _child) = shell().await;
        let soon = Duration::from_millis(50);
        assert!(matches!(
            probe.outcome("read line", soon).await,
            Err(ProbeError::Deadline { .. })
        ));
    }
}
