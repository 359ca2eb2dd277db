//! The checksums of TCP and UDP in a frame from the channel, where nobody made them. A driver that
//! takes partial checksums is given the sum of the pseudo-header and told where the rest belongs; for
//! another one the whole sum is made. Frames that are no plain TCP or UDP packet are left alone, a
//! fragment among them: its checksum covers more than the frame.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]

const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where a partial checksum begins, and where in there its result goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Partial {
    pub(super) start: u16,
    pub(super) offset: u16,
}

/// A TCP or UDP packet in a frame.
struct Segment {
    partial: Partial,
    /// Its bytes, header included.
    length: usize,
    /// The sum of its pseudo-header.
    pseudo: u64,
    is_udp: bool,
}

/// Makes the checksum a partial one; None when there is none to make.
pub(super) fn make_partial(frame: &mut [u8]) -> Option<Partial> {
    let segment = parse(frame)?;
    let sum = fold(segment.pseudo);
    field(frame, segment.partial)?.copy_from_slice(&sum.to_be_bytes());
    Some(segment.partial)
}

/// Makes the whole checksum, if there is one to make.
pub(super) fn make_whole(frame: &mut [u8]) {
    let Some(segment) = parse(frame) else {
        return;
    };
    if let Some(field) = field(frame, segment.partial) {
        field.fill(0);
    }
    let start = usize::from(segment.partial.start);
    let bytes = frame.get(start..start.saturating_add(segment.length));
    let sum = segment
        .pseudo
        .saturating_add(sum(bytes.unwrap_or_default()));
    let result = match !fold(sum) {
        // Zero means "none" in UDP.
        0 if segment.is_udp => u16::MAX,
        result => result,
    };
    if let Some(field) = field(frame, segment.partial) {
        field.copy_from_slice(&result.to_be_bytes());
    }
}

fn field(frame: &mut [u8], partial: Partial) -> Option<&mut [u8]> {
    let at = usize::from(partial.start).checked_add(usize::from(partial.offset))?;
    frame.get_mut(at..at.checked_add(2)?)
}

fn parse(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(ETHERNET..)?;
    let (header, length, protocol, addresses) = match frame.get(12..ETHERNET)?.try_into().ok()? {
        IPV4 => {
            let first = *packet.first()?;
            let header = usize::from(first & 0xf).checked_mul(4)?;
            let total = u16_at(packet, 2)?;
            let is_fragment = u16_at(packet, 6)? & 0x3fff != 0;
            if first >> 4 != 4 || header < 20 || is_fragment {
                return None;
            }
            let length = usize::from(total).checked_sub(header)?;
            (header, length, *packet.get(9)?, packet.get(12..20)?)
        }
        IPV6 => {
            if *packet.first()? >> 4 != 6 {
                return None;
            }
            let length = usize::from(u16_at(packet, 4)?);
            (40, length, *packet.get(6)?, packet.get(8..40)?)
        }
        _ => return None,
    };
    let (least, offset) = match protocol {
        TCP => (20, 16),
        UDP => (8, 6),
        _ => return None,
    };
    if length < least || packet.len() < header.checked_add(length)? {
        return None;
    }
    let pseudo = sum(addresses)
        .checked_add(u64::from(protocol))?
        .checked_add(length as u64)?;
    Some(Segment {
        partial: Partial {
            start: u16::try_from(header.checked_add(ETHERNET)?).ok()?,
            offset,
        },
        length,
        pseudo,
        is_udp: protocol == UDP,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// The sum of 16-bit words, big-endian; carries are above. 64 KiB of them are far from its limit.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |last| u64::from(*last) << 8);
    words.iter().fold(last, |sum, word| {
        sum.wrapping_add(u64::from(u16::from_be_bytes(*word)))
    })
}

fn fold(sum: u64) -> u16 {
    let mut sum = sum;
    while sum > u64::from(u16::MAX) {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::arithmetic_side_effects
)]
mod tests {
    use super::*;

    /// A UDP packet over IPv4: 10.213.0.1:53 to 10.213.0.2:1234, "hi!", with the checksum 0x1111.
    fn ipv4() -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend([0x45, 0, 0, 31, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend([10, 213, 0, 1, 10, 213, 0, 2]);
        frame.extend([0, 53, 4, 210, 0, 11, 0x11, 0x11]);
        frame.extend(b"hi!");
        frame
    }

    /// The same in TCP over IPv6, with an Ethernet trailer.
    fn ipv6() -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 23, 6, 64]);
        for last in [1, 2] {
            frame.extend([
                0xfd, 0x73, 0x75, 0x70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last,
            ]);
        }
        frame.extend([0, 53, 4, 210, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0]);
        frame.extend([0x11, 0x11, 0, 0]);
        frame.extend(b"hi!");
        frame.extend([0xff; 5]);
        frame
    }

    /// What a receiver computes over pseudo-header and segment: all ones when the checksum is right.
    fn checked(frame: &[u8]) -> u16 {
        let segment = parse(frame).unwrap();
        let start = usize::from(segment.partial.start);
        fold(segment.pseudo + sum(&frame[start..start + segment.length]))
    }

    #[test]
    fn a_partial_checksum_becomes_right_when_a_kernel_fills_it_in() {
        for (mut frame, start, offset) in [(ipv4(), 34, 6), (ipv6(), 54, 16)] {
            let partial = make_partial(&mut frame).unwrap();
            assert_eq!((partial.start, partial.offset), (start, offset));
            // As skb_checksum_help: the sum from the start on, the field's content included.
            let length = parse(&frame).unwrap().length;
            let start = usize::from(start);
            let filled = !fold(sum(&frame[start..start + length]));
            field(&mut frame, partial)
                .unwrap()
                .copy_from_slice(&filled.to_be_bytes());
            assert_eq!(checked(&frame), u16::MAX);
        }
    }

    #[test]
    fn the_pseudo_header_sum_is_the_known_one() {
        let mut frame = ipv4();
        make_partial(&mut frame).unwrap();
        // 0ad5 + 0001 + 0ad5 + 0002 + 0011 (UDP) + 000b (length)
        assert_eq!(frame[40..42], [0x15, 0xc9]);
    }

    #[test]
    fn a_whole_checksum_is_right_whatever_was_there() {
        for mut frame in [ipv4(), ipv6()] {
            make_whole(&mut frame);
            assert_eq!(checked(&frame), u16::MAX);
        }
    }

    #[test]
    fn other_frames_are_left_alone() {
        let mut frames = Vec::new();
        for (at, value) in [
            (12, 0x81),   // VLAN
            (14, 0x55),   // version 5
            (14, 0x44),   // header too short
            (14, 0x4f),   // header longer than the packet
            (17, 30 + 2), // longer than the frame
            (17, 27),     // no room for UDP's header
            (20, 0x60),   // first fragment
            (21, 1),      // later fragment
            (23, 1),      // ICMP
        ] {
            let mut frame = ipv4();
            frame[at] = value;
            frames.push(frame);
        }
        for (at, value) in [(14, 0x45), (20, 0), (20, 44), (19, 29), (19, 19), (18, 1)] {
            let mut frame = ipv6();
            frame[at] = value;
            frames.push(frame);
        }
        for length in 0..ipv4().len() {
            frames.push(ipv4()[..length].to_vec());
        }
        for frame in frames {
            let mut after = frame.clone();
            assert_eq!(make_partial(&mut after), None, "{frame:x?}");
            make_whole(&mut after);
            assert_eq!(after, frame);
        }
    }
}
