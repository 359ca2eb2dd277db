//! Monitors that speak `protocol::host::vmm`, and agents that know `Configure` and `PowerOff` and echo
//! everything else.

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::agent::{Configured, PowerOff, PoweringOff};
use protocol::host::supervisor::Run;
use protocol::host::vmm::{
    Connect, Connected, Ending, Identity, MachineState, NotConnected, VmmConfig, descriptor,
};
use protocol::{ErrorBody, ErrorCode, Frame, FrameReader, Kind, decode, encode, frame};
use proxy::channel::ChannelListener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::world::{Guest, Supervisor};

/// A monitor: checks what it was handed, then serves its control socket until the run ends.
pub(super) async fn monitor_of(
    run: &Run,
    guest: Guest,
    mut files: HashMap<String, OwnedFd>,
    supervisor: Supervisor,
) -> Ending {
    let mut file = |name: &str| fs::File::from(files.remove(name).unwrap());
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut file(descriptor::CONFIG), &mut bytes).unwrap();
    let config: VmmConfig = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(config.run, *run);
    let memory = file(descriptor::MEMORY).metadata().unwrap().len();
    assert_eq!(memory, u64::from(config.memory_mib) << 20);
    file(descriptor::DISK).write_all_at(b"guest", 8).unwrap();
    file(descriptor::LOG)
        .write_all_at(b"Linux version 6.12\n", 0)
        .unwrap();
    for name in [descriptor::KERNEL, descriptor::INITRAMFS, descriptor::KVM] {
        file(name);
    }
    if let Guest::Dies(ending) = guest {
        return ending;
    }
    let listener = ChannelListener::new(files.remove(descriptor::LISTEN).unwrap()).unwrap();
    let (end, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let configured = Arc::new(AtomicBool::new(false));
    let dropped = supervisor.state().dropped.clone();
    let mut agents = JoinSet::new();
    loop {
        let channel = tokio::select! {
            ending = ended.recv() => return ending.unwrap(),
            channel = listener.accept() => channel.unwrap(),
        };
        // Streams that wait for an agent that never comes.
        let mut kept = Vec::new();
        loop {
            let packet = tokio::select! {
                ending = ended.recv() => return ending.unwrap(),
                packet = channel.receive() => packet,
                () = dropped.notified() => break,
            };
            let Ok(Some(mut packet)) = packet else { break };
            match packet.frame.kind {
                Kind::IDENTIFY => {
                    let identity = Identity {
                        run: run.clone(),
                        model: config.model,
                        state: MachineState::Running,
                    };
                    channel.send(&identity, &[]).await.unwrap();
                }
                Kind::CONNECT => {
                    let connect: Connect = decode(&packet.frame).unwrap();
                    let stream = packet.descriptors.pop().unwrap();
                    let ticket = connect.ticket;
                    if connect.port != 1024 {
                        let message = NotConnected {
                            ticket,
                            message: "no listener".into(),
                        };
                        channel.send(&message, &[]).await.unwrap();
                        continue;
                    }
                    if guest == Guest::NeverRings {
                        kept.push(stream);
                        continue;
                    }
                    channel.send(&Connected { ticket }, &[]).await.unwrap();
                    agents.spawn(agent(
                        stream,
                        guest,
                        configured.clone(),
                        end.clone(),
                        supervisor.clone(),
                    ));
                }
                Kind::ATTACH_FRAMES => {
                    let end = packet.descriptors.pop().unwrap();
                    supervisor.state().frames.insert(run.vm.clone(), end);
                }
                Kind::SWITCH_OFF => return Ending::SwitchedOff,
                kind => panic!("control sent {kind} to a monitor"),
            }
        }
    }
}

async fn agent(
    stream: OwnedFd,
    guest: Guest,
    configured: Arc<AtomicBool>,
    end: tokio::sync::mpsc::UnboundedSender<Ending>,
    supervisor: Supervisor,
) {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true).unwrap();
    let mut stream = UnixStream::from_std(stream).unwrap();
    while let Some(request) = next_frame(&mut stream).await {
        let answer = match request.kind {
            _ if guest == Guest::Garbage => vec![0xff; 64],
            Kind::CONFIGURE if configured.swap(true, Ordering::SeqCst) => {
                encode(&ErrorBody::caller(ErrorCode::AlreadyConfigured, "twice")).unwrap()
            }
            Kind::CONFIGURE => {
                supervisor
                    .state()
                    .configured
                    .push(decode(&request).unwrap());
                let answer = Configured {
                    agent_version: "0".into(),
                    boot_id: "b".into(),
                    disk_bytes: 1,
                };
                encode(&answer).unwrap()
            }
            Kind::POWER_OFF => {
                let PowerOff { .. } = decode(&request).unwrap();
                encode(&PoweringOff {}).unwrap()
            }
            kind => {
                let mut bytes = Vec::new();
                frame::append(&mut bytes, kind, &request.body).unwrap();
                bytes
            }
        };
        if stream.write_all(&answer).await.is_err() {
            return;
        }
        if request.kind == Kind::POWER_OFF && guest != Guest::StaysOn {
            let _ = end.send(Ending::PoweredOff);
        }
    }
}

pub(super) async fn next_frame(stream: &mut UnixStream) -> Option<Frame> {
    let mut reader = FrameReader::new();
    loop {
        // Byte by byte: what follows belongs to the next frame.
        let mut byte = [0];
        stream.read_exact(&mut byte).await.ok()?;
        if let Some(frame) = reader.push(&mut &byte[..]).unwrap() {
            return Some(frame);
        }
    }
}
