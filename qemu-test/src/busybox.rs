//! Debian's static busybox, the shell behind the probe. It is fetched once as a package, by apt as
//! the machine is set up, and kept outside the checkout; nothing is installed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PACKAGE: &str = "busybox-static";

/// Why there is no busybox.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BusyboxError {
    /// The cache cannot be used.
    #[error("cache {}: {cause}", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A tool of Debian's failed.
    #[error("`{command}` failed: {message}; run ./setup.sh, then try again")]
    Tool {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
    /// Neither variable that leads to a cache directory is set.
    #[error("neither XDG_CACHE_HOME nor HOME is set; set one of them")]
    NoHome,
}

/// The busybox's bytes, fetched when they are not in the cache yet.
pub(crate) fn load() -> Result<Vec<u8>, BusyboxError> {
    let cache = cache_directory()?;
    create(&cache)?;
    let version = resolved_version()?;
    let name: String = version
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .collect();
    let file = cache.join(format!("{PACKAGE}-{name}"));
    if !file.exists() {
        fetch(&cache, &version, &file)?;
    }
    std::fs::read(&file).map_err(|cause| BusyboxError::Cache { path: file, cause })
}

fn cache_directory() -> Result<PathBuf, BusyboxError> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))
        .map(|base| base.join("supvm"))
        .ok_or(BusyboxError::NoHome)
}

fn create(directory: &Path) -> Result<(), BusyboxError> {
    std::fs::create_dir_all(directory).map_err(|cause| BusyboxError::Cache {
        path: directory.to_owned(),
        cause,
    })
}

fn resolved_version() -> Result<String, BusyboxError> {
    let mut command = Command::new("apt-cache");
    command.args(["show", "--no-all-versions", PACKAGE]);
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .map(|version| version.trim().to_owned())
        .ok_or_else(|| BusyboxError::Tool {
            command: format!("apt-cache show {PACKAGE}"),
            message: "no version in its answer".into(),
        })
}

fn fetch(cache: &Path, version: &str, file: &Path) -> Result<(), BusyboxError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause| BusyboxError::Cache { path, cause }
    };
    let staging = cache.join(format!(".{PACKAGE}.{}", std::process::id()));
    create(&staging)?;
    let fetched = (|| {
        let mut download = Command::new("apt-get");
        download
            .args(["download", "-qq", &format!("{PACKAGE}={version}")])
            .current_dir(&staging);
        run(download)?;
        let package = std::fs::read_dir(&staging)
            .map_err(failed(&staging))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| failed(&staging)(io::ErrorKind::NotFound.into()))?;
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(&package).arg(staging.join("x"));
        run(unpack)?;
        // Debian 12 has it in /bin, Debian 13 in /usr/bin.
        let candidates = ["x/usr/bin/busybox", "x/bin/busybox"].map(|name| staging.join(name));
        let binary = candidates
            .iter()
            .find(|path| path.is_file())
            .ok_or_else(|| failed(&staging)(io::ErrorKind::NotFound.into()))?;
        std::fs::rename(binary, file).map_err(failed(file))
    })();
    // What is left there is of no use to anybody, whether this worked or not.
    let _ = std::fs::remove_dir_all(&staging);
    fetched
}

fn run(mut command: Command) -> Result<Output, BusyboxError> {
    let tool = |command: &Command, message: String| BusyboxError::Tool {
        command: format!("{command:?}"),
        message,
    };
    let output = command
        .output()
        .map_err(|cause| tool(&command, cause.to_string()))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(tool(&command, message));
    }
    Ok(output)
}
