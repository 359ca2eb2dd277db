//! The test as proxy, and what control gave it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use protocol::host::proxy::{
    AdmitLink, ApiAbandoned, ApiReply, ApiRequest, AttachVm, Attached, Count, Counted, DetachVm,
    EdgeRequest, ListAttached, Serve, Serving, UpdateVm,
};
use protocol::id::VmId;
use protocol::message::{decode_body, encode_body};
use protocol::network::NetworkCounters;
use protocol::{ErrorBody, Kind, Message, decode};
use proxy::channel::Channel;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::world::*;

/// The test as proxy.
pub(super) struct Proxy {
    channel: Arc<Channel>,
    waiting: Arc<Mutex<Waiting>>,
    pub(super) serve: tokio::sync::watch::Receiver<Serve>,
    reader: AbortHandle,
}

pub(super) type Answered = (ApiReply, Option<OwnedFd>);

#[derive(Default)]
struct Waiting {
    last: u64,
    tickets: HashMap<u64, oneshot::Sender<Answered>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Proxy {
    pub(super) async fn new(channel: Channel, has: Has) -> Self {
        let channel = Arc::new(channel);
        let packet = channel.receive().await.unwrap().unwrap();
        let serve: Serve = decode(&packet.frame).unwrap();
        let serving = Serving {
            api_address: serve.api_address.clone(),
            ..Serving::default()
        };
        channel.send(&serving, &[]).await.unwrap();
        let (told, serve) = tokio::sync::watch::channel(serve);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (from, to) = (channel.clone(), waiting.clone());
        let reader = tokio::spawn(async move {
            while let Ok(Some(mut packet)) = from.receive().await {
                if packet.frame.kind == Serve::KIND {
                    told.send_replace(decode(&packet.frame).unwrap());
                    continue;
                }
                if packet.frame.kind != ApiReply::KIND {
                    has.take(packet, &from).await;
                    continue;
                }
                let reply: ApiReply = decode(&packet.frame).unwrap();
                let waiter = to.lock().unwrap().tickets.remove(&reply.ticket);
                let _ = waiter.unwrap().send((reply, packet.descriptors.pop()));
            }
            to.lock().unwrap().tickets.clear();
        });
        Self {
            channel,
            waiting,
            serve,
            reader: reader.abort_handle(),
        }
    }

    pub(super) fn ticket(&self) -> (u64, oneshot::Receiver<Answered>) {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap();
        waiting.last += 1;
        let ticket = waiting.last;
        waiting.tickets.insert(ticket, sender);
        (ticket, receiver)
    }

    /// Sends a request of the edge; the answer comes later.
    pub(super) async fn begin_edge<Q: Message>(&self, question: &Q) -> oneshot::Receiver<Answered> {
        let (ticket, receiver) = self.ticket();
        let request = EdgeRequest {
            ticket,
            kind: Q::KIND.0,
            body: encode_body(question).unwrap(),
        };
        self.channel.send(&request, &[]).await.unwrap();
        receiver
    }

    /// The edge asks.
    pub(super) async fn ask_edge<Q: Message, A: Message>(
        &self,
        question: &Q,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        read(self.begin_edge(question).await).await
    }

    /// Says something that is not answered.
    pub(super) async fn say<M: Message>(&self, message: &M) {
        self.channel.send(message, &[]).await.unwrap();
    }

    /// Sends a request; the answer comes later.
    pub(super) async fn begin(
        &self,
        token: &str,
        kind: u16,
        body: Vec<u8>,
    ) -> (u64, oneshot::Receiver<Answered>) {
        let (ticket, receiver) = self.ticket();
        let request = ApiRequest {
            ticket,
            token: token.into(),
            kind,
            body,
        };
        self.channel.send(&request, &[]).await.unwrap();
        (ticket, receiver)
    }

    pub(super) async fn abandon(&self, ticket: u64) {
        self.waiting.lock().unwrap().tickets.remove(&ticket);
        let message = ApiAbandoned { ticket };
        self.channel.send(&message, &[]).await.unwrap();
    }

    pub(super) async fn ask<Q: Message, A: Message>(
        &self,
        token: &str,
        question: &Q,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        self.raw(token, Q::KIND.0, encode_body(question).unwrap())
            .await
    }

    pub(super) async fn raw<A: Message>(
        &self,
        token: &str,
        kind: u16,
        body: Vec<u8>,
    ) -> Result<(A, Option<OwnedFd>), ErrorBody> {
        let (_, receiver) = self.begin(token, kind, body).await;
        read(receiver).await
    }
}

/// What proxy was given.
#[derive(Clone, Default)]
pub(super) struct Has(Arc<Mutex<HasState>>);

#[derive(Default)]
pub(super) struct HasState {
    /// With proxy's end of the frame channel.
    pub(super) vms: BTreeMap<VmId, (AttachVm, OwnedFd)>,
    pub(super) attaches: usize,
    pub(super) updates: usize,
    pub(super) links: Vec<AdmitLink>,
    /// What it has counted; none when it says nothing.
    pub(super) requests: Option<u64>,
}

impl Has {
    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, HasState> {
        self.0.lock().unwrap()
    }

