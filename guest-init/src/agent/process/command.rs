//! Turns a client's wish into something that can be started: every check on arguments, directory
//! environment, user and limits is made here, before a process exists. Touches nothing but the user's
//! /etc/passwd and /etc/group.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use protocol::process::{CommandMode, OutputMode, StartProcess, StdinMode, TerminalSize};

use super::spawn::Program;
use super::user::{self, User};

/// Where programs are looked for when nobody says otherwise.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a program on a terminal of ours can rely on.
const TERM: &[u8] = b"xterm-256color";
/// The least memory that a command can be limited to.
const MIN_MEMORY: u64 = 1 << 20;
/// Bytes of a client's own words in a message.
const MAX_SHOWN: usize = 256;

/// What is wrong with a request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidCommand {
    /// Nothing to run.
    #[error("the command is empty; give a program and its arguments")]
    Empty,
    /// A shell command has to be one string.
    #[error("a shell command is exactly one string, not {0}")]
    NotOneString(usize),
    /// A zero byte cannot be passed to a program.
    #[error("{0} contains a zero byte")]
    Nul(&'static str),
    /// An environment variable without a usable name.
    #[error("environment variable name {0:?} is empty or contains '='")]
    Key(String),
    /// Nobody of that name.
    #[error("there is no user {0:?} in the guest's /etc/passwd")]
    NoSuchUser(String),
    /// No program runs in so little.
    #[error("{0} bytes of memory are too few; give at least {MIN_MEMORY}")]
    TooLittleMemory(u64),
    /// A value that this agent does not know.
    #[error("{field} has the unknown value {value}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
}

/// A command that can be started.
pub(crate) struct Command {
    /// What to execute.
    pub(crate) program: Program,
    /// The program as the client named it, for messages.
    pub(crate) name: String,
    /// The directory as the client named it, for messages.
    pub(crate) directory: String,
    /// Whether standard input is a pipe.
    pub(crate) stdin_pipe: bool,
    /// Whether its stream is a reader that it waits for.
    pub(crate) follows: bool,
    /// How long it may run.
    pub(crate) deadline: Option<Duration>,
    /// How much memory it may use.
    pub(crate) memory: Option<u64>,
    /// The terminal that it is to have.
    pub(crate) terminal: Option<TerminalSize>,
}

impl Command {
    /// Checks a request. `settings` are the machine's own environment variables.
    pub(crate) fn parse(
        request: StartProcess,
        workspace: &Path,
        settings: &[(String, String)],
    ) -> Result<Self, InvalidCommand> {
        let stdin_pipe = match request.stdin {
            StdinMode::Null => false,
            StdinMode::Pipe => true,
            other => {
                return Err(InvalidCommand::Unknown {
                    field: "stdin",
                    value: other.to_wire(),
                });
            }
        };
        let follows = match request.output {
            OutputMode::Follow => true,
            OutputMode::Log => false,
            other => {
                return Err(InvalidCommand::Unknown {
                    field: "output",
                    value: other.to_wire(),
                });
            }
        };
        if let Some(bytes) = request.memory_bytes.filter(|bytes| *bytes < MIN_MEMORY) {
            return Err(InvalidCommand::TooLittleMemory(bytes));
        }
        let user = user::find(&request.user)
            .ok_or_else(|| InvalidCommand::NoSuchUser(shown(&request.user)))?;
        let variables = environment(&user, request.terminal.is_some(), settings, request.env)?;
        let (candidates, arguments, name) = match request.mode {
            CommandMode::Argv => argv(request.command, &variables)?,
            CommandMode::Shell => shell(request.command)?,
            other => {
                return Err(InvalidCommand::Unknown {
                    field: "mode",
                    value: other.to_wire(),
                });
            }
        };
        let directory = workspace.join(std::ffi::OsStr::from_bytes(&request.cwd));
        let named = match &request.cwd[..] {
            [] => workspace.as_os_str().as_bytes(),
            cwd => cwd,
        };
        let named = shown(named);
        let environment = variables
            .into_iter()
            .map(|(key, value)| text("an environment variable", [key, value].join(&b'=')))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            program: Program {
                candidates,
                arguments,
                environment,
                directory: text("the working directory", directory.as_os_str().as_bytes())?,
                identity: Some(user.identity).filter(|identity| identity.uid != 0),
            },
            name,
            directory: named,
            stdin_pipe,
            follows,
            deadline: request.deadline_ms.map(Duration::from_millis),
            memory: request.memory_bytes,
            terminal: request.terminal,
        })
    }
}

