//! Users as the guest's own /etc/passwd and /etc/group name them. Reads text that belongs to
//! somebody else, and nothing more.

use std::path::Path;

use super::spawn::Identity;
use crate::system::files;

/// Longest list of users or groups that is read.
const MAX_LIST: usize = 1 << 20;
/// Most groups of one user; the kernel takes no more.
const MAX_GROUPS: usize = 65_536;

/// Somebody to run a process as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: Vec<u8>,
    pub(crate) home: Vec<u8>,
    pub(crate) shell: Vec<u8>,
    pub(crate) identity: Identity,
}

/// The user of this name or number; of an empty name root. None when there is no such user.
pub(crate) fn find(wanted: &[u8]) -> Option<User> {
    let passwd = files::read(Path::new("/etc/passwd"), MAX_LIST).unwrap_or_default();
    let user = find_in(&passwd, wanted)?;
    if user.identity.uid == 0 {
        return Some(user);
    }
    let group = files::read(Path::new("/etc/group"), MAX_LIST).unwrap_or_default();
    Some(with_groups(user, &group))
}

fn find_in(passwd: &[u8], wanted: &[u8]) -> Option<User> {
    let wanted = if wanted.is_empty() { b"0" } else { wanted };
    let entries = || passwd.split(|byte| *byte == b'\n').filter_map(entry);
    let number = number(wanted);
    entries()
        .find(|user| user.name == wanted)
        .or_else(|| entries().find(|user| Some(user.identity.uid) == number))
        .or_else(|| number.map(nameless))
}

/// A number needs no entry.
fn nameless(uid: u32) -> User {
    let (name, home) = if uid == 0 {
        (b"root".to_vec(), b"/root".to_vec())
    } else {
        (uid.to_string().into_bytes(), b"/".to_vec())
    };
    User {
        name,
        home,
        shell: b"/bin/sh".to_vec(),
        identity: Identity {
            uid,
            gid: uid,
            groups: vec![uid],
        },
    }
}

fn entry(line: &[u8]) -> Option<User> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
    let &[name, _, uid, gid, _, home, shell] = fields.as_slice() else {
        return None;
    };
    let is_usable = !name.is_empty() && !line.contains(&0) && home.starts_with(b"/");
    let (uid, gid) = (number(uid)?, number(gid)?);
    is_usable.then(|| User {
        name: name.to_vec(),
        home: home.to_vec(),
        shell: if shell.is_empty() {
            b"/bin/sh".to_vec()
        } else {
            shell.to_vec()
        },
        identity: Identity {
            uid,
            gid,
            groups: vec![gid],
        },
    })
}

/// A number that a user may have: the highest one means "nobody in particular" to system calls.
fn number(text: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(text).ok()?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .parse()
        .ok()
        .filter(|number| plain && *number != u32::MAX)
}

fn with_groups(mut user: User, group: &[u8]) -> User {
    for line in group.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b':');
        let Some(gid) = fields.nth(2).and_then(number) else {
            continue;
        };
        let is_member = fields
            .next()
            .is_some_and(|members| members.split(|byte| *byte == b',').any(|m| m == user.name));
        let groups = &mut user.identity.groups;
        if is_member && !groups.contains(&gid) && groups.len() < MAX_GROUPS {
            groups.push(gid);
        }
    }
    user
}

/// Looks somebody up in lists of anything; who is found can be told to the kernel.
#[cfg(fuzzing)]
pub(crate) fn fuzz(passwd: &[u8], group: &[u8], wanted: &[u8]) {
    if let Some(user) = find_in(passwd, wanted) {
        let user = with_groups(user, group);
        assert!(user.identity.groups.len() <= MAX_GROUPS);
        assert!(user.home.starts_with(b"/") && !user.home.contains(&0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"daemon:x:1:1::/usr/sbin:/bin/false\n\
        admin:x:0:0:A:/home/admin:/bin/bash\nana:x:1000:1001::/home/ana:\n\
        broken:x:y:1::/:/bin/sh\nshort:x:5\n";

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let ana = find_in(PASSWD, b"ana").unwrap();
        assert_eq!(ana, find_in(PASSWD, b"1000").unwrap());
        assert_eq!(
            (&*ana.home, &*ana.shell),
            (&b"/home/ana"[..], &b"/bin/sh"[..])
        );
        assert_eq!((ana.identity.uid, ana.identity.gid), (1000, 1001));
        for missing in [
            &b"bob"[..],
            b"broken",
            b"short",
            b"-1",
            b"4294967295",
            b"+5",
        ] {
            assert_eq!(find_in(PASSWD, missing), None, "{missing:?}");
        }
    }

    #[test]
    fn without_a_name_it_is_user_zero_by_whatever_name() {
        let admin = find_in(PASSWD, b"").unwrap();
        assert_eq!(
            (&*admin.name, &*admin.home),
            (&b"admin"[..], &b"/home/admin"[..])
        );
        let root = find_in(b"garbage", b"").unwrap();
        assert_eq!((&*root.name, &*root.home), (&b"root"[..], &b"/root"[..]));
    }

    #[test]
    fn a_number_without_an_entry_is_a_user_too() {
        let user = find_in(PASSWD, b"4242").unwrap();
        assert_eq!((user.identity.uid, user.identity.gid), (4242, 4242));
    }

    #[test]
    fn groups_are_the_own_one_and_those_that_list_the_user() {
        let group = b"wheel:x:10:bob,ana\nana:x:1001:\nother:x:11:anabel\nbad:x:no:ana\n";
        let user = with_groups(find_in(PASSWD, b"ana").unwrap(), group);
        assert_eq!(user.identity.groups, [1001, 10]);
    }
}
