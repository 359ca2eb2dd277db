//! One VM: streams to its agent, each for one operation. What can be done with the streams is in
//! modules of its own: commands, processes, files.

use protocol::Message;
use protocol::agent::{Dial, Dialed, Health, HealthReport};
use protocol::network::{Egress, LinkCreated, NetworkInfo, Publication};
use protocol::vm::{OpenVm, Opened, VmInfo, VmRef};

use crate::agent::{AgentStream, Replies, Requests};
use crate::api::{Client, pause_before_repeat};
use crate::dial::Dialogue;
use crate::error::ClientError;
use crate::frames;

/// The longest first message that is sent along with an `OpenVm`. What the appliance has no room
/// for before the answer would keep us from reading the answer.
const MOST_BEHIND: usize = 64 << 10;

/// Whether a request whose connection was lost may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Nothing is done twice.
    Safe,
    /// It may have been done already.
    Unsafe,
}

impl Repeat {
    pub(crate) fn mark(self, error: ClientError) -> ClientError {
        match self {
            Self::Safe => error.repeatable(),
            Self::Unsafe => error,
        }
    }
}

/// One VM of an appliance. Nothing is asked before an operation is; a VM that is stopped is then
/// started.
///
/// ```no_run
/// # async fn example(client: client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let vm = client.vm("web".parse()?);
/// let health = vm.health().await?;
/// println!("{} MiB are free", health.memory_available_bytes >> 20);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Vm {
    client: Client,
    vm: VmRef,
}

impl Vm {
    pub(crate) fn new(client: Client, vm: VmRef) -> Self {
        Self { client, vm }
    }

    /// Which one.
    pub fn reference(&self) -> &VmRef {
        &self.vm
    }

    /// What the appliance knows of it.
    pub async fn info(&self) -> Result<VmInfo, ClientError> {
        self.client.get(self.vm.clone()).await
    }

    /// How it is connected: [`Client::network`].
    pub async fn network(&self) -> Result<NetworkInfo, ClientError> {
        self.client.network(self.vm.clone()).await
    }

    /// Changes that: [`Client::set_network`].
    pub async fn set_network(
        &self,
        egress: Option<Egress>,
        publication: Option<Publication>,
    ) -> Result<NetworkInfo, ClientError> {
        let vm = self.vm.clone();
        self.client.set_network(vm, egress, publication).await
    }

    /// A link that opens once: [`Client::create_link`].
    pub async fn create_link(&self) -> Result<LinkCreated, ClientError> {
        self.client.create_link(self.vm.clone()).await
    }

    /// How the machine does: load, memory, disk.
    pub async fn health(&self) -> Result<HealthReport, ClientError> {
        self.ask(&Health {}, Repeat::Safe).await
    }

    /// Connects to a TCP port of the VM's loopback interface.
    pub async fn dial(&self, port: u16) -> Result<Dialogue, ClientError> {
        let (mut replies, requests) = self.begin(&Dial { port }).await?;
        replies.answer::<Dialed>().await?;
        Ok(Dialogue::new(replies, requests))
    }

    /// Opens a stream to the VM's agent, starting the VM if it is stopped.
    pub async fn open(&self) -> Result<AgentStream, ClientError> {
        self.open_with(&[]).await
    }

    /// The same, with bytes for the agent sent along, which saves waiting for the answer first.
    async fn open_with(&self, behind: &[u8]) -> Result<AgentStream, ClientError> {
        let request = OpenVm {
            vm: self.vm.clone(),
        };
        let mut repeats = 0;
        loop {
            let error = match self.client.once::<_, Opened>(&request, behind).await {
                Ok((opened, (frames, place))) => {
                    let (io, before) = frames.into_parts();
                    return Ok(AgentStream {
                        opened,
                        io,
                        before,
                        place,
                    });
                }
                Err(error) => error,
            };
            let Some(pause) = pause_before_repeat(&error, repeats) else {
                return Err(match error {
                    // The agent may have got what was sent along.
                    ClientError::Lost { reason, .. } if !behind.is_empty() => {
                        ClientError::lost(reason)
                    }
                    other => other,
                });
            };
            tokio::time::sleep(pause).await;
            repeats = repeats.saturating_add(1);
        }
    }

    /// A stream on which a request was sent.
    pub(crate) async fn begin<Q: Message>(
        &self,
        request: &Q,
    ) -> Result<(Replies, Requests), ClientError> {
        let bytes = frames::encode(request)?;
        if bytes.len() <= MOST_BEHIND {
            return Ok(self.open_with(&bytes).await?.split());
        }
        let (replies, mut requests) = self.open().await?.split();
        requests.send_bytes(bytes).await?;
        Ok((replies, requests))
    }

    /// One request and its one answer.
    pub(crate) async fn ask<Q: Message, A: Message>(
        &self,
        request: &Q,
        repeat: Repeat,
    ) -> Result<A, ClientError> {
        let asked = async {
            let (mut replies, _requests) = self.begin(request).await?;
            replies.answer().await
        };
        asked.await.map_err(|error| repeat.mark(error))
    }
}
