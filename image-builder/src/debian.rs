//! Finds, fetches and unpacks Debian packages by name and exact version, without root and without
//! installing anything. The versions are those this machine's apt sources offer; it never names a
//! mirror itself.

use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::files::{self, FileError};
use crate::progress::Progress;
use crate::tool::{Tool, ToolError};

/// A package that could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebianError {
    /// No apt source offers it.
    #[error(
        "no apt source of this machine offers the package {0}; check the sources (main is enough) and run `apt-get update`"
    )]
    Unknown(String),
    /// A meta package does not depend on what it should stand for.
    #[error("the package {package} depends on {depends:?}, not on one package {prefix}…")]
    NoDependency {
        /// The meta package.
        package: String,
        /// What it depends on.
        depends: String,
        /// The wanted beginning of the name.
        prefix: String,
    },
    /// The download did not leave the file.
    #[error("apt-get download {0} left no .deb file")]
    NoFile(String),
    /// Not a Debian system, or one we don't know.
    #[error("cannot tell the Debian release from /etc/os-release (VERSION_ID is {0:?})")]
    Release(Option<String>),
    /// A program failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A package at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its exact version.
    pub(crate) version: String,
    /// What it depends on, as apt says it.
    depends: String,
}

/// What apt's sources offer, as far as it was asked.
pub(crate) struct Apt {
    options: Vec<String>,
    offered: Vec<Package>,
}

impl Apt {
    /// Looks all of `names` up at once (each call of apt reads all its lists). When the machine's
    /// own lists know none of them (an image whose lists were removed), lists of our own are
    /// fetched into the cache from the same sources.
    pub(crate) fn look_up(cache: &Cache, names: &[&str]) -> Result<Self, DebianError> {
        // root's apt would drop to a user who may not write into our directories
        let mut options = vec!["-oAPT::Sandbox::User=root".to_owned()];
        let mut offered = show(&options, names)?;
        if offered.is_empty() {
            let lists = cache.aside("apt-lists");
            files::make_dir(&lists.join("partial"))?;
            options.push(format!("-oDir::State::Lists={}", lists.display()));
            for index in ["pkgcache", "srcpkgcache"] {
                options.push(format!("-oDir::Cache::{index}="));
            }
            let mut progress = Progress::start("apt");
            progress.phase("fetching the lists of packages");
            Tool::new("apt-get")
                .args(&options)
                .arg("update")
                .run(&cache.log_path("apt"), &mut progress)?;
            progress.done("lists fetched");
            offered = show(&options, names)?;
        }
        Ok(Self { options, offered })
    }

    /// The version apt would install, of a package that was looked up.
    pub(crate) fn resolve(&self, name: &str) -> Result<Package, DebianError> {
        self.offered
            .iter()
            .find(|package| package.name == name)
            .cloned()
            .ok_or_else(|| DebianError::Unknown(name.to_owned()))
    }

    /// The one package a meta package stands for: the dependency whose name starts with `prefix`.
    pub(crate) fn resolve_through(&self, meta: &str, prefix: &str) -> Result<Package, DebianError> {
        let meta = self.resolve(meta)?;
        let found = meta
            .depends
            .split(',')
            .find_map(|dependency| exact_dependency(dependency, prefix));
        let Some((name, version)) = found else {
            return Err(DebianError::NoDependency {
                package: meta.name,
                depends: meta.depends,
                prefix: prefix.to_owned(),
            });
        };
        Ok(Package {
            name: name.to_owned(),
            version: version.to_owned(),
            depends: String::new(),
        })
    }

