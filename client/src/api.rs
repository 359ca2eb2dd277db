//! What an appliance can be asked: lifecycle requests, each on a stream of its own. A request that
//! failed for the appliance's own reasons, or because its VM went down just then, is repeated a few
//! times where the appliance says that it is safe; one whose connection was lost is not, but the next one connects again.

use std::sync::Arc;
use std::time::Duration;

use protocol::hello::Limits;
use protocol::id::{IdempotencyKey, VmId};
use protocol::network::{
    CreateLink, Egress, GetNetwork, LinkCreated, NetworkInfo, Publication, SetNetwork,
};
use protocol::vm::{
    Console, CreateVm, DeleteVm, Deleted, GetVm, ListVms, ReadConsole, StartVm, StopVm, VmInfo,
    VmPage, VmRef,
};
use protocol::{ErrorCode, Fault, Message, Retry};

use crate::agent::Io;
use crate::connection::Place;
use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::frames::{self, Frames};
use crate::link::Link;
use crate::trust::Trust;
use crate::vm::Vm;

/// How often a request is repeated.
const RETRIES: u32 = 5;

/// The longest pause before a repeated request, whatever the appliance asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A create request with a fresh key and nothing but defaults.
pub fn new_vm() -> Result<CreateVm, ClientError> {
    let mut key = [0; 16];
    getrandom::fill(&mut key).map_err(ClientError::Random)?;
    Ok(CreateVm {
        key: IdempotencyKey(key),
        template: None,
        name: None,
        cpus: None,
        memory_mib: None,
        disk_mib: None,
        labels: Vec::new(),
        env: Vec::new(),
        egress: Egress::default(),
        publication: Publication::default(),
    })
}

/// An appliance, over one connection that is made again when it was lost. Clones share it.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use client::{Client, Trust};
/// let client = Client::connect("unix:/run/supvm/api.sock".parse()?, "token".into(), Trust::none()).await?;
/// for vm in client.list().await? {
///     println!("{} is {:?}", vm.id, vm.state);
/// }
/// client.close().await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    link: Arc<Link>,
}

impl Client {
    /// Connects and is let in.
    pub async fn connect(
        endpoint: Endpoint,
        token: String,
        trust: Trust,
    ) -> Result<Self, ClientError> {
        let link = Arc::new(Link::new(endpoint, token, trust).await?);
        Ok(Self { link })
    }

    /// Ends the connection with a goodbye, for every clone, whatever is still under way on it. A
    /// client that is merely dropped says goodbye as well, if its runtime lives long enough.
    pub async fn close(self) {
        self.link.close().await;
    }

    /// What the appliance allows on a connection.
    pub fn limits(&self) -> Option<Limits> {
        self.link.limits()
    }

    /// Makes a VM and waits until it is ready. The request's key makes a repeat harmless.
    pub async fn create(&self, request: CreateVm) -> Result<VmInfo, ClientError> {
        self.request(&request).await
    }

    /// One VM.
    pub async fn get(&self, vm: VmRef) -> Result<VmInfo, ClientError> {
        self.request(&GetVm { vm }).await
    }

    /// One page of the VMs, those after `after`.
    pub async fn list_page(&self, after: Option<VmId>, limit: u16) -> Result<VmPage, ClientError> {
        self.request(&ListVms { after, limit }).await
    }

    /// All VMs, ordered by identifier.
    pub async fn list(&self) -> Result<Vec<VmInfo>, ClientError> {
        let mut all: Vec<VmInfo> = Vec::new();
        loop {
            let after = all.last().map(|vm| vm.id.clone());
            let page = self.list_page(after.clone(), 0).await?;
            // An appliance that turns in circles would keep us here for ever.
            let ordered = after
                .iter()
                .chain(page.vms.iter().map(|vm| &vm.id))
                .is_sorted_by(|one, next| one < next);
            if !ordered || (page.more && page.vms.is_empty()) {
                return Err(ClientError::Broken("the list is not in order".into()));
            }
            all.extend(page.vms);
            if !page.more {
                return Ok(all);
            }
        }
    }

    /// Stops a VM and waits until it is off.
    pub async fn stop(&self, vm: VmRef, deadline_ms: Option<u32>) -> Result<VmInfo, ClientError> {
        self.request(&StopVm { vm, deadline_ms }).await
    }

    /// Starts a VM and waits until it is ready.
    pub async fn start(&self, vm: VmRef) -> Result<VmInfo, ClientError> {
        self.request(&StartVm { vm }).await
    }

    /// The end of what a VM's kernel and agent said on its console, at most
    /// [`MAX_CONSOLE`](protocol::vm::MAX_CONSOLE) bytes. They are the guest's and may be anything.
    pub async fn console(&self, vm: VmRef) -> Result<Vec<u8>, ClientError> {
        let console: Console = self.request(&ReadConsole { vm }).await?;
        Ok(console.bytes)
    }

    /// How a VM is connected, and what was counted.
    pub async fn network(&self, vm: VmRef) -> Result<NetworkInfo, ClientError> {
        self.request(&GetNetwork { vm }).await
    }