type Parts = (Vec<CString>, Vec<CString>, String);
type Variables = BTreeMap<Vec<u8>, Vec<u8>>;

fn text(what: &'static str, bytes: impl Into<Vec<u8>>) -> Result<CString, InvalidCommand> {
    CString::new(bytes).map_err(|_| InvalidCommand::Nul(what))
}

fn argv(command: Vec<Vec<u8>>, variables: &Variables) -> Result<Parts, InvalidCommand> {
    let arguments = command
        .into_iter()
        .map(|argument| text("an argument", argument))
        .collect::<Result<Vec<_>, _>>()?;
    let program = arguments.first().ok_or(InvalidCommand::Empty)?.clone();
    let bytes = program.as_bytes();
    let name = shown(bytes);
    let candidates = if bytes.is_empty() {
        Vec::new()
    } else if bytes.contains(&b'/') {
        vec![program]
    } else {
        variables
            .get(&b"PATH"[..])
            .map_or(PATH, Vec::as_slice)
            .split(|byte| *byte == b':')
            .map(|directory| {
                let directory = if directory.is_empty() {
                    b"."
                } else {
                    directory
                };
                text("PATH", [directory, bytes].join(&b'/'))
            })
            .collect::<Result<_, _>>()?
    };
    Ok((candidates, arguments, name))
}

fn shell(command: Vec<Vec<u8>>) -> Result<Parts, InvalidCommand> {
    let count = command.len();
    let Ok([line]) = <[Vec<u8>; 1]>::try_from(command) else {
        return Err(InvalidCommand::NotOneString(count));
    };
    let line = text("the command", line)?;
    let arguments = vec![c"sh".to_owned(), c"-c".to_owned(), line];
    Ok((vec![c"/bin/sh".to_owned()], arguments, "sh".to_owned()))
}

/// Defaults, then the machine's settings, then what the request adds and removes.
fn environment(
    user: &User,
    terminal: bool,
    settings: &[(String, String)],
    request: Vec<(Vec<u8>, Option<Vec<u8>>)>,
) -> Result<Variables, InvalidCommand> {
    let mut variables: Variables = BTreeMap::from([
        (b"PATH".to_vec(), PATH.to_vec()),
        (b"HOME".to_vec(), user.home.clone()),
        (b"USER".to_vec(), user.name.clone()),
        (b"LOGNAME".to_vec(), user.name.clone()),
        (b"SHELL".to_vec(), user.shell.clone()),
        (b"LANG".to_vec(), b"C.UTF-8".to_vec()),
    ]);
    if terminal {
        variables.insert(b"TERM".to_vec(), TERM.to_vec());
    }
    for (key, value) in settings {
        variables.insert(key.clone().into_bytes(), value.clone().into_bytes());
    }
    for (key, value) in request {
        check_key(&key)?;
        match value {
            Some(value) => variables.insert(key, value),
            None => variables.remove(&key),
        };
    }
    Ok(variables)
}

/// A client's own words in a message, which is kept with the process: not more than a line of them.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.get(..MAX_SHOWN).unwrap_or(bytes)).into_owned();
    if bytes.len() > MAX_SHOWN {
        text + "…"
    } else {
        text
    }
}

