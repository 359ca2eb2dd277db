//! Control and proxy. Proxy listens on the socket it was started with; control connects and tells
//! it what to serve. Proxy passes the requests of clients on, each with the client's token, because
//! control checks tokens and proxy keeps nothing. While no control is there, requests wait.
//!
//! For each running VM control hands proxy the other end of the VM's frame channel. Requests at
//! public addresses whose VM proxy does not have become a [`LookUp`] and, once the visitor may come in,
//! a [`Wake`].

use serde::{Deserialize, Serialize};

use crate::frame::Kind;
use crate::id::{Subdomain, VmId};
use crate::message::messages;
use crate::network::{Egress, NetworkCounters, Publication, Rule};

/// Kinds of this module.
impl Kind {
    /// [`Serve`], control to proxy, answered by [`Kind::SERVING`].
    pub const SERVE: Self = Self(0x8300);
    /// [`Serving`].
    pub const SERVING: Self = Self(0x8301);
    /// [`ApiRequest`], proxy to control.
    pub const API_REQUEST: Self = Self(0x8302);
    /// [`ApiReply`], control to proxy.
    pub const API_REPLY: Self = Self(0x8303);
    /// [`ApiAbandoned`], proxy to control.
    pub const API_ABANDONED: Self = Self(0x8304);
    /// [`AttachVm`], control to proxy, unanswered.
    pub const ATTACH_VM: Self = Self(0x8305);
    /// [`UpdateVm`], control to proxy, unanswered.
    pub const UPDATE_VM: Self = Self(0x8306);
    /// [`DetachVm`], control to proxy, unanswered.
    pub const DETACH_VM: Self = Self(0x8307);
    /// [`EdgeRequest`], proxy to control, answered by [`Kind::API_REPLY`].
    pub const EDGE_REQUEST: Self = Self(0x8308);
    /// [`Wake`], in an [`EdgeRequest`], answered by [`Kind::AWAKE`].
    pub const WAKE: Self = Self(0x8309);
    /// [`Awake`].
    pub const AWAKE: Self = Self(0x830a);
    /// [`DialAgent`], in an [`EdgeRequest`], answered by [`Kind::OPENED`] with a descriptor.
    pub const DIAL_AGENT: Self = Self(0x830b);
    /// [`Count`], control to proxy, answered by [`Kind::COUNTED`].
    pub const COUNT: Self = Self(0x830c);
    /// [`Counted`].
    pub const COUNTED: Self = Self(0x830d);
    /// [`ListAttached`], control to proxy, answered by [`Kind::ATTACHED`].
    pub const LIST_ATTACHED: Self = Self(0x830e);
    /// [`Attached`].
    pub const ATTACHED: Self = Self(0x830f);
    /// [`FramesLost`], proxy to control, unanswered.
    pub const FRAMES_LOST: Self = Self(0x8310);
    /// [`OrderCertificate`], control to proxy, answered by [`Kind::CERTIFICATE_ORDERED`].
    pub const ORDER_CERTIFICATE: Self = Self(0x8311);
    /// [`CertificateOrdered`].
    pub const CERTIFICATE_ORDERED: Self = Self(0x8312);
    /// [`LookUp`], in an [`EdgeRequest`], answered by [`Kind::LOOKED_UP`].
    pub const LOOK_UP: Self = Self(0x8318);
    /// [`LookedUp`].
    pub const LOOKED_UP: Self = Self(0x8319);
    /// [`AdmitLink`], control to proxy, unanswered.
    pub const ADMIT_LINK: Self = Self(0x831a);
}

/// The names of the descriptors that proxy is started with.
pub mod descriptor {
    /// Its listening control socket (`SOCK_SEQPACKET`).
    pub const LISTEN: &str = "listen";
    /// The API's listening Unix stream socket.
    pub const API: &str = "api";
}

/// What to serve. Sent again, it replaces what was said before without ending connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serve {
    /// Address and port for the API over TLS, such as `[::]:7443`; empty for none.
    pub api_address: String,
    /// The certificate chain to show, leaf first, each in DER.
    pub certificates: Vec<Vec<u8>>,
    /// The leaf's private key, PKCS #8 in DER.
    pub key: Vec<u8>,
    /// Streams that one connection may have open.
    pub max_streams: u32,
    /// Connections at the same time, over all clients.
    pub max_connections: u32,
    /// What the edge serves.
    pub edge: ServeEdge,
    /// What VMs reach the world by.
    pub gateway: ServeGateway,
}

