//! pax records: `length key=value` lines that say what does not fit in a header. Reads and writes
//! the few that matter here, and ignores the others.

use super::{Entry, header};

/// What the records say; none where they say nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    /// Real size of a file with holes (GNU's format 1.0).
    pub(super) real_size: Option<u64>,
    pub(super) sparse: Sparse,
}

/// Whether the entry has holes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sparse {
    #[default]
    No,
    /// GNU's format 1.0, which is read here.
    Map,
    /// Another format.
    Unknown,
}

/// Why records cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the records before an entry are damaged")]
pub(super) struct PaxError;

impl Records {
    /// Adds what `bytes` say.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), PaxError> {
        while !bytes.is_empty() {
            let blank = bytes
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or(PaxError)?;
            let length = bytes.get(..blank).and_then(decimal).ok_or(PaxError)?;
            let length = usize::try_from(length).map_err(|_| PaxError)?;
            let start = blank.checked_add(1).ok_or(PaxError)?;
            let end = length.checked_sub(1).ok_or(PaxError)?;
            let record = bytes.get(start..end).ok_or(PaxError)?;
            if bytes.get(end) != Some(&b'\n') {
                return Err(PaxError);
            }
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or(PaxError)?;
            let (key, value) = record.split_at(equals);
            self.set(key, value.get(1..).unwrap_or_default())?;
            bytes = bytes.get(length..).ok_or(PaxError)?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        let text = (!value.is_empty()).then(|| value.to_vec());
        // An empty value takes back what was said.
        let number = || match value {
            [] => Ok(None),
            digits => decimal(digits).map(Some).ok_or(PaxError),
        };
        match key {
            b"path" => self.path = text,
            b"linkpath" => self.link = text,
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => {
                self.mtime = match value {
                    [] => None,
                    value => Some(time(value).ok_or(PaxError)?),
                }
            }
            b"GNU.sparse.name" => self.path = text,
            b"GNU.sparse.realsize" => self.real_size = number()?,
            b"GNU.sparse.major" => {
                self.sparse = if value == b"1" {
                    Sparse::Map
                } else {
                    Sparse::Unknown
                }
            }
            b"GNU.sparse.map" | b"GNU.sparse.size" | b"GNU.sparse.offset" => {
                self.sparse = Sparse::Unknown;
            }
            _ => {}
        }
        Ok(())
    }

    /// Says in the entry what the records say of it.
    pub(super) fn apply(self, entry: &mut Entry) {
        if let Some(path) = self.path {
            entry.name = path;
        }
        if let Some(link) = self.link {
            entry.link = link;
        }
        entry.size = self.size.unwrap_or(entry.size);
        entry.uid = self.uid.unwrap_or(entry.uid);
        entry.gid = self.gid.unwrap_or(entry.gid);
        (entry.mtime_s, entry.mtime_ns) = self.mtime.unwrap_or((entry.mtime_s, entry.mtime_ns));
    }
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// Seconds since 1970, with a fraction; negative ones count downwards.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.split_first() {
        Some((b'-', rest)) => (true, rest),
        _ => (false, text),
    };
    let point = text.iter().position(|byte| *byte == b'.');
    let seconds = decimal(text.get(..point.unwrap_or(text.len()))?)?;
    let seconds = i64::try_from(seconds).ok()?;
    let mut nanos: u32 = 0;
    let fraction = point.and_then(|point| text.get(point.checked_add(1)?..));
    for digit in 0..9 {
        let next = fraction.and_then(|fraction| fraction.get(digit));
        let value = match next {
            Some(byte) => byte.checked_sub(b'0').filter(|digit| *digit < 10)?,
            None => 0,
        };
        nanos = nanos.checked_mul(10)?.checked_add(u32::from(value))?;
    }
    match (negative, nanos) {
        (false, _) => Some((seconds, nanos)),
        (true, 0) => Some((seconds.checked_neg()?, 0)),
        (true, _) => Some((
            seconds.checked_neg()?.checked_sub(1)?,
            1_000_000_000_u32.checked_sub(nanos)?,
        )),
    }
}

/// One record. Its length counts its own digits, too.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len().saturating_add(value.len()).saturating_add(3);
    let mut length = rest;
    // The digits can make one more digit necessary, once.
    for _ in 0..3 {
        length = rest.saturating_add(length.to_string().len());
    }
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// The records for what does not fit in the entry's header.
pub(super) fn for_entry(entry: &Entry) -> Vec<u8> {
    let mut out = Vec::new();
    if entry.name.len() > header::MAX_NAME {
        record(&mut out, "path", &entry.name);
    }
    if entry.link.len() > header::MAX_NAME {
        record(&mut out, "linkpath", &entry.link);
    }
    if entry.size > header::MAX_LONG {
        record(&mut out, "size", entry.size.to_string().as_bytes());
    }
    for (key, id) in [("uid", entry.uid), ("gid", entry.gid)] {
        if id > header::MAX_SHORT {
            record(&mut out, key, id.to_string().as_bytes());
        }
    }
    let fits = u64::try_from(entry.mtime_s).is_ok_and(|time| time <= header::MAX_LONG);
    if !fits || entry.mtime_ns != 0 {
        record(&mut out, "mtime", time_text(entry).as_bytes());
    }
    out
}

fn time_text(entry: &Entry) -> String {
    let (seconds, nanos) = (entry.mtime_s, entry.mtime_ns);
    if seconds >= 0 || nanos == 0 {
        return format!("{seconds}.{nanos:09}");
    }
    // Half a second before 1970 is second -1 and half a second, and written -0.5.
    let whole = seconds.saturating_add(1).unsigned_abs();
    let fraction = 1_000_000_000_u32.saturating_sub(nanos);
    format!("-{whole}.{fraction:09}")
}

/// The records of a file with holes, in GNU's format 1.0.
pub(super) fn for_sparse(name: &[u8], real_size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    record(&mut out, "GNU.sparse.major", b"1");
    record(&mut out, "GNU.sparse.minor", b"0");
    record(&mut out, "GNU.sparse.name", name);
    record(
        &mut out,
        "GNU.sparse.realsize",
        real_size.to_string().as_bytes(),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_records_length_counts_itself() {
        for length in [0, 1, 85, 86, 87, 88, 89, 90, 91, 983, 984, 985, 986] {
            let value = vec![b'v'; length];
            let mut out = Vec::new();
            record(&mut out, "path", &value);
            let mut records = Records::default();
            records.read(&out).unwrap();
            assert_eq!(records.path.unwrap_or_default(), value);
        }
    }

    #[test]
    fn times_before_1970_and_fractions_survive() {
        for (mtime_s, mtime_ns) in [(0, 5), (-1, 500_000_000), (-5, 0), (1 << 40, 999_999_999)] {
            let mut entry = Entry {
                kind: super::super::Kind::File,
                name: Vec::new(),
                link: Vec::new(),
                mode: 0,
                uid: 0,
                gid: 0,
                size: 0,
                mtime_s,
                mtime_ns,
                major: 0,
                minor: 0,
            };
            let mut records = Records::default();
            records.read(&for_entry(&entry)).unwrap();
            (entry.mtime_s, entry.mtime_ns) = (0, 0);
            records.apply(&mut entry);
            assert_eq!((entry.mtime_s, entry.mtime_ns), (mtime_s, mtime_ns));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Records::default().read(&bytes);
        }
    }
}
