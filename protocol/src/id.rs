//! Names and identifiers. Each is checked once, where it is made from text or from bytes; whoever
//! holds one need not check again. All of them are safe as file names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}: {rule}")]
pub struct IdError {
    what: &'static str,
    rule: &'static str,
    text: String,
}

macro_rules! text_id {
    (
        $(#[$doc:meta])*
        $name:ident: $capacity:literal, $what:literal, $rule:literal, $check:expr
    ) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(heapless::String<$capacity>);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let check: fn(&str) -> bool = $check;
                match heapless::String::try_from(text) {
                    Ok(inner) if check(text) => Ok(Self(inner)),
                    _ => Err(IdError {
                        what: $what,
                        rule: $rule,
                        text: text.chars().take(64).collect(),
                    }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), formatter)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <heapless::String<$capacity> as Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id! {
    /// A VM's identifier: `vm-` and eight characters of `[0-9a-z]`.
    VmId: 11, "VM id", "it is `vm-` and eight characters of 0-9 and a-z", |text| {
        text.strip_prefix("vm-").is_some_and(|rest| rest.len() == 8 && rest.bytes().all(is_base36))
    }
}

text_id! {
    /// What a user calls a VM: 1 to 63 characters of `[0-9a-z-]`, no hyphen at either end.
    VmName: 63, "VM name", "it is 1 to 63 characters of 0-9, a-z and -, with no - at either end", is_label
}

text_id! {
    /// A template's name: 1 to 63 characters of `[0-9a-z-]`, no hyphen at either end.
    TemplateName: 63, "template name", "it is 1 to 63 characters of 0-9, a-z and -, with no - at either end", is_label
}

text_id! {
    /// A template's version: 1 to 32 characters of `[0-9A-Za-z._-]` that do not begin with a dot.
    TemplateVersion: 32, "template version", "it is 1 to 32 characters of 0-9, A-Z, a-z, ., _ and -, not beginning with .", |text| {
        !text.is_empty()
            && !text.starts_with('.')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    }
}

text_id! {
    /// The secret label of a VM's public address: 20 characters of lower-case base32 (100 bits).
    Subdomain: 20, "subdomain", "it is 20 characters of a-z and 2-7", |text| {
        text.len() == 20 && text.bytes().all(|b| b.is_ascii_lowercase() || matches!(b, b'2'..=b'7'))
    }
}

text_id! {
    /// Whom a token and its VMs belong to: 1 to 63 characters of `[0-9a-z-]`.
    Owner: 63, "owner", "it is 1 to 63 characters of 0-9, a-z and -, with no - at either end", is_label
}

fn is_base36(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_label(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && !text.ends_with('-')
        && text.bytes().all(|byte| is_base36(byte) || byte == b'-')
}

impl VmId {
    /// Makes an identifier of random bytes. Equal bytes give equal identifiers.
    pub fn from_random(random: [u8; 8]) -> Self {
        let mut text = heapless::String::new();
        // Eleven characters go into a capacity of eleven: the pushes cannot fail.
        let _ = text.push_str("vm-");
        for byte in random {
            const ALPHABET: [char; 32] = [
                '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
                'g', 'h', 'j', 'k', 'm', 'n', 'p', 'q', 'r', 's', 't', 'v', 'w', 'x', 'y', 'z',
            ];
            let _ = text.push(ALPHABET.get(usize::from(byte & 31)).copied().unwrap_or('0'));
        }
        Self(text)
    }

    /// The hostname inside the VM: `supvm-` and the first four characters of the random part.
    pub fn hostname(&self) -> String {
        format!("supvm-{}", self.as_str().get(3..7).unwrap_or_default())
    }
}

impl Subdomain {
    /// Makes a label of random bytes: five bits of each are used.
    pub fn from_random(random: [u8; 20]) -> Self {
        let mut text = heapless::String::new();
        for byte in random {
            let digit = byte & 31;
            let letter = if digit < 26 {
                digit.wrapping_add(b'a')
            } else {
                digit.wrapping_add(b'2' - 26)
            };
            // Twenty characters go into a capacity of twenty: the push cannot fail.
            let _ = text.push(char::from(letter));
        }
        Self(text)
    }
}

/// A process's identifier, sixteen random bytes that the client chose.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId(pub [u8; 16]);

impl fmt::Display for ProcessId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for ProcessId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Sixteen random bytes that make a repeated create answer with the first one's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IdempotencyKey(pub [u8; 16]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for text in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\0b",
            "-a",
            "a-",
            "A",
            "vm-1234abcd/..",
            "é",
        ] {
            assert!(text.parse::<VmId>().is_err(), "{text:?}");
            assert!(text.parse::<VmName>().is_err(), "{text:?}");
            assert!(text.parse::<TemplateName>().is_err(), "{text:?}");
        }
        for text in ["", ".", "..", ".1", "a/b", "1@2"] {
            assert!(text.parse::<TemplateVersion>().is_err(), "{text:?}");
        }
        assert!("vm-1234abcd".parse::<VmId>().is_ok());
        assert!("13.1".parse::<TemplateVersion>().is_ok());
    }

    #[test]
    fn an_identifier_off_the_wire_is_checked() {
        let body = postcard::to_allocvec("vm-../../x").unwrap();
        assert!(postcard::from_bytes::<VmId>(&body).is_err());
        let body = postcard::to_allocvec("vm-1234abcd").unwrap();
        assert_eq!(
            postcard::from_bytes::<VmId>(&body).unwrap().as_str(),
            "vm-1234abcd"
        );
    }

    #[test]
    fn random_identifiers_are_well_formed() {
        for byte in 0..=255 {
            let id = VmId::from_random([byte; 8]);
            assert_eq!(id.as_str().parse::<VmId>().unwrap(), id);
            assert_eq!(id.hostname().len(), "supvm-".len() + 4);
            let subdomain = Subdomain::from_random([byte; 20]);
            assert_eq!(subdomain.as_str().parse::<Subdomain>().unwrap(), subdomain);
        }
    }
}
