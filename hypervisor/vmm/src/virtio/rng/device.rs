//! Fills what the driver offers from getrandom, at most a few KiB per chain: a driver that offers
//! gigabytes gets a short answer, which the specification allows, and asks again.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

use super::RngState;
use crate::virtio::fault::Broken;
use crate::virtio::ring::{copy_out, part, total};
use crate::virtio::transport::DeviceState;
use crate::virtio::worker::{Device, Rings};

const QUEUE_SIZES: &[u16] = &[64];
const MOST_DESCRIPTORS: usize = 64;
/// Bytes per chain.
const MOST_BYTES: usize = 4096;
/// Chains per wake-up.
const BUDGET: u32 = 32;

pub(super) struct RngDevice {
    bytes: [u8; MOST_BYTES],
}

impl RngDevice {
    pub(super) const fn new() -> Self {
        Self {
            bytes: [0; MOST_BYTES],
        }
    }
}

impl Device for RngDevice {
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn kicked(&mut self, queue: usize, rings: &mut Rings) -> Result<(), Broken> {
        let Some(ring) = rings.get_mut(queue).and_then(Option::as_mut) else {
            return Ok(());
        };
        ring.silence()?;
        for _ in 0..BUDGET {
            let chain = match ring.pop(MOST_DESCRIPTORS)? {
                Some(chain) => chain,
                None if ring.listen()? => {
                    ring.silence()?;
                    continue;
                }
                None => return Ok(()),
            };
            let wanted = usize::try_from(total(&chain.writable)).unwrap_or(usize::MAX);
            let (bytes, _) = self.bytes.split_at_mut(wanted.min(MOST_BYTES));
            fill(bytes)?;
            let length = u32::try_from(bytes.len()).unwrap_or(0);
            let buffers = part(&chain.writable, 0, u64::from(length));
            let written = if copy_out(ring.memory(), &buffers, bytes) {
                length
            } else {
                0
            };
            bytes.fill(0);
            ring.complete(chain.head, written)?;
        }
        ring.kick_again();
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Rng(_))
    }
}

fn fill(bytes: &mut [u8]) -> Result<(), Broken> {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of `rest`, which is writable.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => rest = rest.get_mut(got..).unwrap_or_default(),
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(Broken::Host {
                        what: "get randomness",
                        reason: error.to_string(),
                    });
                }
            }
        }
    }
    Ok(())
}
