//! Runs the programs that do the heavy work (make, mmdebstrap, mkfs). Each runs to its end or fails
//! with its command line, its last words and the log that holds the rest; standard input is empty,
//! so that none can wait for a person.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::files::{self, AtPath as _, FileError};
use crate::progress::Progress;

const LAST_WORDS: usize = 25;

/// A program that could not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    /// It could not be started.
    #[error("cannot start {command}: {source}; ./setup.sh installs what is needed")]
    Start {
        /// The command line.
        command: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Its output could not be read.
    #[error("lost the output of {command}: {source}")]
    Output {
        /// The command line.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ran and failed.
    #[error("{command} failed ({status}){}\n{}", .log.as_ref().map(|log| format!("; all of its output is in {}", log.display())).unwrap_or_default(), .last_words.join("\n"))]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The log, when there is one.
        log: Option<PathBuf>,
        /// The end of its output.
        last_words: Vec<String>,
    },
    /// The log could not be written.
    #[error(transparent)]
    Log(#[from] FileError),
}

/// One call of a program.
pub(crate) struct Tool {
    command: Command,
}

impl Tool {
    /// The program, found in PATH and in the directories of administration tools.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        command
            .env("PATH", path)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        Self { command }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs it, appending all output to `log` and counting its lines in `progress`.
    pub(crate) fn run(mut self, log: &Path, progress: &mut Progress) -> Result<(), ToolError> {
        let command = self.line();
        let mut file = open_log(log)?;
        writeln!(file, "$ {command}").at("write", log)?;
        let output = |source| ToolError::Output {
            command: command.clone(),
            source,
        };
        let (reader, writer) = std::io::pipe().map_err(output)?;
        let second = writer.try_clone().map_err(output)?;
        let started = self.command.stdout(writer).stderr(second).spawn();
        // The command holds the writing ends; they must go for the pipe to end.
        drop(self);
        let mut child = started.map_err(|source| ToolError::Start {
            command: command.clone(),
            source,
        })?;
        let mut last_words = VecDeque::new();
        let mut lines = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            if lines.read_until(b'\n', &mut line).map_err(output)? == 0 {
                break;
            }
            file.write_all(&line).at("write", log)?;
            progress.tool_line();
            if last_words.len() == LAST_WORDS {
                last_words.pop_front();
            }
            last_words.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        let status = child.wait().map_err(output)?;
        if status.success() {
            Ok(())
        } else {
            Err(ToolError::Failed {
                command,
                status,
                log: Some(log.to_owned()),
                last_words: last_words.into(),
            })
        }
    }

    /// Runs it and returns its standard output.
    pub(crate) fn read(mut self) -> Result<String, ToolError> {
        let command = self.line();
        let output = self.command.output().map_err(|source| ToolError::Start {
            command: command.clone(),
            source,
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(ToolError::Failed {
            command,
            status: output.status,
            log: None,
            last_words: String::from_utf8_lossy(&output.stderr)
                .lines()
                .map(str::to_owned)
                .collect(),
        })
    }

    fn line(&self) -> String {
        let words: Vec<OsString> = std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(OsStr::to_owned)
            .collect();
        let line = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        match line.char_indices().nth(300) {
            Some((end, _)) => format!("{} …", &line[..end]),
            None => line,
        }
    }
}

fn open_log(log: &Path) -> Result<File, FileError> {
    if let Some(parent) = log.parent() {
        files::make_dir(parent)?;
    }
    File::options()
        .create(true)
        .append(true)
        .open(log)
        .at("open", log)
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_command_status_and_last_words_and_keeps_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("logs/x.log");
        let mut progress = Progress::start("test");
        let error = Tool::new("sh")
            .args([
                "-c",
                "seq 100; echo the last word >&2; (sleep 0; exit 3); exit 3",
            ])
            .run(&log, &mut progress)
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3"), "{text}");
        assert!(text.ends_with("100\nthe last word"), "{text}");
        assert!(!text.contains("\n50\n"), "only the end is shown: {text}");
        assert!(files::read_text(&log).unwrap().contains("\n50\n"));
    }

    #[test]
    fn a_missing_program_is_named() {
        let text = Tool::new("no-such-program-here")
            .read()
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("cannot start no-such-program-here"),
            "{text}"
        );
    }
}
