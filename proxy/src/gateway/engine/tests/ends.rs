//! What ends by itself: flows and connections that nothing is heard of, connections that the world has
//! reset, and those for which there is no place.

use smoltcp::wire::Icmpv4Message;

use super::*;

/// Frames to the guest that carry TCP.
fn segments(rig: &mut Rig) -> Vec<Vec<u8>> {
    rig.turns();
    let mut frames = rig.take();
    frames.retain(|frame| tcp_of(frame).is_some());
    frames
}

fn is_reset(frame: &[u8]) -> bool {
    tcp_of(frame).is_some_and(|packet| packet.rst())
}

fn pass(rig: &mut Rig, seconds: u64) {
    rig.engine.ahead += Duration::from_secs(seconds);
    rig.turns();
}

#[test]
fn a_flow_ends_when_nothing_came_for_its_time_and_the_next_datagram_opens_another() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (server, first) = flow(&mut rig, 9);
        let to = server.local_addr().unwrap();
        pass(&mut rig, 119);
        // Whichever side speaks, the time begins anew.
        rig.send(&udp(9, to, b"still here"));
        rig.turns();
        pass(&mut rig, 119);
        assert_eq!(rig.engine.entries.tokens().len(), 1);
        pass(&mut rig, 2);
        assert_eq!(rig.engine.entries.tokens(), []);
        assert_eq!(rig.engine.counters.read().open, 0);
        assert_eq!(rig.engine.common.open(), 0);
        let mut buffer = [0; 20];
        assert_eq!(server.recv_from(&mut buffer).unwrap().1, first);
        rig.send(&udp(9, to, b"again"));
        let mut from = None;
        rig.until("the world hears of it", |_| {
            from = server.recv_from(&mut buffer).ok();
            from.is_some()
        });
        assert_eq!(&buffer[..5], b"again");
        assert_eq!(rig.engine.counters.read().connections, 2);
    });
}

#[test]
fn questions_and_pings_have_less_time() {
    world(|| async {
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        let mut rig = Rig::new(Egress::default());
        let time = UdpSocket::bind((WORLD, 123)).unwrap();
        rig.send(&udp(9, time.local_addr().unwrap(), b"what time is it"));
        let repr = Icmpv4Repr::EchoRequest {
            ident: 7,
            seq_no: 1,
            data: b"ping",
        };
        let mut bytes = vec![0; repr.buffer_len()];
        let mut packet = Icmpv4Packet::new_unchecked(&mut bytes[..]);
        repr.emit(&mut packet, &ChecksumCapabilities::default());
        rig.send(&ip(WORLD, IpProtocol::Icmp, &bytes));
        rig.until("the ping is answered", |rig| {
            rig.take().iter().any(|frame| {
                let payload = payload_of(frame, IpProtocol::Icmp);
                let packet = payload.and_then(|payload| Icmpv4Packet::new_checked(payload).ok());
                packet.is_some_and(|packet| packet.msg_type() == Icmpv4Message::EchoReply)
            })
        });
        pass(&mut rig, 14);
        assert_eq!(rig.engine.entries.tokens().len(), 2);
        pass(&mut rig, 2);
        assert_eq!(rig.engine.entries.tokens(), []);
    });
}

#[test]
fn a_guest_that_is_not_heard_of_is_asked_and_then_given_up() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (listener, to) = listen();
        let (_, next) = rig.open(9, to);
        let (mut server, _) = listener.accept().unwrap();
        segments(&mut rig);
        pass(&mut rig, 70);
        assert_eq!(segments(&mut rig), Vec::<Vec<u8>>::new());
        pass(&mut rig, 10);
        // A byte before the next one, which a guest that is there has to answer (RFC 9293, 3.8.4).
        let asked = segments(&mut rig);
        let packet = tcp_of(&asked[0]).unwrap();
        assert_eq!(packet.seq_number().0, next.wrapping_sub(1));
        rig.send(&tcp(9, to, TcpControl::None, 78, Some(next)));
        rig.turns();
        pass(&mut rig, 290);
        assert!(!segments(&mut rig).iter().any(|frame| is_reset(frame)));
        pass(&mut rig, 20);
        let last = rig.take().pop().unwrap();
        assert!(is_reset(&last));
        let error = server.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(rig.engine.entries.tokens(), []);
    });
}

#[test]
fn a_reset_of_the_world_reaches_a_guest_that_takes_nothing() {
    world(|| async {
        let mut rig = Rig::new(Egress::default());
        let (listener, to) = listen();
        rig.open(9, to);
        let (mut server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        // Until every buffer on the way is full.
        let mut refused = 0;
        while refused < 100 {
            rig.turns();
            if server.write(&[1; 1 << 16]).is_ok_and(|written| written > 0) {
                refused = 0;
            } else {
                refused += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(!segments(&mut rig).iter().any(|frame| is_reset(frame)));
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        nix::sys::socket::setsockopt(&server, nix::sys::socket::sockopt::Linger, &linger).unwrap();
        drop(server);
        rig.until("the guest is told", |rig| {
            rig.take().iter().any(|frame| is_reset(frame))
        });
    });
}

#[test]
fn places_of_all_vms_together_are_bounded_and_come_back() {
    world(|| async {
        let common = Common::with_total(2);
        let mut rigs = [
            Rig::with(Egress::default(), Arc::clone(&common)),
            Rig::with(Egress::default(), Arc::clone(&common)),
        ];
        let (_listener, to) = listen();
        let [first, second] = &mut rigs;
        let (mine, theirs) = first.open(9, to);
        first.open(10, to);
        second.send(&tcp(9, to, TcpControl::Syn, 77, None));
        assert!(is_reset(&segments(second)[0]));
        let counters = second.engine.counters.read();
        assert_eq!((counters.limited, counters.open), (1, 0));
        assert_eq!(common.open(), 2);
        first.send(&tcp(9, to, TcpControl::Rst, mine, Some(theirs)));
        first.until("a place is free", |_| common.open() == 1);
        second.open(9, to);
        assert_eq!(common.open(), 2);
        drop(rigs);
        assert_eq!(common.open(), 0);
    });
}
