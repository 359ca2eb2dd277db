//! An appliance made of the real proxy, with the test playing control and the agents.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

pub(crate) mod program;
pub(crate) mod real;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use client::protocol::hello::{GENERATION, HelloOk, Limits};
use client::protocol::host::proxy::{ApiReply, ApiRequest, Serve, Serving};
use client::protocol::process::{ProcessEnd, ProcessEnded, ProcessStarted, StartProcess};
use client::protocol::vm::{EndReason, Opened, VmInfo, VmState};
use client::protocol::{self, ErrorBody, ErrorCode, Frame, FrameReader, Kind, Message, frame};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use proxy::channel::Channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub(crate) const TOKEN: &str = "secret";
pub(crate) const VM: &str = "vm-0000abcd";

/// What control does with a request.
pub(crate) enum Reply {
    Message(Kind, Vec<u8>),
    /// Opens a stream to the scripted [`agent`].
    Agent,
    /// Passes this socket on.
    Stream(OwnedFd),
}

impl Reply {
    pub(crate) fn message<M: Message>(message: &M) -> Self {
        Self::Message(M::KIND, protocol::message::encode_body(message).unwrap())
    }

    pub(crate) fn error(code: ErrorCode, message: &str) -> Self {
        Self::message(&ErrorBody::caller(code, message))
    }
}