    pub(super) async fn take(&self, mut packet: protocol::host::channel::Packet, to: &Channel) {
        let frame = &packet.frame;
        match frame.kind {
            Kind::ATTACH_VM => {
                let attach: AttachVm = decode(frame).unwrap();
                let end = packet.descriptors.pop().unwrap();
                let mut state = self.state();
                state.attaches += 1;
                state.vms.insert(attach.vm.clone(), (attach, end));
            }
            Kind::UPDATE_VM => {
                let update: UpdateVm = decode(frame).unwrap();
                let mut state = self.state();
                state.updates += 1;
                if let Some((vm, _)) = state.vms.get_mut(&update.vm) {
                    vm.egress = update.egress;
                    vm.publication = update.publication;
                }
            }
            Kind::ADMIT_LINK => {
                let link = decode(frame).unwrap();
                self.state().links.push(link);
            }
            Kind::DETACH_VM => {
                let detach: DetachVm = decode(frame).unwrap();
                let mut state = self.state();
                let (vm, _) = state.vms.get(&detach.vm).expect("proxy does not have it");
                assert_eq!(vm.generation, detach.generation);
                state.vms.remove(&detach.vm);
            }
            Kind::LIST_ATTACHED => {
                let ListAttached { after } = decode(frame).unwrap();
                // A page of one, so that there are some.
                let page = {
                    let state = self.state();
                    let mut vms = state
                        .vms
                        .values()
                        .map(|(vm, _)| (vm.vm.clone(), vm.generation));
                    let vm = vms.find(|(vm, _)| after.as_ref().is_none_or(|after| vm > after));
                    Attached {
                        vms: vm.into_iter().collect(),
                        more: vms.next().is_some(),
                    }
                };
                to.send(&page, &[]).await.unwrap();
            }
            Kind::COUNT => {
                let Count { ticket, vm } = decode(frame).unwrap();
                let counted = {
                    let state = self.state();
                    let Some(requests) = state.requests else {
                        return;
                    };
                    let counters = state.vms.contains_key(&vm).then(|| NetworkCounters {
                        requests,
                        ..NetworkCounters::default()
                    });
                    Counted { ticket, counters }
                };
                to.send(&counted, &[]).await.unwrap();
            }
            kind => panic!("control sent {kind} to proxy"),
        }
    }
}

/// Waits for an answer.
pub(super) async fn read<A: Message>(
    receiver: oneshot::Receiver<Answered>,
) -> Result<(A, Option<OwnedFd>), ErrorBody> {
    let (reply, stream) = tokio::time::timeout(HANG, receiver)
        .await
        .expect("no answer")
        .expect("control has gone");
    if reply.kind == Kind::ERROR.0 {
        return Err(decode_body(&reply.body).unwrap());
    }
    assert_eq!(reply.kind, A::KIND.0);
    Ok((decode_body(&reply.body).unwrap(), stream))
}
