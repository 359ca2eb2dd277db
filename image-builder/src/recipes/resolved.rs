//! Which versions of the guest's packages Debian has today. It is asked at most once a day, because
//! the answer takes a fetch of the archive's lists; without a network the last answer holds.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Kitchen, RecipeError};
use crate::cache::Inputs;
use crate::files;
use crate::progress::Progress;
use crate::tool::Tool;

const ARTIFACT: &str = "guest-root-versions";

/// How long an answer holds.
const HOLDS: Duration = Duration::from_secs(24 * 60 * 60);

/// Packages with their versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    /// The day on which they were first seen together, as YYYYMMDD.
    pub(crate) since: String,
    /// Lines of a name and a version, sorted.
    pub(crate) packages: String,
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

/// What mmdebstrap would install of `suite` with `packages`.
pub(crate) fn resolve(
    kitchen: &Kitchen,
    suite: &str,
    packages: &[&str],
) -> Result<Resolved, RecipeError> {
    let mut question = Inputs::new("guest-root-versions 1");
    question
        .add("suite", suite)
        .add("packages", packages.join(","));
    let name = format!("{ARTIFACT}-{}", question.key());
    let file = kitchen.cache.aside(&name);
    let known = files::read_text(&file)
        .ok()
        .and_then(|text| Resolved::from_text(&text));
    if let Some(known) = &known
        && is_fresh(&file)
    {
        return Ok(known.clone());
    }
    let fetched = match (fetch(kitchen, suite, packages), known) {
        (Ok(fetched), Some(known)) if fetched == known.packages => known,
        (Ok(packages), _) => Resolved {
            since: today()?,
            packages,
        },
        (Err(error), Some(known)) => {
            eprintln!("{ARTIFACT}: the last answer holds, Debian could not be asked: {error}");
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

fn fetch(kitchen: &Kitchen, suite: &str, packages: &[&str]) -> Result<String, RecipeError> {
    let log = kitchen.log(ARTIFACT);
    // Only this run's words are to be read.
    let _ = std::fs::remove_file(&log);
    let mut progress = Progress::start(ARTIFACT);
    progress.phase("asking Debian for the versions of the guest's packages");
    Tool::new("mmdebstrap")
        .args(["--simulate", "--verbose", "--variant=minbase"])
        .arg("--format=null")
        .arg(format!("--include={}", packages.join(",")))
        .args([suite, "/dev/null"])
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
