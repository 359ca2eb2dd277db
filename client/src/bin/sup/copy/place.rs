//! One end of a copy as a user writes it: `PATH`, `VM:PATH` or `-`.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use client::protocol::vm::VmRef;

/// One end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Local(PathBuf),
    Vm {
        vm: VmRef,
        path: Vec<u8>,
    },
    /// Standard input as a source, standard output as a destination.
    Standard,
}

/// For clap.
pub(super) fn parser() -> impl TypedValueParser<Value = Place> {
    OsStringValueParser::new().try_map(Place::parse)
}

impl Place {
    /// As scp has it: a colon before the first slash parts a VM from a path.
    fn parse(text: OsString) -> Result<Self, String> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Standard);
        }
        if bytes.is_empty() {
            return Err("an empty path is nowhere; `.` is the current directory".into());
        }
        let Some(colon) = bytes
            .iter()
            .position(|byte| matches!(byte, b':' | b'/'))
            .filter(|at| bytes.get(*at) == Some(&b':'))
        else {
            return Ok(Self::Local(text.into()));
        };
        let (vm, path) = bytes.split_at(colon);
        let vm = std::str::from_utf8(vm)
            .ok()
            .and_then(|vm| vm.parse().ok())
            .ok_or("what is before the colon is no VM; write ./ before a file here")?;
        let path = path.get(1..).unwrap_or_default().to_vec();
        Ok(Self::Vm { vm, path })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(formatter, "{}", path.display()),
            Self::Vm { vm, path } => {
                write!(formatter, "{vm}:{}", String::from_utf8_lossy(path))
            }
            Self::Standard => formatter.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_makes_it_a_vms() {
        let parse = |text: &str| Place::parse(text.into());
        let vm = |vm: &str, path: &str| {
            Ok(Place::Vm {
                vm: vm.parse().unwrap(),
                path: path.into(),
            })
        };
        assert_eq!(parse("web:"), vm("web", ""));
        assert_eq!(parse("web:/etc/a:b"), vm("web", "/etc/a:b"));
        for local in ["a", "./a:b", "/a:b", "a/b:c", "."] {
            assert_eq!(parse(local), Ok(Place::Local(local.into())));
        }
        assert_eq!(parse("-"), Ok(Place::Standard));
        assert!(parse("").is_err());
        assert!(parse(":a").is_err());
        assert!(parse("a b:c").is_err());
    }
}
