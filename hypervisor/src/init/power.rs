//! The power button, wherever the machine has one.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The key's number in linux/input-event-codes.h.
const KEY_POWER: usize = 116;
/// Type of the events that are keys.
const EV_KEY: u16 = 1;
/// Most devices that are listened to.
const MOST: usize = 32;

nix::ioctl_read_buf!(
    /// Which keys a device has.
    key_bits,
    b'E',
    0x20 + EV_KEY as u8,
    u8
);

/// The devices that have the button.
#[derive(Debug, Default)]
pub(super) struct Buttons {
    devices: Vec<(PathBuf, File)>,
}

impl Buttons {
    /// Listens to the devices that have appeared.
    pub(super) fn look(&mut self) {
        let Ok(entries) = fs::read_dir("/dev/input") else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let known = self.devices.iter().any(|(other, _)| *other == path);
            let is_event = entry.file_name().to_string_lossy().starts_with("event");
            if is_event && !known && self.devices.len() < MOST {
                self.devices
                    .extend(with_button(&path).map(|file| (path, file)));
            }
        }
    }

    /// The devices, each with a number for [`Buttons::pressed`].
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let devices = self.devices.iter().enumerate();
        devices.map(|(number, (_, file))| (number, file.as_fd()))
    }

    /// Whether the button of this device was pressed.
    pub(super) fn pressed(&mut self, number: usize) -> bool {
        let Some((_, file)) = self.devices.get_mut(number) else {
            return false;
        };
        let mut events = [0; 24 * 64];
        match file.read(&mut events) {
            Ok(length) => is_press(events.get(..length).unwrap_or_default()),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                false
            }
            Err(_) => {
                // Unplugged.
                self.devices.swap_remove(number);
                false
            }
        }
    }
}

fn with_button(path: &Path) -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .ok()?;
    let mut keys = [0; 96];
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    unsafe { key_bits(file.as_raw_fd(), &mut keys) }.ok()?;
    let byte = keys.get(KEY_POWER / 8)?;
    (byte & (1 << (KEY_POWER % 8)) != 0).then_some(file)
}

/// Whether one of the events, 24 bytes each, is the button going down.
fn is_press(events: &[u8]) -> bool {
    events.as_chunks::<24>().0.iter().any(|event| {
        let [.., a, b, c, d, e, f, g, h] = *event;
        let kind = u16::from_ne_bytes([a, b]);
        let code = u16::from_ne_bytes([c, d]);
        let value = i32::from_ne_bytes([e, f, g, h]);
        kind == EV_KEY && usize::from(code) == KEY_POWER && value == 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_the_button_going_down_counts() {
        assert!(is_press(&[event(4, 4, 116), event(1, 116, 1)].concat()));
        assert!(!is_press(&event(1, 116, 0)));
        assert!(!is_press(&event(1, 30, 1)));
        assert!(!is_press(&event(1, 116, 1)[..23]));
    }
}