    /// Changes how a VM is connected, at once and for good; none leaves that half as it is.
    /// Connections that are open go on, also where a rule would refuse them now; `offline` ends
    /// them.
    ///
    /// ```no_run
    /// # async fn example(client: client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use client::protocol::network::{Egress, RuleAction};
    /// let egress = Egress {
    ///     rules: vec![
    ///         client::parse_rule(RuleAction::Allow, "*.example.org:443/tcp")?,
    ///         client::parse_rule(RuleAction::Deny, "*")?,
    ///     ],
    ///     ..Egress::default()
    /// };
    /// client.set_network("web".parse()?, Some(egress), None).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn set_network(
        &self,
        vm: VmRef,
        egress: Option<Egress>,
        publication: Option<Publication>,
    ) -> Result<NetworkInfo, ClientError> {
        let request = SetNetwork {
            vm,
            egress,
            publication,
        };
        self.request(&request).await
    }

    /// Makes a link that lets one visitor in to a VM whose public address asks for a token
    /// ([`Publication::token`]). It opens once; the visitor's browser gets a cookie for it.
    pub async fn create_link(&self, vm: VmRef) -> Result<LinkCreated, ClientError> {
        self.request(&CreateLink { vm }).await
    }

    /// Deletes a VM and waits until nothing of it is left.
    pub async fn delete(&self, vm: VmRef) -> Result<(), ClientError> {
        let mut repeated = false;
        let result = self
            .repeating::<_, Deleted>(&DeleteVm { vm }, |_| repeated = true)
            .await;
        match result {
            Ok(_) => Ok(()),
            // The first attempt did it; only its answer was lost.
            Err(error) if repeated && error.code() == Some(ErrorCode::VmNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A VM to run commands in. Nothing is asked yet.
    pub fn vm(&self, vm: VmRef) -> Vm {
        Vm::new(self.clone(), vm)
    }

    async fn request<Q: Message, A: Message>(&self, request: &Q) -> Result<A, ClientError> {
        self.repeating(request, |_| ()).await
    }

    async fn repeating<Q: Message, A: Message>(
        &self,
        request: &Q,
        mut before_repeat: impl FnMut(&ClientError),
    ) -> Result<A, ClientError> {
        let mut repeats = 0;
        loop {
            let error = match self.once(request, &[]).await {
                Ok((answer, _)) => return Ok(answer),
                Err(error) => error,
            };
            let Some(pause) = pause_before_repeat(&error, repeats) else {
                return Err(error);
            };
            before_repeat(&error);
            tokio::time::sleep(pause).await;
            repeats = repeats.saturating_add(1);
        }
    }

    /// One request and its answer; the stream may be the agent's after that. `behind` is sent
    /// behind the request without waiting for the answer.
    pub(crate) async fn once<Q: Message, A: Message>(
        &self,
        request: &Q,
        behind: &[u8],
    ) -> Result<(A, (Frames<Io>, Place)), ClientError> {
        let mut bytes = frames::encode(request)?;
        bytes.extend_from_slice(behind);
        let mut stream = self.link.stream().await?;
        // Every request to the appliance may be repeated: a create has its key, and what is done
        // already is done.
        let lost = || ClientError::lost("its stream ended without an answer");
        if let Err(error) = frames::write_bytes(&mut stream.io, &bytes).await {
            return Err(stream.place.why(error).await.repeatable());
        }
        let mut frames = Frames::new(stream.io);
        match frames.next().await {
            Ok(Some(frame)) => Ok((protocol::decode(&frame)?, (frames, stream.place))),
            Ok(None) => Err(stream.place.why(lost()).await.repeatable()),
            Err(error) => Err(stream.place.why(error).await.repeatable()),
        }
    }
}

/// How long to wait before a repeat; none when there shall be none.
pub(crate) fn pause_before_repeat(error: &ClientError, repeats: u32) -> Option<Duration> {
    let ClientError::Refused(body) = error else {
        return None;
    };
    // Whoever asks for room that is not there should hear of it, not wait for it.
    let full = body.code == ErrorCode::NoCapacity;
    // A VM that went down in this moment, as one does that reboots itself, is started by the repeat.
    let passes = body.fault == Fault::Host || body.code == ErrorCode::VmStopped;
    if !passes || full || repeats >= RETRIES {
        return None;
    }
    match body.retry {
        Retry::Safe => Some(Duration::from_millis(50).saturating_mul(1_u32 << repeats.min(6))),
        Retry::AfterMs => {
            Some(Duration::from_millis(body.retry_after_ms.into()).min(LONGEST_PAUSE))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use protocol::ErrorBody;

    use super::*;

    #[test]
    fn the_appliances_own_faults_and_a_vm_that_went_down_are_repeated_where_it_is_safe() {
        let host = ErrorBody::host(ErrorCode::Unavailable, "x");
        let pause = |body: &ErrorBody, repeats| {
            pause_before_repeat(&ClientError::Refused(body.clone()), repeats)
        };
        assert!(pause(&host, 0).is_none());
        assert!(pause(&host.clone().retryable(), 0).is_some());
        assert!(pause(&host.clone().retryable(), RETRIES).is_none());
        let for_ever = host.retryable_after_ms(u32::MAX);
        assert_eq!(pause(&for_ever, 1), Some(LONGEST_PAUSE));
        let full = ErrorBody::host(ErrorCode::NoCapacity, "x").retryable_after_ms(1);
        assert!(pause(&full, 0).is_none());
        let caller = ErrorBody::caller(ErrorCode::Busy, "x").retryable();
        assert!(pause(&caller, 0).is_none());
        let went_down = ErrorBody::guest(ErrorCode::VmStopped, "x");
        assert!(pause(&went_down, 0).is_none());
        let went_down = went_down.retryable_after_ms(1);
        assert!(pause(&went_down, 0).is_some());
        assert!(pause(&went_down, RETRIES).is_none());
        assert!(pause_before_repeat(&ClientError::AgentGone, 0).is_none());
    }
}
