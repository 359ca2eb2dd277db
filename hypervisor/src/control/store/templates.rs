//! Templates: `templates/<name>@<version>/{disk.img,template.toml}`. The system slot carries them
//! too; those that the data file system lacks are imported once. A template is immutable: its
//! version changes when its content does.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::id::{TemplateName, TemplateVersion};
use serde::Deserialize;

use super::{Store, StoreError, disk};

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    /// The description is not valid.
    #[error("the template description {} is not valid: {cause}", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: Box<toml::de::Error>,
    },
    /// Description, directory and disk do not agree.
    #[error("the template in {} is not valid: {rule}", path.display())]
    Inconsistent {
        /// The directory.
        path: PathBuf,
        /// What is expected.
        rule: String,
    },
}

/// A template that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    pub(crate) name: TemplateName,
    pub(crate) version: TemplateVersion,
    /// Size of its disk in bytes, the least that a VM made from it may have.
    pub(crate) disk_bytes: u64,
    /// Its disk image.
    pub(crate) disk: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: TemplateName,
    version: TemplateVersion,
    disk_bytes: u64,
    #[serde(default, rename = "description")]
    _description: String,
}

impl Template {
    fn read(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join("template.toml");
        let text = fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
        let description: Description =
            toml::from_str(&text).map_err(|cause| TemplateError::Description {
                path,
                cause: Box::new(cause),
            })?;
        let inconsistent = |rule| TemplateError::Inconsistent {
            path: directory.to_owned(),
            rule,
        };
        let expected = format!("{}@{}", description.name, description.version);
        if directory
            .file_name()
            .is_none_or(|name| name.to_string_lossy() != *expected)
        {
            return Err(inconsistent(format!("its directory should be called {expected}")).into());
        }
        let disk = directory.join("disk.img");
        let length = fs::metadata(&disk)
            .map_err(StoreError::io("read", &disk))?
            .len();
        if length != description.disk_bytes || length == 0 {
            return Err(inconsistent(format!(
                "disk.img has {length} bytes, template.toml says {}",
                description.disk_bytes
            ))
            .into());
        }
        Ok(Self {
            name: description.name,
            version: description.version,
            disk_bytes: length,
            disk,
        })
    }

    /// Size of its disk in whole MiB.
    pub(crate) fn disk_mib(&self) -> u32 {
        u32::try_from(self.disk_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
    }
}

impl Store {
    /// Imports every template of the system slot that is not here yet. One that cannot be imported
    /// is logged and does not stop the others.
    pub(crate) fn import_templates(&self, system: &Path) {
        for directory in directories(&system.join("templates")) {
            match self.import_template(&directory) {
                Ok(false) => {}
                Ok(true) => {
                    tracing::info!(from = %directory.display(), "template imported");
                }
                Err(error) => {
                    tracing::error!(from = %directory.display(), %error, "template not imported");
                }
            }
        }
    }

    fn import_template(&self, from: &Path) -> Result<bool, StoreError> {
        let Some(name) = from.file_name().and_then(|name| name.to_str()) else {
            return Ok(false);
        };
        if self.templates().join(name).exists() {
            return Ok(false);
        }
        let template = Template::read(from)?;
        self.make_template(name, |staged| {
            let disk = staged.join("disk.img");
            disk::copy_written(&template.disk, &disk)?;
            let description = staged.join("template.toml");
            fs::copy(from.join("template.toml"), &description)
                .map_err(StoreError::io("write", &description))?;
            for path in [disk, description] {
                fs::File::open(&path)
                    .and_then(|file| file.sync_all())
                    .map_err(StoreError::io("sync", &path))?;
            }
            Ok(())
        })?;
        Ok(true)
    }

    /// The newest version of a template; none when there is no usable one.
    pub(crate) fn template(&self, name: &TemplateName) -> Option<Template> {
        let prefix = format!("{name}@");
        let mut best: Option<Template> = None;
        for directory in directories(&self.templates()) {
            let ours = directory
                .file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(&prefix));
            if !ours {
                continue;
            }
            match Template::read(&directory) {
                Ok(found) => {
                    if best.as_ref().is_none_or(|best| {
                        by_number(found.version.as_str(), best.version.as_str()).is_gt()
                    }) {
                        best = Some(found);
                    }
                }
                Err(error) => tracing::error!(%error, "template ignored"),
            }
        }
        best
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::error!(path = %path.display(), %error, "cannot list templates");
            }
            Vec::new()
        }
    };
    found.sort();
    found
}

/// Compares versions part by part, runs of digits by their value: 13.10 comes after 13.9.
fn by_number(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left, right);
    loop {
        match (left.is_empty(), right.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        let (a, rest_a) = part(left);
        let (b, rest_b) = part(right);
        let digits = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
        let order = if digits(a) && digits(b) {
            let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            a.cmp(b)
        };
        if order.is_ne() {
            return order;
        }
        (left, right) = (rest_a, rest_b);
    }
}

/// Splits off the first run of digits or of anything else.
fn part(text: &str) -> (&str, &str) {
    let first_is_digit = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text
        .find(|c: char| c.is_ascii_digit() != first_is_digit)
        .unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        for (older, newer) in [
            ("13.9", "13.10"),
            ("13", "13.1"),
            ("1-a", "1-b"),
            ("9", "10"),
            ("2026.08", "2026.9"),
        ] {
            assert_eq!(by_number(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(by_number(newer, older), Ordering::Greater);
        }
        assert_eq!(by_number("13.01", "13.1"), Ordering::Equal);
    }
}
