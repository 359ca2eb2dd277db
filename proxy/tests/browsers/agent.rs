//! Control and the VM's agent, as far as a visitor needs them: control hands out streams to the agent,
//! and the agent connects them to ports of the VM's loopback.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use protocol::agent::{Dial, Dialed};
use protocol::host::proxy::{ApiReply, EdgeRequest};
use protocol::vm::Opened;
use protocol::{ErrorBody, ErrorCode, Kind, Message};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::common::Control;
use crate::net::Guest;

/// Answers what proxy asks until proxy ends.
pub(crate) async fn serve(control: Control, guest: Arc<Guest>) {
    while let Some(packet) = control.next().await {
        let request: EdgeRequest = protocol::decode(&packet.frame).unwrap();
        assert_eq!(Kind(request.kind), Kind::DIAL_AGENT);
        let (agent, proxys) = std::os::unix::net::UnixStream::pair().unwrap();
        let opened = Opened {
            id: "vm-1234abcd".parse().unwrap(),
            generation: 1,
        };
        let reply = ApiReply {
            ticket: request.ticket,
            kind: Opened::KIND.0,
            body: protocol::message::encode_body(&opened).unwrap(),
        };
        control.send(&reply, &[proxys.as_fd()]).await;
        agent.set_nonblocking(true).unwrap();
        let agent = UnixStream::from_std(agent).unwrap();
        tokio::spawn(connect(agent, Arc::clone(&guest)));
    }
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
