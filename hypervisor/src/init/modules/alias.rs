//! Which modules a device asks for: its modalias against the patterns of `modules.alias`. There are
//! tens of thousands of patterns, so they are grouped by what stands before the first colon.

use std::collections::HashMap;

/// Patterns with the modules they stand for.
#[derive(Debug, Default)]
pub(crate) struct Aliases {
    by_bus: HashMap<String, Vec<(String, String)>>,
    /// Patterns whose bus is itself a pattern.
    any_bus: Vec<(String, String)>,
}

impl Aliases {
    /// Reads the lines `alias PATTERN MODULE`; others are skipped.
    pub(crate) fn parse(text: &str) -> Self {
        let mut aliases = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("alias"), Some(pattern), Some(module)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let pattern = normal(pattern);
            let bus = pattern.split(':').next().unwrap_or_default().to_owned();
            let entry = (pattern, super::name(module));
            if bus.contains(['*', '?', '[']) {
                aliases.any_bus.push(entry);
            } else {
                aliases.by_bus.entry(bus).or_default().push(entry);
            }
        }
        aliases
    }

    /// The modules for a device.
    pub(crate) fn modules<'a>(&'a self, modalias: &str) -> impl Iterator<Item = &'a str> {
        let modalias = normal(modalias);
        let bus = modalias.split(':').next().unwrap_or_default();
        let here = self.by_bus.get(bus).into_iter().flatten();
        here.chain(&self.any_bus)
            .filter(move |(pattern, _)| matches(pattern.as_bytes(), modalias.as_bytes()))
            .map(|(_, module)| module.as_str())
    }
}

/// Hyphens and underscores mean the same, except inside brackets.
fn normal(text: &str) -> String {
    let mut inside = false;
    let normal = text.chars().map(|character| match character {
        '-' if !inside => '_',
        other => {
            inside = match other {
                '[' => true,
                ']' => false,
                _ => inside,
            };
            other
        }
    });
    normal.collect()
}

/// Shell patterns: `*`, `?`, `[a-z]`, `[!a]`. Takes time in proportion to both lengths multiplied,
/// however many stars there are.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    // Where to go on when what follows the last star does not match: one byte later.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        if let [b'*', rest @ ..] = pattern {
            retry = Some((rest, text));
            pattern = rest;
            continue;
        }
        if let (Some(rest), [_, later @ ..]) = (one(pattern, text), text) {
            (pattern, text) = (rest, later);
            continue;
        }
        if pattern.is_empty() && text.is_empty() {
            return true;
        }
        match retry {
            Some((after_star, [_, later @ ..])) => {
                retry = Some((after_star, later));
                (pattern, text) = (after_star, later);
            }
            _ => return false,
        }
    }
}

/// Matches one character of the pattern with the text's first byte and gives the pattern's rest.
fn one<'a>(pattern: &'a [u8], text: &[u8]) -> Option<&'a [u8]> {
    let byte = *text.first()?;
    match pattern {
        [b'?', rest @ ..] => Some(rest),
        [b'[', rest @ ..] => {
            let end = rest.iter().skip(1).position(|byte| *byte == b']')? + 1;
            let (set, rest) = (rest.get(..end)?, rest.get(end + 1..)?);
            let (negated, set) = match set {
                [b'!' | b'^', set @ ..] => (true, set),
                set => (false, set),
            };
            (is_in(set, byte) != negated).then_some(rest)
        }
        [literal, rest @ ..] => (*literal == byte).then_some(rest),
        [] => None,
    }
}

fn is_in(mut set: &[u8], byte: u8) -> bool {
    loop {
        set = match set {
            [low, b'-', high, rest @ ..] => {
                if (*low..=*high).contains(&byte) {
                    return true;
                }
                rest
            }
            [single, rest @ ..] => {
                if *single == byte {
                    return true;
                }
                rest
            }
            [] => return false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_finds_its_modules() {
        let aliases = Aliases::parse(
            "# Aliases extracted from modules themselves.\n\
             alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\n\
             alias virtio:d00000002v* virtio-blk\n\
             alias virtio:d00000001v* virtio-net\n\
             alias cpu:type:x86,ven*fam*mod*:feature:*0022* kvm-amd\n\
             alias acpi*:PNP0C0C:* button\n\
             alias fs-xfs xfs\n",
        );
        let found = |modalias: &str| -> Vec<&str> { aliases.modules(modalias).collect() };
        assert_eq!(
            found("pci:v00001AF4d00001001sv00001AF4sd00000002bc01sc00i00"),
            ["virtio_pci"]
        );
        assert_eq!(found("virtio:d00000002v00001AF4"), ["virtio_blk"]);
        assert_eq!(
            found("cpu:type:x86,ven0002fam0019mod0001:feature:,0021,0022,0023,"),
            ["kvm_amd"]
        );
        assert_eq!(found("acpi:PNP0C0C:"), ["button"]);
        assert_eq!(found("fs_xfs"), ["xfs"]);
        assert!(found("pci:v00008086d00001001").is_empty());
        assert!(found("").is_empty());
    }

    #[test]
    fn patterns_match_as_the_shell_does() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("*", "", true),
            ("*", "anything", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbd", false),
            ("a*b*c", "axxbyyc", true),
            ("?", "", false),
            ("a?c", "abc", true),
            ("usb:v[0-9]*p*", "usb:v5abcp1", true),
            ("[!a]x", "bx", true),
            ("[!a]x", "ax", false),
            ("[]]", "]", true),
            ("[a", "a", false),
            ("abc", "abcd", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn many_stars_take_no_forever() {
        let pattern = "*a".repeat(200) + "b";
        assert!(!matches(pattern.as_bytes(), "a".repeat(5000).as_bytes()));
    }
}
