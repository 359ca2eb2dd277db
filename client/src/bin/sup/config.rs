//! Which appliance to talk to: flags, else the environment, else the config file, which `sup login`
//! writes. clap has put the first two together already. What the file says of one appliance is told
//! to no other.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use client::{Endpoint, Trust};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use crate::args::TargetArguments;
use crate::complaint::Complaint;

/// An appliance and how to be let in.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) endpoint: Endpoint,
    pub(crate) token: String,
    pub(crate) trust: Trust,
}

/// `config.toml`.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    endpoint: Option<String>,
    token: Option<String>,
    /// Path of a PEM file; a relative one starts at the config file's directory.
    ca: Option<PathBuf>,
}

const DOING: &str = "finding the appliance";

impl Target {
    pub(crate) fn find(arguments: &TargetArguments) -> Result<Self, Complaint> {
        let (mut file, path) = read_file()?;
        let endpoint = endpoint(arguments, &file, &path)?;
        if !file.is_of(&endpoint) {
            (file.token, file.ca) = (None, None);
        }
        let token = given(arguments.token.as_ref())
            .or(file.token)
            .ok_or_else(|| {
                Complaint::new(DOING, format!("no token is configured for {endpoint}")).advice(
                    format!("`sup login {endpoint}` asks for one; or set SUP_TOKEN"),
                )
            })?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        let ca = given(arguments.ca.as_ref())
            .map(PathBuf::from)
            .or_else(|| file.ca.map(|ca| directory.join(ca)));
        let trust = match ca {
            Some(ca) => Trust::from_pem_file(&ca)
                .map_err(|error| Complaint::new("reading SUP_CA", error.to_string()))?,
            None => Trust::none(),
        };
        Ok(Self {
            endpoint,
            token,
            trust,
        })
    }

    pub(crate) fn endpoint(arguments: &TargetArguments) -> Result<Endpoint, Complaint> {
        let (file, path) = read_file()?;
        endpoint(arguments, &file, &path)
    }
}

fn endpoint(
    arguments: &TargetArguments,
    file: &Settings,
    path: &Path,
) -> Result<Endpoint, Complaint> {
    given(arguments.endpoint.as_ref())
        .or_else(|| file.endpoint.clone())
        .ok_or_else(|| {
            Complaint::new(DOING, "no appliance is configured").advice(format!(
                "`sup login https://HOST:PORT` asks what is needed and keeps it in {}; or set \
                 SUP_ENDPOINT",
                path.display()
            ))
        })?
        .parse()
        .map_err(|error: client::EndpointError| Complaint::new(DOING, error.to_string()))
}

/// An empty variable is an unset one.
pub(crate) fn given(value: Option<&String>) -> Option<String> {
    value.filter(|value| !value.is_empty()).cloned()
}

impl Settings {
    /// Without an endpoint of its own it goes with any.
    fn is_of(&self, endpoint: &Endpoint) -> bool {
        self.endpoint
            .as_ref()
            .is_none_or(|own| own.parse().is_ok_and(|own: Endpoint| own == *endpoint))
    }
}

/// Makes this appliance the one that is used; gives the file's path. All of it is written, or
/// nothing is changed.
pub(crate) fn store(
    endpoint: &Endpoint,
    token: &str,
    ca: Option<&str>,
) -> Result<PathBuf, Complaint> {
    let path = path();
    let what = format!("writing {}", path.display());
    let wrong = |error: std::io::Error| Complaint::new(&what, error.to_string());
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(wrong)?;
    // Its name tells it from others, so that the file always names one that is whole.
    let ca = ca.map(|pem| {
        let hash = *blake3::hash(pem.as_bytes()).as_bytes();
        let hash = HEXLOWER.encode(hash.get(..8).unwrap_or_default());
        (format!("ca-{hash}.pem"), pem)
    });
    if let Some((name, pem)) = &ca {
        write(&directory.join(name), pem).map_err(wrong)?;
    }
    let settings = Settings {
        endpoint: Some(endpoint.to_string()),
        token: Some(token.to_owned()),
        ca: ca.as_ref().map(|(name, _)| name.into()),
    };
    let text =
        toml::to_string(&settings).map_err(|error| Complaint::new(&what, error.to_string()))?;
    write(&path, &text).map_err(wrong)?;
    remove_old(directory, ca.as_ref().map(|(name, _)| name.as_str()));
    Ok(path)
}

/// The most links from one to the next; as many as the kernel follows.
const MOST_LINKS: usize = 40;

/// What a path names behind symbolic links, also where that does not exist yet: people keep their
/// settings elsewhere.
fn behind_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(target) = std::fs::read_link(&path) else {
            break;
        };
        path = path.parent().unwrap_or(Path::new("/")).join(target);
    }
    path
}

/// In one step, on the disk, and for nobody else to read.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let path = behind_links(path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = || -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    written().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Certificates of earlier logins.
fn remove_old(directory: &Path, kept: Option<&str>) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| {
            let hash = name
                .strip_prefix("ca-")
                .and_then(|n| n.strip_suffix(".pem"));
            hash.is_some_and(|hash| hash.len() == 16) && Some(name) != kept
        });
        if ours {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn read_file() -> Result<(Settings, PathBuf), Complaint> {
    let path = path();
    let wrong = |why| Complaint::new(&format!("reading {}", path.display()), why);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((Settings::default(), path));
        }
        Err(error) => return Err(wrong(error.to_string())),
    };
    // The error's own text would quote the line, and the line may be the token.
    let file = toml::from_str(&text).map_err(|error: toml::de::Error| {
        wrong(error.message().to_owned()).advice("it may hold `endpoint`, `token` and `ca`")
    })?;
    Ok((file, path))
}

fn path() -> PathBuf {
    let directory = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|directory| directory.is_absolute())
        .or_else(|| Some(std::env::home_dir()?.join(".config")))
        .unwrap_or_else(|| PathBuf::from("/etc"));
    directory.join("supvm/config.toml")
}
