//! The command line's grammar. Values are parsed here into what the library takes.

use clap::{Args, Parser, Subcommand};
use client::protocol::id::{ProcessId, TemplateName, VmName};
use client::protocol::vm::VmRef;

/// Linux virtual machines on a supvm appliance.
#[derive(Debug, Parser)]
#[command(name = "sup", arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) target: TargetArguments,
    #[command(subcommand)]
    pub(crate) task: Task,
}

/// Which appliance.
#[derive(Debug, Args)]
pub(crate) struct TargetArguments {
    /// The appliance's API: https://HOST:PORT or unix:/PATH
    #[arg(long, env = "SUP_ENDPOINT", global = true)]
    pub(crate) endpoint: Option<String>,
    /// The token; other users of this machine can see it when given here, so prefer SUP_TOKEN
    #[arg(long, env = "SUP_TOKEN", hide_env_values = true, global = true)]
    pub(crate) token: Option<String>,
    /// The appliance's CA certificate, a PEM file
    #[arg(long, env = "SUP_CA", global = true)]
    pub(crate) ca: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Create a VM, wait until it is ready and print its id
    Create(Create),
    /// List VMs
    Ls {
        /// As a JSON array
        #[arg(long)]
        json: bool,
        /// Only the ids
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
    },
    /// Print all that is known of a VM, as JSON
    Inspect {
        /// The VM's id or name
        vm: VmRef,
    },
    /// Stop a VM; its disk is kept
    Stop {
        /// The VM's id or name
        vm: VmRef,
        /// Seconds after which it is switched off hard
        #[arg(long)]
        deadline: Option<u32>,
    },
    /// Start a stopped VM and wait until it is ready
    Start {
        /// The VM's id or name
        vm: VmRef,
    },
    /// Run a command in a VM; its exit code becomes sup's, 255 means that it could not be run
    Exec(Exec),
    /// Open a shell in a VM, at a terminal
    Shell(Shell),
    /// List the processes that were started through the appliance
    Ps(Ps),
    /// Print what a process has written, or the end of the VM's console
    Logs(Logs),
    /// Join a process: its output, our input; Ctrl-] leaves it at a terminal
    Attach(Attach),
    /// End processes and all that they started, or send them a signal
    Kill(Kill),
    /// Copy files and directories to a VM, from a VM, or from one to another
    Cp(crate::copy::Copy),
    /// Print the address of a VM's web server
    Url {
        /// The VM's id or name
        vm: VmRef,
        /// Make a link that lets one visitor in without the token; it opens once, within a day
        #[arg(long)]
        link: bool,
    },
    /// Show what a VM may reach and who may reach it, or change that
    Network(crate::rules::Network),
    /// Lead a port of this machine to a port of a VM, until Ctrl-C
    Forward(Forward),
    /// Delete VMs and their disks
    Rm {
        /// Ids or names
        #[arg(required = true)]
        vms: Vec<VmRef>,
    },
    /// Open a VM's web server in the browser; prints the address where there is none
    Open {
        /// The VM's id or name
        vm: VmRef,
    },
    /// Run a patch: a script in JavaScript with a global `sup` that gives it VMs
    #[cfg(feature = "patch")]
    Run(crate::run::Run),
    /// Keep how to reach an appliance: its endpoint, your token and its CA certificate
    Login(crate::login::Login),
    /// Print what makes a shell complete sup's commands and options
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
    /// Print the CA certificate that the appliance shows, and its SHA-256 on standard error
    #[command(hide = true)]
    CaFetch,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The template to make its disk from
    #[arg(long)]
    pub(crate) template: Option<TemplateName>,
    /// A name, unique among your VMs
    #[arg(long)]
    pub(crate) name: Option<VmName>,
    /// Virtual CPUs
    #[arg(long)]
    pub(crate) cpus: Option<u16>,
    /// Memory: MiB, or with a unit (512M, 2G)
    #[arg(long, value_parser = mebibytes)]
    pub(crate) memory: Option<u32>,
    /// Disk: MiB, or with a unit (512M, 20G)
    #[arg(long, value_parser = mebibytes)]
    pub(crate) disk: Option<u32>,
    /// A label of your own
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) label: Vec<(String, String)>,
    /// An environment variable for every process in the VM
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) env: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) connected: crate::rules::Connected,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    #[command(flatten)]
    pub(crate) setting: Setting,
    /// Give the command, one argument, to `sh -c`
    #[arg(long)]
    pub(crate) shell: bool,
    /// Do not wait for it; print the id by which `ps`, `logs`, `attach` and `kill` know it
    #[arg(short, long, conflicts_with = "tty")]
    pub(crate) detach: bool,
    /// Give it a terminal: keys go to it one by one, and it can draw
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// The command and its arguments; put `--` before them if the first begins with `-`
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Shell {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    #[command(flatten)]
    pub(crate) setting: Setting,
}

