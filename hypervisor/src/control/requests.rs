//! What clients ask: each request is authenticated, decoded, and answered by one message or one
//! error. Waiting for an answer can be given up at any time; what was begun is finished all the
//! same, because VMs' tasks do it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use protocol::frame::MAX_BODY;
use protocol::hello::{GENERATION, Hello, HelloOk, Limits};
use protocol::host::proxy::{ApiRequest, Awake, DialAgent, EdgeRequest, LookUp, LookedUp, Wake};
use protocol::id::{Owner, Subdomain, VmId};
use protocol::message::{decode_body, encode_body};
use protocol::network::{CreateLink, GetNetwork, NetworkCounters, NetworkInfo, SetNetwork};
use protocol::vm::{
    Console, CreateVm, DeleteVm, Deleted, GetVm, ListVms, MAX_CONSOLE, MAX_REQUEST, OpenVm, Opened,
    ReadConsole, StartVm, StopVm, VmState,
};
use protocol::{ErrorBody, ErrorCode, Kind, Message};
use proxy::Quiet;

use super::create::check_egress;
use super::links;
use super::registry::Registry;
use super::tokens::Tokens;
use super::vm::{Command, Host, OpenedStream, View, VmHandle, not_found};

/// How long a stop waits when the request does not say.
const STOP: Duration = Duration::from_secs(30);

/// Answers requests.
pub(crate) struct Requests {
    pub(crate) host: Arc<Host>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) tokens: Tokens,
}

/// An answer's frame, and for `OPENED` the stream.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) kind: Kind,
    pub(crate) body: Vec<u8>,
    pub(crate) stream: Option<OwnedFd>,
}

impl Answer {
    fn of<M: Message>(message: &M) -> Result<Self, ErrorBody> {
        Ok(Self {
            kind: M::KIND,
            body: encode_body(message)?,
            stream: None,
        })
    }

    /// The answer that says what went wrong.
    pub(crate) fn error(error: &ErrorBody) -> Self {
        Self {
            kind: Kind::ERROR,
            // An error is text and numbers: it can be encoded.
            body: encode_body(error).unwrap_or_default(),
            stream: None,
        }
    }
}

/// Strangers and impatient clients must not fill the log.
fn log_refusal(kind: Kind, error: &ErrorBody) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(
            %kind,
            code = ?error.code,
            // Escaped: a client's own text may be in it.
            error = ?error.message,
            left_out,
            "request refused"
        );
    }
}

impl Requests {
    /// Answers one request.
    pub(crate) async fn answer(&self, request: &ApiRequest) -> Answer {
        match self.try_answer(request).await {
            Ok(answer) => answer,
            Err(error) => {
                log_refusal(Kind(request.kind), &error);
                Answer::error(&error)
            }
        }
    }

    async fn try_answer(&self, request: &ApiRequest) -> Result<Answer, ErrorBody> {
        let owner = self.tokens.owner(&request.token).ok_or_else(|| {
            ErrorBody::caller(
                ErrorCode::Unauthenticated,
                "the token is not known here; check SUP_TOKEN",
            )
        })?;
        if request.body.len() > MAX_REQUEST {
            return Err(ErrorBody::caller(
                ErrorCode::FrameTooLarge,
                format!(
                    "the request has {} bytes; at most {MAX_REQUEST} are allowed",
                    request.body.len()
                ),
            ));
        }
        let body = request.body.as_slice();
        match Kind(request.kind) {
            Kind::HELLO => self.hello(&decode_body(body)?),
            Kind::CREATE_VM => {
                let create: CreateVm = decode_body(body)?;
                Answer::of(&self.registry.create(owner, create).await?)
            }
            Kind::GET_VM => {
                let GetVm { vm } = decode_body(body)?;
                let view = self.registry.find(owner, &vm)?.view.borrow().clone();
                self.vm(&view)
            }
            Kind::LIST_VMS => {
                let ListVms { after, limit } = decode_body(body)?;
                Answer::of(&self.registry.list(owner, after.as_ref(), limit))
            }
            Kind::START_VM => {
                let StartVm { vm } = decode_body(body)?;
                let handle = self.registry.find(owner, &vm)?;
                self.vm(&handle.ask(Command::Start).await?)
            }
            Kind::STOP_VM => {
                let StopVm { vm, deadline_ms } = decode_body(body)?;
                let handle = self.registry.find(owner, &vm)?;
                let deadline = deadline_ms.map_or(STOP, |ms| Duration::from_millis(ms.into()));
                self.vm(&handle
                    .ask(|reply| Command::Stop { deadline, reply })
                    .await?)
            }
            Kind::DELETE_VM => {
                let DeleteVm { vm } = decode_body(body)?;
                let handle = self.registry.find(owner, &vm)?;
                handle.ask(Command::Delete).await?;
                Answer::of(&Deleted { id: handle.id })
            }
            Kind::READ_CONSOLE => {
                let ReadConsole { vm } = decode_body(body)?;
                let id = self.registry.find(owner, &vm)?.id;
                let limit = u64::try_from(MAX_CONSOLE).unwrap_or(u64::MAX);
                let read = move |host: &Host| Ok(host.store.console_tail(&id, limit));
                let bytes = self.host.blocking(read).await?;
                Answer::of(&Console { bytes })
            }
            Kind::GET_NETWORK => {
                let GetNetwork { vm } = decode_body(body)?;
                let view = self.registry.find(owner, &vm)?.view.borrow().clone();
                self.network(&view).await
            }
            Kind::SET_NETWORK => {
                let SetNetwork {
                    vm,
                    egress,
                    publication,
                } = decode_body(body)?;
                let handle = self.registry.find(owner, &vm)?;
                if let Some(egress) = &egress {
                    check_egress(egress)?;
                }
                let set = |reply| Command::SetNetwork {
                    egress,
                    publication,
                    reply,
                };
                let view = handle.ask(set).await?;
                self.network(&view).await
            }
            Kind::CREATE_LINK => {
                let CreateLink { vm } = decode_body(body)?;
                let view = self.registry.find(owner, &vm)?.view.borrow().clone();
                Answer::of(&links::create(&self.host, &view).await?)
            }
            Kind::OPEN_VM => self.open(owner, &decode_body(body)?).await,
            kind => Err(ErrorBody::caller(
                ErrorCode::Unsupported,
                format!(
                    "kind {kind} is not known here; this is supvm {}",
                    env!("CARGO_PKG_VERSION")
                ),
            )),
        }
    }

