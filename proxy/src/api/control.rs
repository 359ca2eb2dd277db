//! Control's side of the API: one control at a time, the newest. It says what to serve, gets the
//! clients' requests and answers them. Its end disturbs no client: requests wait at the desk.

use std::sync::Arc;

use protocol::Message;
use protocol::host::channel::{ChannelError, Packet};
use protocol::host::proxy::{
    AdmitLink, ApiReply, AttachVm, Attached, CertificateOrdered, Count, Counted, DetachVm,
    ListAttached, OrderCertificate, Serve, Serving, UpdateVm,
};
use tokio::sync::mpsc;

use super::Shared;
use super::desk::Outgoing;
use super::listen::{Listening, log_accept};
use super::quiet::Quiet;
use super::tls::edge_config;
use crate::acme::{self, Here};
use crate::channel::{Channel, ChannelListener};
use crate::online::connect_to_world;

/// Answers that may wait for control to read them: more than it asks for at once.
const MAX_SAID: usize = 2048;

/// An answer to control. Reading from it never waits for it to read: two that wait for each other
/// would wait for ever.
enum Said {
    Serving(Serving),
    Attached(Attached),
    Counted(Counted),
}

/// Accepts controls for ever; the newest replaces the one before.
pub(crate) async fn accept(listener: ChannelListener, shared: Arc<Shared>) {
    let listening = Arc::new(tokio::sync::Mutex::new(Listening::default()));
    let mut current: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        let channel = match listener.accept().await {
            Ok(channel) => channel,
            // Such as for want of descriptors: no reason to end everybody's connections.
            Err(error) => {
                log_accept(&error).await;
                continue;
            }
        };
        if let Some(task) = current.take() {
            task.abort();
        }
        let incarnation = shared.desk.connected();
        shared.vms.connected();
        tracing::info!(incarnation, "control connected");
        let shared = Arc::clone(&shared);
        let listening = Arc::clone(&listening);
        let channel = Arc::new(channel);
        current = Some(tokio::spawn(async move {
            let (say, said) = mpsc::channel(MAX_SAID);
            let result = tokio::select! {
                result = receive(&channel, &shared, &listening, &say) => result,
                result = speak(&channel, said) => result,
                result = send(&channel, &shared, incarnation) => result,
                result = report(&channel, &shared) => result,
            };
            match result {
                Ok(()) => tracing::info!(incarnation, "control left"),
                Err(error) => tracing::error!(incarnation, %error, "control's channel broke"),
            }
            shared.desk.disconnected(incarnation);
        }));
    }
}

async fn receive(
    channel: &Arc<Channel>,
    shared: &Arc<Shared>,
    listening: &tokio::sync::Mutex<Listening>,
    say: &mpsc::Sender<Said>,
) -> Result<(), ChannelError> {
    // Orders end with the line: nobody else would take their answers.
    let mut orders = tokio::task::JoinSet::new();
    while let Some(Packet { frame, descriptors }) = channel.receive().await? {
        match frame.kind {
            Serve::KIND => {
                let serve: Serve = protocol::decode(&frame)?;
                let mut listening = listening.lock().await;
                let serving = apply(serve, &mut listening, shared).await;
                answer(say, Said::Serving(serving));
            }
            ApiReply::KIND => {
                let reply: ApiReply = protocol::decode(&frame)?;
                shared.desk.answered(reply, descriptors);
            }
            AttachVm::KIND => {
                let attach: AttachVm = protocol::decode(&frame)?;
                match descriptors.into_iter().next() {
                    Some(frames) => {
                        let vm = shared.vms.attach(attach, frames);
                        connect_to_world(&shared.vms, vm, &shared.common);
                    }
                    None => tracing::error!(vm = %attach.vm, "attached without a frame channel"),
                }
            }
            AdmitLink::KIND => shared.edge.admit(&protocol::decode(&frame)?),
            UpdateVm::KIND => shared.vms.update(protocol::decode(&frame)?),
            DetachVm::KIND => shared.vms.detach(&protocol::decode(&frame)?),
            ListAttached::KIND => {
                let ListAttached { after } = protocol::decode(&frame)?;
                answer(say, Said::Attached(shared.vms.list(after.as_ref())));
            }
            Count::KIND => {
                let Count { ticket, vm } = protocol::decode(&frame)?;
                let counters = shared.vms.get(&vm).map(|vm| vm.counters());
                answer(say, Said::Counted(Counted { ticket, counters }));
            }
            OrderCertificate::KIND => {
                let order: OrderCertificate = protocol::decode(&frame)?;
                // One at a time: a new one takes the place of an old one.
                orders.abort_all();
                while orders.try_join_next().is_some() {}
                let channel = Arc::clone(channel);
                let here = Here {
                    challenges: shared.edge.challenges(),
                    domain: shared.edge.domain(),
                };
                orders.spawn(async move { channel.send(&ordered(order, here).await, &[]).await });
            }
            // A newer control may say more than this proxy knows.
            kind => tracing::warn!(%kind, "message from control ignored"),
        }
    }
    Ok(())
}

