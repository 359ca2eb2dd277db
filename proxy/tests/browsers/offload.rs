//! Between a TAP device and the frame channel of a VM of ours, on which sums of TCP and UDP mean
//! nothing: the kernel is told so with each frame, as virtio-net tells its guest.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The header before each frame of the TAP device (`struct virtio_net_hdr`).
const HEADER: usize = 10;

/// "The sum still has to be made", which nobody does when the frame arrives here.
const NEEDS_CSUM: u8 = 1;

const CSUM: libc::c_ulong = 1;

pub(crate) fn relay(mut tap: File, mut channel: UnixStream, stop: UnixStream) {
    // SAFETY: the descriptor is a tun device's; the argument is a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, CSUM) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let (to, from) = (tap.try_clone().unwrap(), channel.try_clone().unwrap());
    let back = std::thread::spawn(move || to_tap(to, from));
    let mut buffer = vec![0; HEADER + 70_000];
    'frames: loop {
        let mut waits = [
            PollFd::new(tap.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut waits, PollTimeout::NONE).unwrap();
        if waits[1].any().unwrap() {
            break;
        }
        while let Ok(length) = tap.read(&mut buffer) {
            // The frame's length takes the place of the header's end.
            let prefix = u32::try_from(length - HEADER).unwrap().to_be_bytes();
            buffer[HEADER - 4..HEADER].copy_from_slice(&prefix);
            if channel.write_all(&buffer[HEADER - 4..length]).is_err() {
                // The gateway has ended; the guest hears nothing more.
                let _ = (&stop).read(&mut [0]);
                break 'frames;
            }
        }
    }
    let _ = channel.shutdown(Shutdown::Both);
    back.join().unwrap();
}

fn to_tap(mut tap: File, mut channel: UnixStream) {
    let mut buffer = vec![0; 8 << 16];
    let mut end = 0;
    while let Ok(length) = channel.read(&mut buffer[end..])
        && length > 0
    {
        end += length;
        let mut start = 0;
        while let Some(prefix) = buffer[..end].get(start..start + 4) {
            let length = u32::from_be_bytes(prefix.try_into().unwrap()) as usize;
            let Some(frame) = buffer[..end].get(start + 4..start + 4 + length) else {
                break;
            };
            // What the guest's kernel does not take is lost.
            let _ = tap.write_vectored(&[IoSlice::new(&header(frame)), IoSlice::new(frame)]);
            start += 4 + length;
        }
        buffer.copy_within(start..end, 0);
        end -= start;
    }
}

/// Says where the sum of TCP or UDP is, so that it is not checked.
fn header(frame: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let (protocol, transport) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (frame[23], 14 + 4 * u16::from(frame[14] & 15)),
        Some([0x86, 0xdd]) => (frame[20], 54),
        _ => return header,
    };
    let sum: u16 = match protocol {
        6 => 16,
        17 => 6,
        _ => return header,
    };
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&transport.to_ne_bytes());
    header[8..10].copy_from_slice(&sum.to_ne_bytes());
    header
}