/// Refuses what cannot be the name of an environment variable.
pub(crate) fn check_key(key: &[u8]) -> Result<(), InvalidCommand> {
    if key.contains(&0) {
        return Err(InvalidCommand::Nul("an environment variable's name"));
    }
    if key.is_empty() || key.contains(&b'=') {
        return Err(InvalidCommand::Key(shown(key)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use protocol::id::ProcessId;

    use super::*;

    fn request(command: &[&[u8]]) -> StartProcess {
        StartProcess {
            id: ProcessId([1; 16]),
            mode: CommandMode::Argv,
            command: command.iter().map(|part| part.to_vec()).collect(),
            cwd: Vec::new(),
            env: Vec::new(),
            stdin: StdinMode::Null,
            output: OutputMode::Follow,
            user: Vec::new(),
            deadline_ms: None,
            memory_bytes: None,
            terminal: None,
        }
    }

    fn parse(request: StartProcess) -> Result<Command, InvalidCommand> {
        let settings = [
            ("A".to_owned(), "vm".to_owned()),
            ("B".to_owned(), "vm".to_owned()),
        ];
        Command::parse(request, Path::new("/workspace"), &settings)
    }

    #[test]
    fn an_empty_command_is_refused() {
        assert_eq!(parse(request(&[])).err(), Some(InvalidCommand::Empty));
        let mut shell = request(&[b"a", b"b"]);
        shell.mode = CommandMode::Shell;
        assert_eq!(parse(shell).err(), Some(InvalidCommand::NotOneString(2)));
    }

    #[test]
    fn a_zero_byte_is_refused_wherever_it_is() {
        assert!(matches!(
            parse(request(&[b"a\0b"])),
            Err(InvalidCommand::Nul(_))
        ));
        let mut cwd = request(&[b"a"]);
        cwd.cwd = b"x\0".to_vec();
        assert!(matches!(parse(cwd), Err(InvalidCommand::Nul(_))));
        for pair in [
            (b"K\0".to_vec(), b"v".to_vec()),
            (b"K".to_vec(), b"\0".to_vec()),
        ] {
            let mut env = request(&[b"a"]);
            env.env = vec![(pair.0, Some(pair.1))];
            assert!(matches!(parse(env), Err(InvalidCommand::Nul(_))));
        }
    }

    #[test]
    fn an_unusable_variable_name_is_refused() {
        for key in [&b""[..], b"A=B"] {
            let mut env = request(&[b"a"]);
            env.env = vec![(key.to_vec(), None)];
            assert!(matches!(parse(env), Err(InvalidCommand::Key(_))));
        }
    }

    #[test]
    fn the_request_overrides_the_machine_and_none_removes() {
        let mut env = request(&[b"a"]);
        env.env = vec![
            (b"A".to_vec(), Some(b"mine".to_vec())),
            (b"B".to_vec(), None),
        ];
        let program = parse(env).ok().unwrap().program;
        assert!(program.environment.contains(&c"A=mine".to_owned()));
        assert!(
            !program
                .environment
                .iter()
                .any(|one| one.as_bytes().starts_with(b"B="))
        );
    }

    #[test]
    fn programs_are_looked_for_along_the_requests_own_path() {
        let mut env = request(&[b"tool"]);
        env.env = vec![(b"PATH".to_vec(), Some(b"/a:/b".to_vec()))];
        let program = parse(env).ok().unwrap().program;
        assert_eq!(
            program.candidates,
            [c"/a/tool".to_owned(), c"/b/tool".to_owned()]
        );
    }

    #[test]
    fn a_relative_directory_starts_at_the_workspace() {
        let mut relative = request(&[b"a"]);
        relative.cwd = b"sub".to_vec();
        assert_eq!(
            parse(relative).ok().unwrap().program.directory,
            c"/workspace/sub".to_owned()
        );
        let mut absolute = request(&[b"a"]);
        absolute.cwd = b"/tmp".to_vec();
        assert_eq!(
            parse(absolute).ok().unwrap().program.directory,
            c"/tmp".to_owned()
        );
    }

    #[test]
    fn limits_and_users_that_cannot_be_are_refused() {
        let mut memory = request(&[b"a"]);
        memory.memory_bytes = Some(MIN_MEMORY - 1);
        assert_eq!(
            parse(memory).err(),
            Some(InvalidCommand::TooLittleMemory(MIN_MEMORY - 1))
        );
        let mut user = request(&[b"a"]);
        user.user = b"nobody-of-this-name".to_vec();
        assert!(matches!(
            parse(user).err(),
            Some(InvalidCommand::NoSuchUser(_))
        ));
    }
}
