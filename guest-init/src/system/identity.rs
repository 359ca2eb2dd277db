//! The files that say who the machine is: /etc/hostname, /etc/hosts, /etc/machine-id and
//! /etc/resolv.conf. In /etc/hosts only the lines marked as ours are ours.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use super::files::{self, FileError};

/// Ends the lines in /etc/hosts that the agent keeps.
const MARK: &str = "# supvm";
/// Longest /etc/hosts that is changed.
const MAX_HOSTS: usize = 1 << 20;

/// Writes all of them and gives what did not work.
pub(crate) fn write(
    root: &Path,
    hostname: &str,
    machine_id: [u8; 16],
    servers: &[IpAddr],
) -> Vec<FileError> {
    let etc = root.join("etc");
    let mut id = machine_id.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    id.push('\n');
    let hosts = etc.join("hosts");
    let with_us = match files::read(&hosts, MAX_HOSTS) {
        Ok(old) => Ok(hosts_with(&old, hostname)),
        Err(FileError::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
            Ok(hosts_with(b"", hostname))
        }
        Err(error) => Err(error),
    };
    [
        files::replace(&etc.join("hostname"), format!("{hostname}\n").as_bytes()),
        files::replace(&etc.join("machine-id"), id.as_bytes()),
        with_us.and_then(|text| files::replace(&hosts, &text)),
        files::replace(&etc.join("resolv.conf"), resolver(servers).as_bytes()),
    ]
    .into_iter()
    .filter_map(Result::err)
    .collect()
}

fn resolver(servers: &[IpAddr]) -> String {
    let mut text = String::from("# Written at every start of the VM.\n");
    for server in servers {
        // Writing to a string does not fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

/// The user's lines, and ours anew.
fn hosts_with(old: &[u8], hostname: &str) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = old
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.ends_with(MARK.as_bytes()))
        .collect();
    while lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    let mut text = lines.join(&b'\n');
    if !text.is_empty() {
        text.push(b'\n');
    }
    let has_localhost = lines.iter().any(|line| {
        !line.starts_with(b"#")
            && line
                .split(u8::is_ascii_whitespace)
                .any(|word| word == b"localhost")
    });
    if !has_localhost {
        text.extend_from_slice(format!("127.0.0.1 localhost {MARK}\n").as_bytes());
        text.extend_from_slice(
            format!("::1 localhost ip6-localhost ip6-loopback {MARK}\n").as_bytes(),
        );
    }
    text.extend_from_slice(format!("127.0.1.1 {hostname} {MARK}\n").as_bytes());
    text
}

/// The user's lines of anything survive, and once is as good as twice.
#[cfg(fuzzing)]
pub(crate) fn fuzz(hosts: &[u8]) {
    let once = hosts_with(hosts, "supvm-name");
    assert_eq!(hosts_with(&once, "supvm-name"), once);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_users_own_hosts_survive_any_number_of_starts() {
        let once = hosts_with(b"127.0.0.1 localhost\n1.2.3.4 db\n", "one");
        let twice = hosts_with(&once, "two");
        assert_eq!(
            String::from_utf8(twice).unwrap(),
            "127.0.0.1 localhost\n1.2.3.4 db\n127.0.1.1 two # supvm\n"
        );
    }

    #[test]
    fn an_empty_hosts_file_still_knows_localhost() {
        let text = String::from_utf8(hosts_with(b"", "one")).unwrap();
        assert!(text.contains("127.0.0.1 localhost"));
        assert_eq!(
            String::from_utf8(hosts_with(text.as_bytes(), "one")).unwrap(),
            text
        );
    }

    #[test]
    fn a_file_that_cannot_be_written_does_not_stop_the_others() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/hosts")).unwrap();
        let servers = ["10.213.0.1", "fd73:7570::1"].map(|server| server.parse().unwrap());
        let problems = write(root.path(), "supvm-abcd", [0xab; 16], &servers);
        assert_eq!(problems.len(), 1);
        let read = |name| fs::read_to_string(root.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "supvm-abcd\n");
        assert_eq!(read("machine-id"), format!("{}\n", "ab".repeat(16)));
        assert!(
            read("resolv.conf").ends_with("\nnameserver 10.213.0.1\nnameserver fd73:7570::1\n")
        );
    }
}
