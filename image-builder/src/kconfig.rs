//! Compares a kernel's final configuration with what was asked for. `make` drops an option whose
//! dependencies are missing without a word, so every line of a fragment is checked afterwards; this
//! module must never accept a line it does not understand.

use std::collections::HashMap;

/// A fragment or its outcome that is not as asked.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KconfigError {
    /// A line that is neither an option, nor a switched-off option, nor a comment.
    #[error("line {line} of the kernel config fragment is not understood: {text:?}")]
    Line {
        /// Counted from one.
        line: usize,
        /// What stands there.
        text: String,
    },
    /// The same option twice.
    #[error("line {line} of the kernel config fragment names {option} again")]
    Twice {
        /// Counted from one.
        line: usize,
        /// The option's name.
        option: String,
    },
    /// Options that did not stick.
    #[error(
        "{} kernel option(s) did not stick (a dependency is missing, or another option selects it):\n  {}",
        .0.len(), .0.join("\n  ")
    )]
    Lost(Vec<String>),
}

/// One promise of the fragment: the option and its value, `None` for "is not set".
#[derive(Debug, PartialEq, Eq)]
struct Asked<'a> {
    option: &'a str,
    value: Option<&'a str>,
}

fn parse_line(text: &str) -> Option<Asked<'_>> {
    if let Some(option) = text
        .strip_prefix("# ")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        return is_option(option).then_some(Asked {
            option,
            value: None,
        });
    }
    let (option, value) = text.split_once('=')?;
    (is_option(option) && !value.is_empty()).then_some(Asked {
        option,
        value: Some(value),
    })
}

fn is_option(name: &str) -> bool {
    name.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty()
            && rest
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

/// The values of a final `.config`; what is absent is off.
fn values(config: &str) -> HashMap<&str, &str> {
    config
        .lines()
        .filter_map(parse_line)
        .filter_map(|line| Some((line.option, line.value?)))
        .collect()
}

/// Fails with the list of all lines of `fragment` that `config` does not keep.
pub(crate) fn check(fragment: &str, config: &str) -> Result<(), KconfigError> {
    let values = values(config);
    let mut seen = HashMap::new();
    let mut lost = Vec::new();
    for (index, text) in fragment.lines().enumerate() {
        let line = index + 1;
        let Some(asked) = parse_line(text) else {
            // A comment that begins with an option is a misspelt promise, not a comment.
            let comment = text.strip_prefix('#').map(str::trim_start);
            if text.trim().is_empty()
                || comment.is_some_and(|comment| !comment.starts_with("CONFIG_"))
            {
                continue;
            }
            return Err(KconfigError::Line {
                line,
                text: text.to_owned(),
            });
        };
        if seen.insert(asked.option, line).is_some() {
            return Err(KconfigError::Twice {
                line,
                option: asked.option.to_owned(),
            });
        }
        let got = values.get(asked.option).copied().filter(|got| *got != "n");
        if got != asked.value.filter(|value| *value != "n") {
            lost.push(format!(
                "{}: asked for {}, got {}",
                asked.option,
                asked.value.unwrap_or("off"),
                got.unwrap_or("off"),
            ));
        }
    }
    if lost.is_empty() {
        Ok(())
    } else {
        Err(KconfigError::Lost(lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINAL: &str = "#\n# Automatically generated file\n#\nCONFIG_A=y\nCONFIG_N=64\n\
                         CONFIG_S=\"-supvm\"\n# CONFIG_OFF is not set\nCONFIG_FORCED=y\n";

    #[test]
    fn a_config_that_keeps_every_line_passes() {
        let fragment = "# --- a heading, without CONFIG_B\n\nCONFIG_A=y\nCONFIG_N=64\nCONFIG_S=\"-supvm\"\n\
                        # CONFIG_OFF is not set\n# CONFIG_NEVER_HEARD_OF is not set\n";
        assert_eq!(check(fragment, FINAL), Ok(()));
    }

    #[test]
    fn every_option_that_did_not_stick_is_listed() {
        let fragment = "CONFIG_OFF=y\nCONFIG_A=y\nCONFIG_ABSENT=y\nCONFIG_N=8\n\
                        # CONFIG_FORCED is not set\n";
        assert_eq!(
            check(fragment, FINAL),
            Err(KconfigError::Lost(vec![
                "CONFIG_OFF: asked for y, got off".into(),
                "CONFIG_ABSENT: asked for y, got off".into(),
                "CONFIG_N: asked for 8, got 64".into(),
                "CONFIG_FORCED: asked for off, got y".into(),
            ]))
        );
    }

    #[test]
    fn a_line_that_is_not_understood_is_refused() {
        for text in [
            "CONFIG_A y",
            "A=y",
            "CONFIG_A=",
            "#CONFIG_A is not set",
            "# CONFIG_A is off",
        ] {
            assert_eq!(
                check(text, FINAL),
                Err(KconfigError::Line {
                    line: 1,
                    text: text.into()
                })
            );
        }
        assert!(matches!(
            check("CONFIG_A=y\nCONFIG_A=y", FINAL),
            Err(KconfigError::Twice { line: 2, .. })
        ));
    }

    #[test]
    fn our_fragment_is_well_formed() {
        // Against an empty outcome every "=y" is lost; what matters is that each line was read.
        let fragment = include_str!("../guest-kernel.config");
        assert!(matches!(check(fragment, ""), Err(KconfigError::Lost(lost)) if lost.len() > 200));
    }
}