/// What the edge serves. It shows the same certificate as the API, where there is no other for a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeEdge {
    /// Address and port of the VMs' public addresses over TLS; empty for none.
    pub https_address: String,
    /// Address and port for plain HTTP, which is redirected; empty for none.
    pub http_address: String,
    /// The domain below which VMs have their names.
    pub domain: String,
    /// The port in redirects, where it is not 443.
    pub public_port: u16,
    /// The certificate of the built-in authority in DER, to be downloaded; empty when nothing that
    /// is shown comes from it.
    pub authority: Vec<u8>,
    /// Certificates of single names.
    pub named: Vec<NamedCertificate>,
    /// Names beside the domain that lead to VMs.
    pub custom: Vec<CustomDomain>,
}

/// A name of the operator's own that leads to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomDomain {
    /// The name, in lower case.
    pub name: String,
    /// The label of the VM's public address.
    pub subdomain: Subdomain,
    /// The port in the VM.
    pub port: u16,
}

/// What is shown to who asks for one name, and to nobody else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedCertificate {
    /// The name.
    pub name: String,
    /// The chain, leaf first, each in DER.
    pub certificates: Vec<Vec<u8>>,
    /// The leaf's private key, PKCS #8 in DER.
    pub key: Vec<u8>,
}

/// What VMs reach the world by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeGateway {
    /// Addresses and ports of name servers, such as `192.0.2.1:53`, in the order of preference.
    pub name_servers: Vec<String>,
    /// Rules that come before those of each VM.
    pub rules: Vec<Rule>,
    /// Connections and flows of one VM, where it has no limit of its own.
    pub max_connections: u32,
}

/// Answer to [`Serve`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// Where the API listens, with the actual port; empty for nowhere.
    pub api_address: String,
    /// Where the edge listens for TLS and for plain HTTP, likewise.
    pub https_address: String,
    /// See there.
    pub http_address: String,
    /// What does not listen and why; empty when all is well.
    pub message: String,
}

/// A client's request. `Hello` comes this way too; control answers it like any other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiRequest {
    /// Chosen by proxy, given back in the answer.
    pub ticket: u64,
    /// What the client's `Hello` said.
    pub token: String,
    /// The frame's kind.
    pub kind: u16,
    /// The frame's body, at most [`MAX_REQUEST`](crate::vm::MAX_REQUEST) bytes.
    pub body: Vec<u8>,
}

/// The answer. When its kind is `OPENED` it carries one descriptor: the stream to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiReply {
    /// The request's.
    pub ticket: u64,
    /// The answer's kind.
    pub kind: u16,
    /// The answer's body.
    pub body: Vec<u8>,
}

/// The client went away before the answer: nobody waits for it any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiAbandoned {
    /// The request's.
    pub ticket: u64,
}

/// A VM runs: this is its network. Carries one descriptor, proxy's end of the frame channel; a
/// VM that is attached already gets a new stack in place of the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachVm {
    /// Which VM.
    pub vm: VmId,
    /// Which of its starts.
    pub generation: u64,
    /// The name it has in itself.
    pub hostname: String,
    /// The label of its public address.
    pub subdomain: Subdomain,
    /// What it may reach.
    pub egress: Egress,
    /// How it can be reached.
    pub publication: Publication,
}

/// An attached VM's settings changed. One that is not attached is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateVm {
    /// Which VM.
    pub vm: VmId,
    /// What it may reach.
    pub egress: Egress,
    /// How it can be reached.
    pub publication: Publication,
}

/// This start of a VM has ended: nothing of its network is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachVm {
    /// Which VM.
    pub vm: VmId,
    /// Which of its starts; an older one than the attached is ignored.
    pub generation: u64,
}

/// Whoever opens a link with this secret is let in, once. It is sent before the answer that tells
/// the link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmitLink {
    /// The label of the public address.
    pub subdomain: Subdomain,
    /// The BLAKE3 hash of the secret.
    pub secret: [u8; 32],
    /// The hash of the token that the VM has now; when it changes, the link is worth nothing.
    pub token: [u8; 32],
    /// Seconds for which it can be opened.
    pub lifetime_s: u32,
}

/// What the edge wants. No client can send it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeRequest {
    /// Chosen by proxy among the same numbers as an [`ApiRequest`]'s, given back in the answer.
    pub ticket: u64,
    /// [`Kind::LOOK_UP`], [`Kind::WAKE`] or [`Kind::DIAL_AGENT`].
    pub kind: u16,
    /// The body of that.
    pub body: Vec<u8>,
}

/// Asks how a VM can be reached whose network proxy does not have, before anything is done for the
/// visitor. It starts nothing. A label that is nobody's is refused with `VmNotFound`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookUp {
    /// The address's label.
    pub subdomain: Subdomain,
}