/// Serves what control says: the API, the edge, the VMs' way out.
async fn apply(serve: Serve, listening: &mut Listening, shared: &Arc<Shared>) -> Serving {
    let mut serving = listening.apply(&serve, shared).await;
    let mut complaints = vec![std::mem::take(&mut serving.message)];
    if !serve.edge.https_address.is_empty() {
        match edge_config(&serve.certificates, &serve.key, &serve.edge.named) {
            Ok(config) => shared.edge.set_tls(config),
            Err(error) => complaints.push(format!("the edge's certificate: {error}")),
        }
    }
    let edge = shared.edge.apply(&serve.edge).await;
    if edge.message.is_empty() {
        tracing::info!(
            https = edge.https_address,
            http = edge.http_address,
            "serving VMs"
        );
    } else {
        tracing::error!(message = edge.message, "not serving VMs as asked");
    }
    serving.https_address = edge.https_address;
    serving.http_address = edge.http_address;
    complaints.push(edge.message);
    complaints.retain(|complaint| !complaint.is_empty());
    serving.message = complaints.join("; ");
    shared.common.set(serve.gateway);
    serving
}

/// Puts an answer on its way. A control that reads none of so many gets no more: it has deadlines.
fn answer(say: &mpsc::Sender<Said>, said: Said) {
    if say.try_send(said).is_err() {
        static QUIET: Quiet = Quiet::new();
        if let Some(left_out) = QUIET.allow() {
            tracing::error!(left_out, "control does not read its answers");
        }
    }
}

async fn speak(channel: &Channel, mut said: mpsc::Receiver<Said>) -> Result<(), ChannelError> {
    while let Some(said) = said.recv().await {
        match said {
            Said::Serving(serving) => channel.send(&serving, &[]).await?,
            Said::Attached(attached) => channel.send(&attached, &[]).await?,
            Said::Counted(counted) => channel.send(&counted, &[]).await?,
        }
    }
    Ok(())
}

/// Carries out an order; a panic in it is its failure.
async fn ordered(order: OrderCertificate, here: Here) -> CertificateOrdered {
    let ticket = order.ticket;
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move { acme::order(&order, &here).await });
    let (chain, message) = match task.join_next().await {
        Some(Ok(Ok(chain))) => (chain, String::new()),
        Some(Ok(Err(error))) => (String::new(), error.to_string()),
        _ => (String::new(), "the order failed; see proxy's log".into()),
    };
    CertificateOrdered {
        ticket,
        chain,
        message: message.chars().take(4096).collect(),
    }
}

/// Tells which frame channels were lost.
async fn report(channel: &Channel, shared: &Shared) -> Result<(), ChannelError> {
    loop {
        let lost = shared.vms.next_lost().await;
        channel.send(&lost, &[]).await?;
    }
}

async fn send(channel: &Channel, shared: &Shared, incarnation: u64) -> Result<(), ChannelError> {
    while let Some(outgoing) = shared.desk.next(incarnation).await {
        match outgoing {
            Outgoing::Request(request) => channel.send(&*request, &[]).await?,
            Outgoing::Edge(request) => channel.send(&*request, &[]).await?,
            Outgoing::Abandoned(abandoned) => channel.send(&abandoned, &[]).await?,
        }
    }
    Ok(())
}