    /// Answers what the edge asks.
    pub(crate) async fn answer_edge(&self, request: &EdgeRequest) -> Answer {
        let answer = match Kind(request.kind) {
            Kind::LOOK_UP => self.look_up(&request.body),
            Kind::WAKE => self.wake(&request.body).await,
            Kind::DIAL_AGENT => self.dial(&request.body).await,
            kind => Err(ErrorBody::caller(
                ErrorCode::Unsupported,
                format!("the edge asks with kind {kind}, which is not known here"),
            )),
        };
        answer.unwrap_or_else(|error| {
            log_refusal(Kind(request.kind), &error);
            Answer::error(&error)
        })
    }

    /// Says who may come in at an address; whoever may not must not start its VM.
    fn look_up(&self, body: &[u8]) -> Result<Answer, ErrorBody> {
        let LookUp { subdomain } = decode_body(body)?;
        let handle = self.published(&subdomain)?;
        let publication = handle.view.borrow().record.publication.clone();
        Answer::of(&LookedUp { publication })
    }

    fn published(&self, subdomain: &Subdomain) -> Result<VmHandle, ErrorBody> {
        self.registry.published(subdomain).ok_or_else(|| {
            ErrorBody::caller(ErrorCode::VmNotFound, "there is no VM at this address")
        })
    }

    async fn wake(&self, body: &[u8]) -> Result<Answer, ErrorBody> {
        let Wake { subdomain } = decode_body(body)?;
        let handle = self.published(&subdomain)?;
        let view = handle.ask(Command::Wake).await?;
        let generation = view.record.generation;
        if !self.host.frames.is_attached(&handle.id, generation) {
            return Err(ErrorBody::host(
                ErrorCode::Unavailable,
                format!("{} runs, but its network could not be connected", handle.id),
            )
            .retryable_after_ms(500));
        }
        Answer::of(&Awake {
            vm: handle.id,
            generation,
        })
    }

    async fn dial(&self, body: &[u8]) -> Result<Answer, ErrorBody> {
        let DialAgent { vm } = decode_body(body)?;
        let handle = self
            .registry
            .get(&vm)
            .ok_or_else(|| not_found(vm.as_str()))?;
        opened(handle.id.clone(), handle.ask(Command::Dial).await?)
    }

    async fn network(&self, view: &View) -> Result<Answer, ErrorBody> {
        let counters = match view.state {
            VmState::Running => self.host.frames.count(&view.record.id).await,
            _ => NetworkCounters::default(),
        };
        Answer::of(&NetworkInfo {
            egress: view.record.egress.clone(),
            publication: view.record.publication.clone(),
            counters,
        })
    }

    fn hello(&self, hello: &Hello) -> Result<Answer, ErrorBody> {
        if hello.generation == 0 {
            return Err(ErrorBody::caller(
                ErrorCode::GenerationUnsupported,
                format!("generation 0 is not served; this supvm speaks {GENERATION}"),
            ));
        }
        let limits = self.host.settings.limits;
        Answer::of(&HelloOk {
            generation: hello.generation.min(GENERATION),
            limits: Limits {
                max_streams: self.host.settings.api.max_streams,
                max_body: u32::try_from(MAX_BODY).unwrap_or(u32::MAX),
                max_cpus: limits.max_cpus,
                max_memory_mib: limits.max_memory_mib,
                max_disk_mib: limits.max_disk_mib,
            },
        })
    }

    fn vm(&self, view: &View) -> Result<Answer, ErrorBody> {
        Answer::of(&view.info(&self.host.settings))
    }

    async fn open(&self, owner: &Owner, open: &OpenVm) -> Result<Answer, ErrorBody> {
        let handle = self.registry.find(owner, &open.vm)?;
        opened(handle.id.clone(), handle.ask(Command::Open).await?)
    }
}

fn opened(id: VmId, opened: OpenedStream) -> Result<Answer, ErrorBody> {
    let mut answer = Answer::of(&Opened {
        id,
        generation: opened.generation,
    })?;
    answer.stream = Some(opened.stream);
    Ok(answer)
}
