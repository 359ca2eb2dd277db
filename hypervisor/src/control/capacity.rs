//! The host's memory, handed out to VMs while they run. A reservation gives its share back when it
//! is dropped; a monitor that was adopted after a restart keeps its share even if the limit is now
//! lower.

use std::sync::{Arc, Mutex, PoisonError};

/// There is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this VM needs {wanted} MiB of memory, {free} of {total} MiB are free; stop other VMs or ask for less"
)]
pub(crate) struct NoCapacity {
    pub(crate) wanted: u64,
    pub(crate) free: u64,
    pub(crate) total: u64,
}

/// Memory that can be handed out, in MiB.
#[derive(Clone, Debug)]
pub(crate) struct Capacity {
    total: u64,
    used: Arc<Mutex<u64>>,
}

/// A share of it.
#[derive(Debug)]
pub(crate) struct Reservation {
    mib: u64,
    used: Arc<Mutex<u64>>,
}

impl Capacity {
    pub(crate) fn new(total: u64) -> Self {
        Self {
            total,
            used: Arc::default(),
        }
    }

    pub(crate) fn reserve(&self, mib: u32) -> Result<Reservation, NoCapacity> {
        let wanted = u64::from(mib);
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.total.saturating_sub(*used);
        if wanted > free {
            return Err(NoCapacity {
                wanted,
                free,
                total: self.total,
            });
        }
        *used = used.saturating_add(wanted);
        Ok(self.share(wanted))
    }

    /// A share for a VM that runs already.
    pub(crate) fn adopt(&self, mib: u32) -> Reservation {
        let mib = u64::from(mib);
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used = used.saturating_add(mib);
        self.share(mib)
    }

    fn share(&self, mib: u64) -> Reservation {
        Reservation {
            mib,
            used: self.used.clone(),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used = used.saturating_sub(self.mib);
    }
}

/// What this host can hand out: its memory less a tenth, at least 256 MiB, for itself.
pub(crate) fn host_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    match kib {
        Some(kib) => {
            let mib = kib >> 10;
            mib.saturating_sub((mib / 10).max(256))
        }
        None => {
            tracing::warn!("cannot read /proc/meminfo; VMs may use 1024 MiB together");
            1024
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_handed_out_up_to_the_limit_and_comes_back() {
        let capacity = Capacity::new(100);
        let first = capacity.reserve(60).unwrap();
        assert_eq!(
            capacity.reserve(50).unwrap_err(),
            NoCapacity {
                wanted: 50,
                free: 40,
                total: 100
            }
        );
        let adopted = capacity.adopt(80);
        assert_eq!(capacity.reserve(1).unwrap_err().free, 0);
        drop(first);
        drop(adopted);
        drop(capacity.reserve(100).unwrap());
        assert!(host_memory_mib() > 0);
    }
}