    /// Fetches a package into `dir` and returns the file.
    pub(crate) fn download(
        &self,
        package: &Package,
        dir: &Path,
        log: &Path,
        progress: &mut Progress,
    ) -> Result<PathBuf, DebianError> {
        files::make_dir(dir)?;
        Tool::new("apt-get")
            .args(&self.options)
            .arg("download")
            .arg(format!("{}={}", package.name, package.version))
            .dir(dir)
            .run(log, progress)?;
        let start = format!("{}_", package.name);
        files::files_below(dir)?
            .into_iter()
            .find(|path| path.to_string_lossy().starts_with(&start))
            .map(|path| dir.join(path))
            .ok_or_else(|| DebianError::NoFile(package.name.clone()))
    }
}

fn show(options: &[String], names: &[&str]) -> Result<Vec<Package>, DebianError> {
    // apt-cache fails when it knows none of the names.
    match Tool::new("apt-cache")
        .args(options)
        .args(["-q=2", "--no-all-versions", "show"])
        .args(names)
        .read()
    {
        Ok(text) => Ok(text.split("\n\n").filter_map(parse_record).collect()),
        Err(ToolError::Failed { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Unpacks the files of a .deb into `into`, running nothing of it.
pub(crate) fn unpack(
    deb: &Path,
    into: &Path,
    log: &Path,
    progress: &mut Progress,
) -> Result<(), DebianError> {
    files::make_dir(into)?;
    Tool::new("dpkg-deb")
        .arg("-x")
        .arg(deb)
        .arg(into)
        .run(log, progress)?;
    Ok(())
}

/// The version of an installed package, or "none".
pub(crate) fn installed_version(name: &str) -> String {
    Tool::new("dpkg-query")
        .args(["-W", "-f", "${Version}", name])
        .read()
        .ok()
        .filter(|version| !version.is_empty())
        .unwrap_or_else(|| "none".to_owned())
}

/// The number of the Debian release this machine runs (12, 13).
pub(crate) fn release() -> Result<u32, DebianError> {
    let text = files::read_text(Path::new("/etc/os-release"))?;
    let id = os_release_value(&text, "VERSION_ID");
    id.as_deref()
        .and_then(|id| id.parse().ok())
        .ok_or(DebianError::Release(id))
}

fn os_release_value(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.trim_matches('"').to_owned())
}

/// One record of `apt-cache show`.
fn parse_record(text: &str) -> Option<Package> {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key == name).then(|| value.trim().to_owned())
        })
    };
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        depends: field("Depends").unwrap_or_default(),
    })
}

/// "name (= version)" when the name starts with `prefix`.
fn exact_dependency<'a>(dependency: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let (name, rest) = dependency.trim().split_once(' ')?;
    let version = rest.trim().strip_prefix("(= ")?.strip_suffix(')')?;
    name.starts_with(prefix).then_some((name, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_and_its_exact_dependency_found() {
        let text = "Package: linux-image-6.12-amd64\nSource: linux-signed-amd64 (6.12.5+1)\n\
                    Version: 6.12.5-1~deb12u1\nDepends: foo, linux-image-6.12.5+deb12-amd64 (= 6.12.5-1~deb12u1)\n\
                    Description: meta\n more: text\n";
        let package = parse_record(text).unwrap();
        assert_eq!(package.name, "linux-image-6.12-amd64");
        assert_eq!(package.version, "6.12.5-1~deb12u1");
        let found = package
            .depends
            .split(',')
            .find_map(|dependency| exact_dependency(dependency, "linux-image-"));
        assert_eq!(
            found,
            Some(("linux-image-6.12.5+deb12-amd64", "6.12.5-1~deb12u1"))
        );
        assert_eq!(
            exact_dependency("linux-image-x (>= 6)", "linux-image-"),
            None
        );
        assert_eq!(parse_record(""), None);
    }

    #[test]
    fn the_release_number_is_read_from_its_own_line() {
        let text = "NAME=\"Debian\"\nVERSION_ID=\"12\"\nVERSION=\"12 (x)\"\n";
        assert_eq!(os_release_value(text, "VERSION_ID").as_deref(), Some("12"));
        assert_eq!(os_release_value(text, "ID"), None);
    }
}
