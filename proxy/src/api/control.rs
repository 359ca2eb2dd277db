//! Control's side of the API: one control at a time, the newest. It says what to serve, gets the
//! clients' requests and answers them. Its end disturbs no client: requests wait at the desk.

use std::sync::Arc;

use protocol::Message;
use protocol::host::channel::{ChannelError, Packet};
use protocol::host::proxy::{
    ApiReply, AttachVm, CertificateOrdered, Count, Counted, DetachVm, ListAttached,
    OrderCertificate, Serve, UpdateVm,
};

use super::Shared;
use super::desk::Outgoing;
use super::listen::{Listening, log_accept};
use crate::acme;
use crate::channel::{Channel, ChannelListener};

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
            let result = tokio::select! {
                result = receive(&channel, &shared, &listening) => result,
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
) -> Result<(), ChannelError> {
    // Orders end with the line: nobody else would take their answers.
    let mut orders = tokio::task::JoinSet::new();
    while let Some(Packet { frame, descriptors }) = channel.receive().await? {
        match frame.kind {
            Serve::KIND => {
                let serve: Serve = protocol::decode(&frame)?;
                shared.vms.set_gateway(serve.gateway.clone());
                let serving = listening.lock().await.apply(&serve, shared).await;
                channel.send(&serving, &[]).await?;
            }
            ApiReply::KIND => {
                let reply: ApiReply = protocol::decode(&frame)?;
                shared.desk.answered(reply, descriptors);
            }
            AttachVm::KIND => {
                let attach: AttachVm = protocol::decode(&frame)?;
                match descriptors.into_iter().next() {
                    Some(frames) => shared.vms.attach(attach, frames),
                    None => tracing::error!(vm = %attach.vm, "attached without a frame channel"),
                }
            }
            UpdateVm::KIND => shared.vms.update(protocol::decode(&frame)?),
            DetachVm::KIND => shared.vms.detach(&protocol::decode(&frame)?),
            ListAttached::KIND => {
                let ListAttached { after } = protocol::decode(&frame)?;
                channel.send(&shared.vms.list(after.as_ref()), &[]).await?;
            }
            Count::KIND => {
                let Count { ticket, vm } = protocol::decode(&frame)?;
                let counters = shared.vms.get(&vm).map(|vm| vm.counters());
                channel.send(&Counted { ticket, counters }, &[]).await?;
            }
            OrderCertificate::KIND => {
                let order: OrderCertificate = protocol::decode(&frame)?;
                // One at a time: a new one takes the place of an old one.
                orders.abort_all();
                while orders.try_join_next().is_some() {}
                let channel = Arc::clone(channel);
                orders.spawn(async move { channel.send(&ordered(order).await, &[]).await });
            }
            // A newer control may say more than this proxy knows.
            kind => tracing::warn!(%kind, "message from control ignored"),
        }
    }
    Ok(())
}

/// Carries out an order; a panic in it is its failure.
async fn ordered(order: OrderCertificate) -> CertificateOrdered {
    let ticket = order.ticket;
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move { acme::order(&order).await });
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
