//! The first message of a run: who this machine is. What belongs to the kernel (name, clock, random
//! numbers) has to succeed; what belongs to the user's disk is tried, and a disk that refuses is
//! logged, because its owner can only mend it in a machine that is up.

use std::net::IpAddr;
use std::path::Path;

use protocol::agent::{Configure, Configured, SetTime, TimeSet};
use protocol::{ErrorBody, ErrorCode};

use super::process::check_key;
use super::{Agent, Machine, clock, lock};
use crate::log;
use crate::system::{disk, identity, kernel};

/// Most variables and name servers of one machine.
const MAX_LIST: usize = 256;

/// Whether the machine knows who it is.
#[derive(Debug, Default)]
pub(crate) enum Configuration {
    /// Not yet.
    #[default]
    Awaited,
    /// Yes.
    Done {
        /// Environment variables for every process.
        env: Vec<(String, String)>,
    },
}

/// Takes on the identity.
pub(crate) fn configure(agent: &Agent, request: Configure) -> Result<Configured, ErrorBody> {
    // Held until the end: whoever asks meanwhile is answered by what comes out.
    let mut configuration = lock(&agent.configuration);
    if matches!(*configuration, Configuration::Done { .. }) {
        let message = "the agent was configured before in this run";
        return Err(ErrorBody::caller(ErrorCode::AlreadyConfigured, message));
    }
    let servers = check(&request)?;
    if agent.machine == Machine::Own {
        apply(&request, &servers)?;
    }
    let internal =
        |error: kernel::KernelError| ErrorBody::guest(ErrorCode::Internal, error.to_string());
    let answer = Configured {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: kernel::boot_id().map_err(internal)?,
        disk_bytes: disk::root_bytes().unwrap_or_else(|error| {
            log::warn(format_args!("event=disk_size_unknown error=\"{error}\""));
            0
        }),
    };
    log::info(format_args!(
        "event=configured vm={} generation={} disk_bytes={}",
        request.vm, request.generation, answer.disk_bytes
    ));
    agent.uploads.load();
    *configuration = Configuration::Done { env: request.env };
    Ok(answer)
}

/// Puts the clock right, as after a pause.
pub(crate) fn set_time(agent: &Agent, request: &SetTime) -> Result<TimeSet, ErrorBody> {
    if agent.machine == Machine::Borrowed {
        let message = "the agent runs on a machine that is not its own and leaves its clock alone";
        return Err(ErrorBody::caller(ErrorCode::InvalidArgument, message));
    }
    let step_ns = kernel::step_clock(request.unix_ns)
        .map_err(|error| ErrorBody::guest(ErrorCode::Internal, error.to_string()))?;
    log::info(format_args!("event=time_set step_ns={step_ns}"));
    Ok(TimeSet { step_ns })
}

/// Refuses what would make a broken machine.
fn check(request: &Configure) -> Result<Vec<IpAddr>, ErrorBody> {
    let invalid = |message: String| ErrorBody::caller(ErrorCode::InvalidArgument, message);
    let name = &request.hostname;
    let letters = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
    if name.is_empty() || name.len() > 63 || !letters {
        return Err(invalid(format!(
            "hostname {name:?} is not made of 1 to 63 letters, digits, '-' and '.'"
        )));
    }
    if request.env.len() > MAX_LIST || request.dns.len() > MAX_LIST {
        return Err(invalid(format!(
            "more than {MAX_LIST} environment variables or name servers"
        )));
    }
    for (key, value) in &request.env {
        check_key(key.as_bytes()).map_err(|problem| invalid(problem.to_string()))?;
        if value.contains('\0') {
            return Err(invalid(format!("the value of {key} contains a zero byte")));
        }
    }
    request
        .dns
        .iter()
        .map(|server| {
            server
                .parse()
                .map_err(|_| invalid(format!("name server {server:?} is no IP address")))
        })
        .collect()
}

fn apply(request: &Configure, servers: &[IpAddr]) -> Result<(), ErrorBody> {
    let internal =
        |error: kernel::KernelError| ErrorBody::guest(ErrorCode::Internal, error.to_string());
    kernel::set_hostname(&request.hostname).map_err(internal)?;
    kernel::set_clock(request.unix_ns).map_err(internal)?;
    clock::begin();
    kernel::add_entropy(&request.entropy).map_err(internal)?;
    for problem in identity::write(
        Path::new("/"),
        &request.hostname,
        request.machine_id,
        servers,
    ) {
        log::warn(format_args!(
            "event=identity_not_written error=\"{problem}\""
        ));
    }
    if request.grow_disk
        && let Err(error) = disk::grow_root()
    {
        log::warn(format_args!("event=disk_not_grown error=\"{error}\""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Configure {
        Configure {
            vm: "vm-00000000".to_owned(),
            generation: 1,
            hostname: "supvm-0000".to_owned(),
            machine_id: [1; 16],
            unix_ns: 0,
            entropy: [0; 32],
            dns: vec!["10.213.0.1".to_owned(), "fd73:7570::1".to_owned()],
            env: vec![("A".to_owned(), "b".to_owned())],
            grow_disk: false,
        }
    }

    #[test]
    fn only_addresses_get_into_the_resolver_file() {
        assert_eq!(check(&request()).unwrap().len(), 2);
        let mut odd = request();
        odd.dns = vec!["1.1.1.1\nsearch evil".to_owned()];
        assert_eq!(check(&odd).unwrap_err().code, ErrorCode::InvalidArgument);
    }

    #[test]
    fn a_hostname_that_would_break_files_is_refused() {
        for name in ["", "a b", "a\nb", &"x".repeat(64)] {
            let mut odd = request();
            odd.hostname = name.to_owned();
            assert_eq!(check(&odd).unwrap_err().code, ErrorCode::InvalidArgument);
        }
    }
}