pub(crate) struct Appliance {
    pub(crate) dir: tempfile::TempDir,
    /// Of the API over TLS.
    pub(crate) address: String,
    /// The certificate authority.
    pub(crate) ca: Vec<u8>,
    pub(crate) ca_pem: String,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Appliance {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Appliance {
    /// Control answers as `script` says; it greets by itself.
    pub(crate) async fn start(
        max_streams: u32,
        mut script: impl FnMut(&ApiRequest) -> Reply + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let listening = seqpacket(&path);
        let api = std::os::unix::net::UnixListener::bind(dir.path().join("api")).unwrap();
        let proxy = tokio::spawn(async move {
            proxy::serve(listening, api.into()).await.unwrap();
        });
        let control = Channel::connect(&path).unwrap();
        let (ca, ca_pem, certificates, key) = certificates();
        let serve = Serve {
            api_address: "127.0.0.1:0".into(),
            certificates,
            key,
            max_streams,
            max_connections: 32,
            edge: protocol::host::proxy::ServeEdge::default(),
            gateway: protocol::host::proxy::ServeGateway::default(),
        };
        control.send(&serve, &[]).await.unwrap();
        let packet = control.receive().await.unwrap().unwrap();
        let serving: Serving = protocol::decode(&packet.frame).unwrap();
        let control = tokio::spawn(async move {
            while let Some(packet) = control.receive().await.unwrap() {
                if packet.frame.kind == Kind::API_REQUEST {
                    let request: ApiRequest = protocol::decode(&packet.frame).unwrap();
                    let reply = if request.token != TOKEN {
                        Reply::error(ErrorCode::Unauthenticated, "the token is wrong")
                    } else if Kind(request.kind) == Kind::HELLO {
                        Reply::message(&hello_ok(max_streams))
                    } else {
                        script(&request)
                    };
                    answer(&control, &request, reply).await;
                }
            }
        });
        Self {
            dir,
            address: serving.api_address,
            ca,
            ca_pem,
            tasks: vec![proxy, control],
        }
    }

    pub(crate) fn unix(&self) -> String {
        format!("unix:{}", self.dir.path().join("api").display())
    }

    /// The TLS endpoint by a name that only the client itself can resolve.
    pub(crate) fn tls(&self) -> String {
        let port = self.address.rsplit_once(':').unwrap().1;
        format!("https://supvm.localhost:{port}")
    }
}

async fn answer(control: &Channel, request: &ApiRequest, reply: Reply) {
    let opened = || {
        Reply::message(&Opened {
            id: VM.parse().unwrap(),
            generation: 1,
        })
    };
    let (message, stream) = match reply {
        Reply::Agent => {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            tokio::spawn(agent(UnixStream::from_std(ours).unwrap()));
            (opened(), Some(theirs.into()))
        }
        Reply::Stream(stream) => (opened(), Some(stream)),
        message => (message, None),
    };
    let Reply::Message(kind, body) = message else {
        unreachable!("made above");
    };
    let reply = ApiReply {
        ticket: request.ticket,
        kind: kind.0,
        body,
    };
    let descriptors: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
    control.send(&reply, &descriptors).await.unwrap();
}

fn seqpacket(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&socket, Backlog::new(8).unwrap()).unwrap();
    socket
}

/// An authority, the same as PEM, the chain and the key of `supvm.localhost`.
pub(crate) fn certificates() -> (Vec<u8>, String, Vec<Vec<u8>>, Vec<u8>) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["supvm.localhost".into()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let der = ca_certificate.der().to_vec();
    let chain = vec![leaf.der().to_vec(), der.clone()];
    (der, ca_certificate.pem(), chain, key.serialize_der())
}

pub(crate) fn hello_ok(max_streams: u32) -> HelloOk {
    HelloOk {
        generation: GENERATION,
        limits: Limits {
            max_streams,
            max_body: frame::MAX_BODY as u32,
            max_cpus: 2,
            max_memory_mib: 2048,
            max_disk_mib: 20480,
        },
    }
}

pub(crate) fn info(id: &str) -> VmInfo {
    VmInfo {
        id: id.parse().unwrap(),
        name: Some("web".parse().unwrap()),
        state: VmState::Running,
        end_reason: EndReason::None,
        end_message: String::new(),
        template: "debian".parse().unwrap(),
        template_version: "13.1".parse().unwrap(),
        cpus: 2,
        memory_mib: 1024,
        disk_mib: 10240,
        labels: vec![("team".into(), "a".into())],
        created_unix_ms: 1,
        generation: 1,
        subdomain: "a".repeat(20).parse().unwrap(),
        url: "https://x".into(),
    }
}

/// An agent whose only command is its own script: the first argument says what to do.
pub(crate) async fn agent(mut stream: UnixStream) {
    let mut reader = FrameReader::new();
    let mut rest = Vec::new();
    let Some(start) = next(&mut stream, &mut reader, &mut rest).await else {
        return;
    };
    let start: StartProcess = protocol::decode(&start).unwrap();
    let words: Vec<String> = start
        .command
        .iter()
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut out = Vec::new();
    let started = protocol::encode(&ProcessStarted { pid: 7 }).unwrap();
    out.extend_from_slice(&started);
    match words[..] {
        ["echo", text] => {
            frame::append(&mut out, Kind::STDOUT, text.as_bytes()).unwrap();
            frame::append(&mut out, Kind::STDERR, b"to stderr").unwrap();
            append(&mut out, &exited(0));
        }
        ["exit", code] => append(&mut out, &exited(code.parse().unwrap())),
        ["missing"] => {
            // Never started.
            out.clear();
            let ended = ProcessEnded {
                end: ProcessEnd::NotFound,
                message: "not found: missing".into(),
                ..exited(127)
            };
            append(&mut out, &ended);
        }
        ["segfault"] => {
            let ended = ProcessEnded {
                end: ProcessEnd::Signalled,
                signal: 11,
                message: "killed by signal SIGSEGV".into(),
                ..exited(139)
            };
            append(&mut out, &ended);
        }
        ["cat"] => {
            stream.write_all(&out).await.unwrap();
            out.clear();
            loop {
                let frame = next(&mut stream, &mut reader, &mut rest).await.unwrap();
                if frame.kind == Kind::STDIN_END {
                    break;
                }
                assert_eq!(frame.kind, Kind::STDIN);
                let mut back = Vec::new();
                frame::append(&mut back, Kind::STDOUT, &frame.body).unwrap();
                stream.write_all(&back).await.unwrap();
            }
            append(&mut out, &exited(0));
        }
        ["until-signal"] => {
            frame::append(&mut out, Kind::STDOUT, b"ready\n").unwrap();
            stream.write_all(&out).await.unwrap();
            out.clear();
            loop {
                let frame = next(&mut stream, &mut reader, &mut rest).await.unwrap();
                if frame.kind == Kind::SIGNAL_PROCESS {
                    append(&mut out, &exited(128 + frame.body[0]));
                    break;
                }
            }
        }
        ["env", key] => {
            let value = start
                .env
                .iter()
                .find(|(name, _)| name == key.as_bytes())
                .and_then(|(_, value)| value.clone())
                .unwrap();
            frame::append(&mut out, Kind::STDOUT, &value).unwrap();
            frame::append(&mut out, Kind::STDOUT, &start.cwd).unwrap();
            append(&mut out, &exited(0));
        }
        ["vanish"] => frame::append(&mut out, Kind::STDOUT, b"half").unwrap(),
        ["vanish-inside-a-frame"] => out.extend_from_slice(&[9, 0, 0, 0, 4]),
        ["output-before-start"] => {
            out.clear();
            frame::append(&mut out, Kind::STDOUT, b"early").unwrap();
        }
        ["giant-frame"] => out.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 4, 2, 0]),
        ["garbage-end"] => frame::append(&mut out, Kind::PROCESS_ENDED, &[0xff; 9]).unwrap(),
        ["refuse"] => {
            out.clear();
            append(
                &mut out,
                &ErrorBody::guest(ErrorCode::NotConfigured, "wait\x1b[2J")
                    .with_detail("line one\nline two"),
            );
        }
        ["newer-kinds"] => {
            frame::append(&mut out, Kind(0x02ff), b"from the future").unwrap();
            append(&mut out, &exited(3));
        }
        ref other => unreachable!("no such script: {other:?}"),
    }
    stream.write_all(&out).await.unwrap();
}

fn append<M: Message>(out: &mut Vec<u8>, message: &M) {
    out.extend_from_slice(&protocol::encode(message).unwrap());
}

fn exited(exit_code: u8) -> ProcessEnded {
    ProcessEnded {
        end: ProcessEnd::Exited,
        exit_code,
        signal: 0,
        output_open: false,
        message: String::new(),
    }
}

async fn next(
    stream: &mut UnixStream,
    reader: &mut FrameReader,
    rest: &mut Vec<u8>,
) -> Option<Frame> {
    loop {
        let mut unread = &rest[..];
        let frame = reader.push(&mut unread).unwrap();
        *rest = unread.to_vec();
        if frame.is_some() {
            return frame;
        }
        let mut buffer = vec![0; 65536];
        match stream.read(&mut buffer).await {
            Ok(count) if count > 0 => rest.extend_from_slice(&buffer[..count]),
            _ => return None,
        }
    }
}
