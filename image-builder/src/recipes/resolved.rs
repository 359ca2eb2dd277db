//! Which versions Debian has today of the packages a recipe takes. It is asked at most once a day,
//! because the answer takes a fetch of the archive's lists; without a network the last answer holds.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::files;
use crate::progress::Progress;
use crate::tool::Tool;

/// How long an answer holds.
const HOLDS: Duration = Duration::from_secs(24 * 60 * 60);

/// What a recipe lets mmdebstrap take from Debian.
pub(super) struct Selection {
    /// The answer's name in the cache.
    pub(super) artifact: &'static str,
    /// What the packages are for, as one says it.
    pub(super) about: &'static str,
    /// Debian's name of the release.
    pub(super) suite: &'static str,
    /// Beside what they depend on.
    pub(super) packages: &'static [&'static str],
    /// More options of mmdebstrap that decide what is taken.
    pub(super) options: &'static [&'static str],
    /// Lines of apt's sources when not only the suite's own.
    pub(super) sources: &'static [&'static str],
}

impl Selection {
    /// mmdebstrap with all that decides what is taken; suite, target and sources come last.
    pub(super) fn mmdebstrap(&self) -> Tool {
        Tool::new("mmdebstrap")
            .args(self.options)
            .arg(format!("--include={}", self.packages.join(",")))
    }
}

/// Packages with their versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The day on which they were first seen together, as YYYYMMDD.
    pub(super) since: String,
    /// Lines of a name and a version, sorted.
    pub(super) packages: String,
}

impl Resolved {
    fn to_text(&self) -> String {
        format!("{}\n{}\n", self.since, self.packages)
    }

    fn from_text(text: &str) -> Option<Self> {
        let (since, packages) = text.split_once('\n')?;
        let is_day = since.len() == 8 && since.bytes().all(|byte| byte.is_ascii_digit());
        let packages = packages.trim_end();
        (is_day && !packages.is_empty()).then(|| Self {
            since: since.to_owned(),
            packages: packages.to_owned(),
        })
    }
}

/// What mmdebstrap would install of the selection.
pub(super) fn resolve(kitchen: &Kitchen, selection: &Selection) -> Result<Resolved, RecipeError> {
    let mut question = Inputs::new("versions 1");
    question
        .add("suite", selection.suite)
        .add("packages", selection.packages.join(","))
        .add("options", selection.options.join("\n"))
        .add("sources", selection.sources.join("\n"));
    let name = format!("{}-{}", selection.artifact, question.key());
    let file = kitchen.cache.aside(&name);
    let known = files::read_text(&file)
        .ok()
        .and_then(|text| Resolved::from_text(&text));
    if let Some(known) = &known
        && is_fresh(&file)
    {
        return Ok(known.clone());
    }
    let fetched = match (fetch(kitchen, selection), known) {
        (Ok(fetched), Some(known)) if fetched == known.packages => known,
        (Ok(packages), _) => Resolved {
            since: today()?,
            packages,
        },
        (Err(error), Some(known)) => {
            let artifact = selection.artifact;
            eprintln!("{artifact}: the last answer holds, Debian could not be asked: {error}");
            return Ok(known);
        }
        (Err(error), None) => return Err(error),
    };
    files::replace(&file, fetched.to_text().as_bytes())?;
    Ok(fetched)
}

fn is_fresh(file: &Path) -> bool {
    std::fs::metadata(file)
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|modified| {
            // A time that lies ahead is no reason to ask again and again.
            SystemTime::now()
                .duration_since(modified)
                .is_ok_and(|age| age < HOLDS)
        })
}

fn fetch(kitchen: &Kitchen, selection: &Selection) -> Result<String, RecipeError> {
    let log = kitchen.log(selection.artifact);
    // Only this run's words are to be read.
    let _ = std::fs::remove_file(&log);
    let mut progress = Progress::start(selection.artifact);
    progress.phase(&format!(
        "asking Debian for versions for {}",
        selection.about
    ));
    selection
        .mmdebstrap()
        .args(["--simulate", "--verbose", "--format=null"])
        .args([selection.suite, "/dev/null"])
        .args(selection.sources)
        .run(&log, &mut progress)?;
    let installed = installed(&files::read_text(&log)?);
    if installed.is_empty() {
        return Err(RecipeError::NotInPackage {
            package: log.display().to_string(),
            what: "line of a package to install (`Inst …`)".to_owned(),
        });
    }
    progress.done("versions known");
    Ok(installed)
}

/// The packages that apt says it would install, of lines like `Inst curl (8.14.1-2 Debian:13.1 …)`.
fn installed(words: &str) -> String {
    let mut lines: Vec<String> = words
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
            let version = rest.split_ascii_whitespace().next()?;
            Some(format!("{name} {version}"))
        })
        .collect();
    lines.sort_unstable();
    lines.dedup();
    lines.join("\n")
}

fn today() -> Result<String, RecipeError> {
    let day = Tool::new("date").args(["-u", "+%Y%m%d"]).read()?;
    Ok(day.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_would_install_is_read_without_order_and_origin() {
        let words = "I: running\nInst libc6 (2.41-12 Debian:13.1/stable [amd64]) []\n\
                     Conf libc6 (2.41-12 Debian:13.1/stable [amd64])\n\
                     Inst bash (5.2-3 Debian-Security:13/stable-security [amd64])\n\
                     Inst libc6 (2.41-12 Debian:13.1/stable [amd64])\n";
        assert_eq!(installed(words), "bash 5.2-3\nlibc6 2.41-12");
        assert_eq!(installed("E: no network\n"), "");
    }

    #[test]
    fn an_answer_is_kept_as_text_and_a_damaged_one_is_none() {
        let answer = Resolved {
            since: "20261122".to_owned(),
            packages: "bash 5.2-3\nlibc6 2.41-12".to_owned(),
        };
        assert_eq!(Resolved::from_text(&answer.to_text()), Some(answer));
        for damaged in ["", "20261122", "20261122\n", "2026112x\nbash 5\n"] {
            assert_eq!(Resolved::from_text(damaged), None, "{damaged:?}");
        }
    }
}