/// Where, with what and as whom a command runs.
#[derive(Debug, Args)]
pub(crate) struct Setting {
    /// Where it runs; a relative directory starts at /workspace
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) cwd: String,
    /// An environment variable
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Whose it is, by name or number; without this root
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub(crate) user: String,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    /// Those that have ended, too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// As a JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Only the ids
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    /// The process's id or its beginning; without it the VM's console is printed
    pub(crate) process: Option<ProcessPrefix>,
    /// Go on until the process ends
    #[arg(short, long, requires = "process")]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub(crate) tail: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    /// The process's id or its beginning
    pub(crate) process: ProcessPrefix,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    /// Ids or their beginnings
    #[arg(required = true)]
    pub(crate) processes: Vec<ProcessPrefix>,
    /// Seconds to end by itself before it is made to; without this 5
    #[arg(long, value_name = "SECONDS")]
    pub(crate) grace: Option<u64>,
    /// Only send this signal, by name or number
    #[arg(short, long, conflicts_with = "grace", value_parser = signal)]
    pub(crate) signal: Option<u8>,
}

#[derive(Debug, Args)]
pub(crate) struct Forward {
    /// The VM's id or name
    pub(crate) vm: VmRef,
    /// The VM's port, or LOCAL:REMOTE; 0 as the local one takes any that is free
    #[arg(value_name = "[LOCAL:]REMOTE")]
    pub(crate) ports: Ports,
}

/// A port of 127.0.0.1 and the one that it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) local: u16,
    pub(crate) remote: u16,
}

impl std::str::FromStr for Ports {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (local, remote) = text.split_once(':').unwrap_or((text, text));
        match (local.parse(), remote.parse()) {
            (Ok(local), Ok(remote)) if remote != 0 => Ok(Self { local, remote }),
            _ => Err("write it as REMOTE or LOCAL:REMOTE, from 1 to 65535"),
        }
    }
}

/// A process's id, or as much of its beginning as tells it from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProcessPrefix(String);

impl ProcessPrefix {
    pub(crate) fn fits(&self, id: ProcessId) -> bool {
        id.to_string().starts_with(&self.0)
    }
}

impl std::str::FromStr for ProcessPrefix {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !digits || !(1..=32).contains(&text.len()) {
            return Err(
                "an id has 32 hexadecimal digits, its beginning at least one; see `sup ps`",
            );
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl std::fmt::Display for ProcessPrefix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

fn signal(text: &str) -> Result<u8, String> {
    if let Ok(number) = text.parse::<u8>() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = format!("SIG{}", upper.strip_prefix("SIG").unwrap_or(&upper));
    name.parse::<nix::sys::signal::Signal>()
        .ok()
        .and_then(|signal| u8::try_from(signal as i32).ok())
        .ok_or_else(|| "write it as TERM, SIGTERM or 15".into())
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}

fn mebibytes(text: &str) -> Result<u32, String> {
    let lower = text.to_ascii_lowercase();
    let (number, factor) = [("gib", 1024), ("g", 1024), ("mib", 1), ("m", 1)]
        .into_iter()
        .find_map(|(unit, factor)| Some((lower.strip_suffix(unit)?, factor)))
        .unwrap_or((&lower, 1));
    number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|size| *size > 0)
        .ok_or_else(|| "write it in MiB, or with a unit: 512M, 2G".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_mebibytes_whatever_the_unit() {
        assert_eq!(mebibytes("512"), Ok(512));
        assert_eq!(mebibytes("512m"), Ok(512));
        assert_eq!(mebibytes("2G"), Ok(2048));
        assert_eq!(mebibytes("2GiB"), Ok(2048));
        for text in ["", "g", "0", "-1", "1t", "9999999G", "1.5G"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_process_is_named_by_hexadecimal_digits_only() {
        let id = ProcessId([0xab; 16]);
        for text in ["a", "AB", &"ab".repeat(16)] {
            assert!(text.parse::<ProcessPrefix>().unwrap().fits(id), "{text}");
        }
        assert!(!"ac".parse::<ProcessPrefix>().unwrap().fits(id));
        for text in ["", "x", "-1", "a b", &"a".repeat(33)] {
            assert!(text.parse::<ProcessPrefix>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_grammar_is_free_of_contradictions() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_and_every_option_is_in_the_documentation() {
        use clap::CommandFactory;
        let page = concat!(
            include_str!("../../../../docs/sup.md"),
            include_str!("../../../../docs/patches.md")
        );
        for command in Arguments::command().get_subcommands() {
            let name = command.get_name();
            assert!(page.contains(&format!("sup {name}")), "sup {name}");
            for option in command
                .get_arguments()
                .filter(|option| !option.is_hide_set())
            {
                if let Some(long) = option.get_long() {
                    let short = option.get_short().map(|short| format!("`-{short}`"));
                    let known = page.contains(&format!("--{long}"))
                        || short.is_some_and(|short| page.contains(&short));
                    assert!(known, "sup {name} --{long}");
                }
            }
        }
    }
}
