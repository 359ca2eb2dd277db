//! Packets to a monitor's control socket, of any bytes and with up to three descriptors: nothing but
//! a whole `SwitchOff` ends the machine, and no descriptor is left open.

#![no_main]

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use fuzz::driver::Input;
use libfuzzer_sys::fuzz_target;
use protocol::frame::{Kind, append};
use protocol::host::vmm::Connect;
use protocol::message::encode;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let (stream, _other) = UnixStream::pair().expect("a pair");
    let null = std::fs::File::open("/dev/null").expect("it is there");
    let mut packets = Vec::new();
    while !input.is_empty() && packets.len() < 32 {
        let what = input.byte();
        let length = usize::from(input.byte());
        let body = input.take(length);
        let mut packet = Vec::new();
        match what % 7 {
            0 => packet.extend_from_slice(body),
            1 => {
                let connect = Connect {
                    ticket: input.number(),
                    port: input.u32(),
                    wait_for_agent: length % 2 == 0,
                };
                packet = encode(&connect).expect("a packet");
            }
            kind => {
                let kinds = [
                    Kind::IDENTIFY,
                    Kind::CONNECT,
                    Kind::SWITCH_OFF,
                    Kind::ATTACH_FRAMES,
                    Kind(input.u16()),
                ];
                append(&mut packet, kinds[usize::from(kind - 2)], body).expect("a packet");
            }
        }
        let mut attached = Vec::new();
        for number in 0..what >> 6 {
            attached.push(if number % 2 == 0 {
                stream.as_fd()
            } else {
                null.as_fd()
            });
        }
        if !packet.is_empty() {
            packets.push((packet, attached));
        }
    }
    let ends = packets.iter().any(|(packet, _)| {
        let kind = packet
            .get(4..6)
            .map(|kind| u16::from_le_bytes([kind[0], kind[1]]));
        packet.len() == 7 && packet[..4] == [0; 4] && kind == Some(Kind::SWITCH_OFF.0)
    });
    let packets: Vec<_> = packets
        .iter()
        .map(|(packet, attached)| (packet.as_slice(), attached.clone()))
        .collect();
    let (streams, ended) = vmm::fuzz_control(&packets).expect("sockets");
    assert!(streams <= packets.len());
    assert_eq!(ended, ends);
    let next = null.as_fd().try_clone_to_owned().expect("a descriptor");
    assert!(next.as_raw_fd() < 512, "descriptors leak");
});
