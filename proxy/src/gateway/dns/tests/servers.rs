//! Name servers on loopback that answer as a test wants, and what they say.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;

use super::super::Transport;

type Handler = dyn Fn(&Message, Transport) -> Vec<Vec<u8>> + Send + Sync;

/// A name server on loopback that does what its handler says; it ends with the test.
pub(super) struct Fake {
    pub(super) address: SocketAddr,
    udp: Arc<AtomicUsize>,
    tcp: Arc<AtomicUsize>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

pub(super) async fn fake(
    handler: impl Fn(&Message, Transport) -> Vec<Vec<u8>> + Send + Sync + 'static,
) -> Fake {
    let handler: Arc<Handler> = Arc::new(handler);
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            break (udp, tcp);
        }
    };
    let address = udp.local_addr().unwrap();
    let counts = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
    let (by_udp, udp_count) = (Arc::clone(&handler), Arc::clone(&counts[0]));
    let udp_task = tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            udp_count.fetch_add(1, Ordering::SeqCst);
            let query = Message::from_vec(&buffer[..length]).unwrap();
            for packet in by_udp(&query, Transport::Udp) {
                udp.send_to(&packet, from).await.unwrap();
            }
        }
    });
    let tcp_count = Arc::clone(&counts[1]);
    let tcp_task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            tcp_count.fetch_add(1, Ordering::SeqCst);
            let length = stream.read_u16().await.unwrap();
            let mut bytes = vec![0; length.into()];
            stream.read_exact(&mut bytes).await.unwrap();
            let query = Message::from_vec(&bytes).unwrap();
            for packet in handler(&query, Transport::Tcp) {
                stream.write_u16(packet.len() as u16).await.unwrap();
                stream.write_all(&packet).await.unwrap();
            }
        }
    });
    let [udp, tcp] = counts;
    Fake {
        address,
        udp,
        tcp,
        tasks: [udp_task, tcp_task],
    }
}

impl Fake {
    pub(super) fn asked(&self) -> (usize, usize) {
        (
            self.udp.load(Ordering::SeqCst),
            self.tcp.load(Ordering::SeqCst),
        )
    }
}

pub(super) fn response(query: &Message) -> Message {
    let mut message = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    message.metadata.recursion_available = true;
    message.add_queries(query.queries.iter().cloned());
    message
}

pub(super) fn coded(query: &Message, code: ResponseCode) -> Vec<Vec<u8>> {
    let mut message = response(query);
    message.metadata.response_code = code;
    vec![message.to_vec().unwrap()]
}

/// The question's name has these addresses for 300 seconds.
pub(super) fn addressed(query: &Message, addresses: &[&str]) -> Vec<u8> {
    let mut message = response(query);
    for address in addresses {
        let data = RData::from(address.parse::<IpAddr>().unwrap());
        let name = query.queries[0].name().clone();
        message.add_answer(Record::from_rdata(name, 300, data));
    }
    message.to_vec().unwrap()
}

pub(super) async fn honest(address: &'static str) -> Fake {
    fake(move |query, _| vec![addressed(query, &[address])]).await
}
