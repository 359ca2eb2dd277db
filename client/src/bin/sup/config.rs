//! Which appliance to talk to: flags, else the environment, else the config file. clap has put the
//! first two together already.

use std::path::{Path, PathBuf};

use client::{Endpoint, Trust};
use serde::Deserialize;

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
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    endpoint: Option<String>,
    token: Option<String>,
    /// Path of a PEM file; a relative one starts at the config file's directory.
    ca: Option<PathBuf>,
}

const DOING: &str = "finding the appliance";

impl Target {
    pub(crate) fn find(arguments: &TargetArguments) -> Result<Self, Complaint> {
        let (file, path) = read_file()?;
        let endpoint = endpoint(arguments, &file, &path)?;
        let token = given(arguments.token.as_ref())
            .or(file.token)
            .ok_or_else(|| {
                Complaint::new(DOING, "no token is configured")
                    .advice(format!("set SUP_TOKEN, or `token` in {}", path.display()))
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

fn endpoint(arguments: &TargetArguments, file: &File, path: &Path) -> Result<Endpoint, Complaint> {
    given(arguments.endpoint.as_ref())
        .or_else(|| file.endpoint.clone())
        .ok_or_else(|| {
            Complaint::new(DOING, "no endpoint is configured").advice(format!(
                "set SUP_ENDPOINT to https://HOST:PORT or unix:/PATH, or `endpoint` in {}",
                path.display()
            ))
        })?
        .parse()
        .map_err(|error: client::EndpointError| Complaint::new(DOING, error.to_string()))
}

/// An empty variable is an unset one.
fn given(value: Option<&String>) -> Option<String> {
    value.filter(|value| !value.is_empty()).cloned()
}

fn read_file() -> Result<(File, PathBuf), Complaint> {
    let path = path();
    let wrong = |why| Complaint::new(&format!("reading {}", path.display()), why);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((File::default(), path));
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
