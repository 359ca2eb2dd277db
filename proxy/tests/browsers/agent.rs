//! Control and the VM's agent, as far as a visitor needs them: control hands out streams to the agent,
//! and the agent connects them to ports of the VM's loopback.

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use protocol::agent::{Dial, Dialed};
use protocol::host::proxy::{ApiReply, Awake, EdgeRequest, LookedUp};
use protocol::network::Publication;
use protocol::vm::Opened;
use protocol::{ErrorBody, ErrorCode, Kind, Message};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::common::Control;
use crate::net::Guest;

/// The VM with the number of its start, while it runs.
pub(crate) type Running = watch::Receiver<Option<(u64, Arc<Guest>)>>;

/// Answers what proxy asks until proxy ends. Who wants a VM that is stopped waits for its start.
pub(crate) async fn serve(control: Arc<Control>, running: Running) {
    while let Some(packet) = control.next().await {
        let request: EdgeRequest = protocol::decode(&packet.frame).unwrap();
        let (control, running) = (Arc::clone(&control), running.clone());
        tokio::spawn(answer(control, request, running));
    }
}

async fn answer(control: Arc<Control>, request: EdgeRequest, mut running: Running) {
    let ticket = request.ticket;
    if Kind(request.kind) == Kind::LOOK_UP {
        let publication = Publication::default();
        return reply(&control, ticket, &LookedUp { publication }, &[]).await;
    }
    let Ok(Some((generation, guest))) = running
        .wait_for(Option::is_some)
        .await
        .map(|running| running.clone())
    else {
        return;
    };
    let vm = "vm-1234abcd".parse().unwrap();
    if Kind(request.kind) == Kind::WAKE {
        return reply(&control, ticket, &Awake { vm, generation }, &[]).await;
    }
    assert_eq!(Kind(request.kind), Kind::DIAL_AGENT);
    let (agent, proxys) = std::os::unix::net::UnixStream::pair().unwrap();
    let opened = Opened { id: vm, generation };
    reply(&control, ticket, &opened, &[proxys.as_fd()]).await;
    agent.set_nonblocking(true).unwrap();
    connect(UnixStream::from_std(agent).unwrap(), guest).await;
}

async fn reply<M: Message>(
    control: &Control,
    ticket: u64,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) {
    let reply = ApiReply {
        ticket,
        kind: M::KIND.0,
        body: protocol::message::encode_body(message).unwrap(),
    };
    control.send(&reply, descriptors).await;
}

async fn connect(mut stream: UnixStream, guest: Arc<Guest>) {
    let length = protocol::encode(&Dial { port: 3000 }).unwrap().len();
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await.unwrap();
    let mut rest = &bytes[..];
    let frame = protocol::FrameReader::new().push(&mut rest).unwrap();
    let Dial { port } = protocol::decode(&frame.unwrap()).unwrap();
    let addresses = ["127.0.0.1", "::1"];
    let found = guest
        .run(move || {
            addresses
                .iter()
                .find_map(|to| TcpStream::connect((*to, port)).ok())
        })
        .await;
    let Some(found) = found else {
        let refusal = ErrorBody::guest(ErrorCode::ConnectionRefused, "nobody listens");
        let _ = stream.write_all(&protocol::encode(&refusal).unwrap()).await;
        return;
    };
    found.set_nonblocking(true).unwrap();
    let mut found = tokio::net::TcpStream::from_std(found).unwrap();
    let dialed = protocol::encode(&Dialed {}).unwrap();
    if stream.write_all(&dialed).await.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut found).await;
    }
}