/// Answer to [`LookUp`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookedUp {
    /// Who may come in.
    pub publication: Publication,
}

/// Somebody who may come in asks for a public address. A VM that is stopped is started, unless its owner turned
/// that off (`VmStopped`); a label that is nobody's is refused with `VmNotFound`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// The address's label.
    pub subdomain: Subdomain,
}

/// Answer to [`Wake`]: the VM is up, and its [`AttachVm`] was sent before this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awake {
    /// Which VM.
    pub vm: VmId,
    /// Which of its starts.
    pub generation: u64,
}

/// Asks for a stream to the agent of a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialAgent {
    /// Which VM.
    pub vm: VmId,
}

/// Asks what was counted for a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Chosen by control, given back in the answer.
    pub ticket: u64,
    /// Which VM.
    pub vm: VmId,
}

/// Answer to [`Count`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// The [`Count`]'s.
    pub ticket: u64,
    /// None for a VM that is not attached.
    pub counters: Option<NetworkCounters>,
}

/// Asks which VMs proxy has, in the order of their identifiers, a page at a time. A control that is
/// new asks first: what it finds keeps its frame channel, and no connection of a guest is cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListAttached {
    /// Begin after this one; none means at the beginning.
    pub after: Option<VmId>,
}

/// Answer to [`ListAttached`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Each with the start that was attached.
    pub vms: Vec<(VmId, u64)>,
    /// There are more after the last one here.
    pub more: bool,
}

/// A VM's frame channel or its stack has failed; it stays attached. Control makes a new channel
/// and attaches it, as long as this start of the VM goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FramesLost {
    /// Which VM.
    pub vm: VmId,
    /// Which of its starts.
    pub generation: u64,
}

/// Asks for a certificate at an authority that speaks ACME. The names are proved by DNS-01: TXT
/// records are set by dynamic updates (RFC 2136) signed with TSIG, HMAC-SHA256, and removed at the
/// end. Where there is no name server for that, they are proved by TLS-ALPN-01 (RFC 8737), which the
/// edge answers. Authorities publish names, so one of a VM is refused. Control keeps the keys on
/// disk; proxy forgets these with the order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderCertificate {
    /// Chosen by control, given back in the answer.
    pub ticket: u64,
    /// The authority's directory, an `https` address.
    pub directory: String,
    /// Whom the authority writes to, such as `mailto:admin@example.org`; empty for nobody.
    pub contact: String,
    /// The account's private key, ECDSA P-256, PKCS #8 in DER. The account is made when there is
    /// none for it; the authority's terms of service are agreed to.
    pub account_key: Vec<u8>,
    /// The names, such as `example.org` and `*.example.org`.
    pub names: Vec<String>,
    /// The certificate request for these names (PKCS #10) in DER.
    pub request: Vec<u8>,
    /// Address and port of the name server that takes updates; empty for TLS-ALPN-01.
    pub update_server: String,
    /// The zone that is updated.
    pub zone: String,
    /// The name of the TSIG key.
    pub key_name: String,
    /// The TSIG key.
    pub key_secret: Vec<u8>,
    /// Seconds between the update and the authority's look at it.
    pub propagation_s: u16,
    /// Whom to ask for the authority's address.
    pub name_servers: Vec<String>,
    /// Certificates in DER that the authority's own has to come from; none for those of the web.
    pub roots: Vec<Vec<u8>>,
}

/// Answer to [`OrderCertificate`], minutes later. An order ends with the line to control: the next
/// control orders again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateOrdered {
    /// The [`OrderCertificate`]'s.
    pub ticket: u64,
    /// The chain in PEM, leaf first; empty when there is none.
    pub chain: String,
    /// Why there is none; empty when there is one.
    pub message: String,
}

messages! {
    SERVE => Serve,
    SERVING => Serving,
    API_REQUEST => ApiRequest,
    API_REPLY => ApiReply,
    API_ABANDONED => ApiAbandoned,
    ATTACH_VM => AttachVm,
    UPDATE_VM => UpdateVm,
    DETACH_VM => DetachVm,
    EDGE_REQUEST => EdgeRequest,
    LOOK_UP => LookUp,
    LOOKED_UP => LookedUp,
    ADMIT_LINK => AdmitLink,
    WAKE => Wake,
    AWAKE => Awake,
    DIAL_AGENT => DialAgent,
    COUNT => Count,
    COUNTED => Counted,
    LIST_ATTACHED => ListAttached,
    ATTACHED => Attached,
    FRAMES_LOST => FramesLost,
    ORDER_CERTIFICATE => OrderCertificate,
    CERTIFICATE_ORDERED => CertificateOrdered,
}
