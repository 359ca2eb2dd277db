//! Users and groups by name or number, from the user's own /etc/passwd and /etc/group. The lists
//! are anybody's bytes: they are read with a limit and believed in nothing but this.

use std::path::Path;

use protocol::ErrorBody;

use super::error::invalid;
use crate::system::files;

/// Longest list that is read.
const MAX_LIST: usize = 1 << 20;

/// The number of a user; none for empty text.
pub(crate) fn user(text: &[u8]) -> Result<Option<u32>, ErrorBody> {
    number(text, "user", Path::new("/etc/passwd"))
}

/// The number of a group; none for empty text.
pub(crate) fn group(text: &[u8]) -> Result<Option<u32>, ErrorBody> {
    number(text, "group", Path::new("/etc/group"))
}

fn number(text: &[u8], what: &str, list: &Path) -> Result<Option<u32>, ErrorBody> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Some(number) = decimal(text) {
        return Ok(Some(number));
    }
    let known = files::read(list, MAX_LIST).unwrap_or_default();
    let shown: String = String::from_utf8_lossy(text).chars().take(64).collect();
    find(&known, text).map(Some).ok_or_else(|| {
        invalid(format!(
            "there is no {what} {shown:?} in {}",
            list.display()
        ))
    })
}

/// A number that can be somebody's: the highest one means nobody.
fn decimal(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number: u32 = digits.then(|| text.parse().ok()).flatten()?;
    (number != u32::MAX).then_some(number)
}

/// Both lists have the name first and the number third.
fn find(list: &[u8], name: &[u8]) -> Option<u32> {
    list.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        (fields.next()? == name).then_some(())?;
        decimal(fields.nth(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_number_taken_as_it_is() {
        let list = b"root:x:0:0::/root:/bin/sh\nodd\nweb:x:33:33::/:/bin/false\n";
        assert_eq!(find(list, b"web"), Some(33));
        assert_eq!(find(list, b"odd"), None);
        assert_eq!(user(b"4711").unwrap(), Some(4711));
        assert_eq!(user(b"").unwrap(), None);
        assert!(
            user(b"no-such-user")
                .unwrap_err()
                .message
                .contains("no-such-user")
        );
        assert!(user(b"4294967295").is_err(), "that number means nobody");
    }
}
