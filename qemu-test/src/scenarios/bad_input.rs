//! What nobody should send. Each line of it gives its sender a named error, or a closed connection
//! where there is nobody to name it to, and leaves everybody else alone.

use client::{ClientError, Command};
use protocol::frame::{Header, MAX_BODY};
use protocol::id::ProcessId;
use protocol::process::{CommandMode, OutputMode, ProcessEnd, StartProcess, StdinMode};
use protocol::vm::{GetVm, OpenVm, VmInfo, VmRef};
use protocol::{ErrorCode, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::wire::{self, Wire};
use super::{Context, Failure, ensure, refused};
use crate::vm;

/// Nobody was harmed: the connection from before still works, and so does a new one.
async fn unharmed(context: &Context) -> Result<(), Failure> {
    context.client.list().await?;
    context.appliance.client().await?.list().await?;
    Ok(())
}

fn unknown() -> Result<VmRef, Failure> {
    Ok("vm-00000000".parse()?)
}

pub(crate) async fn requests_that_cannot_be_served_are_refused_by_name(
    context: &mut Context,
) -> Result<(), Failure> {
    let client = &context.client;
    let log = context.logged()?;
    let not_found = ErrorCode::VmNotFound;
    refused(client.get(unknown()?).await, not_found)?;
    refused(client.stop(unknown()?, None).await, not_found)?;
    refused(client.start(unknown()?).await, not_found)?;
    refused(client.delete(unknown()?).await, not_found)?;
    let run = client.vm(unknown()?).exec(Command::shell("true")).await;
    refused(run, not_found)?;
    let name: VmRef = "no-such-name".parse()?;
    refused(client.get(name).await, not_found)?;

    let template = "no-such-template".parse()?;
    let made = vm::create(client, |request| request.template = Some(template)).await;
    refused(made, ErrorCode::TemplateNotFound)?;
    let invalid = ErrorCode::InvalidArgument;
    let made = vm::create(client, |request| request.cpus = Some(0)).await;
    refused(made, invalid)?;
    let made = vm::create(client, |request| request.memory_mib = Some(1)).await;
    refused(made, invalid)?;
    let made = vm::create(client, |request| {
        request.env = vec![("A=B".into(), "".into())]
    })
    .await;
    refused(made, invalid)?;
    let made = vm::create(client, |request| {
        request.env = vec![("A".into(), "a\0b".into())]
    })
    .await;
    refused(made, invalid)?;
    let long = vec![("k".repeat(1000), "v".into())];
    let made = vm::create(client, |request| request.labels = long).await;
    refused(made, invalid)?;
    ensure(client.list().await?.is_empty(), || "a refused VM is there")?;
    let words = ["VmNotFound", "TemplateNotFound", "InvalidArgument"];
    context.log_says(log, &words).await?;
    unharmed(context).await
}

pub(crate) async fn commands_that_cannot_be_started_are_refused_by_name(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let client = &context.client;
    let invalid = ErrorCode::InvalidArgument;
    let none: [&str; 0] = [];
    refused(vm::run(client, &made, Command::argv(none)).await, invalid)?;
    refused(
        vm::run(client, &made, Command::argv(["echo", "a\0b"])).await,
        invalid,
    )?;
    let nul = Command::shell("true").env("A", "a\0b");
    refused(vm::run(client, &made, nul).await, invalid)?;

    let cases = [
        (
            Command::shell("true").cwd("missing"),
            ProcessEnd::NoSuchDirectory,
            126,
            "no such directory: ",
        ),
        (
            Command::argv(["no-such-program"]),
            ProcessEnd::NotFound,
            127,
            "not found: no-such-program",
        ),
        (
            Command::argv(["/etc/passwd"]),
            ProcessEnd::NotExecutable,
            126,
            "not executable: /etc/passwd",
        ),
    ];
    for (command, end, code, message) in cases {
        let done = vm::run(client, &made, command).await?;
        ensure(
            done.ended.end == end
                && done.ended.exit_code == code
                && done.ended.message.starts_with(message),
            || format!("expected {end:?}: {done:?}"),
        )?;
    }
    // What the agent refuses it says on its VM's console.
    let refusals = context
        .shell(&made, "dmesg | grep -c event=refused")
        .await?;
    ensure(refusals == "3", || format!("{refusals} lines, not 3"))?;
    still_runs(context, &made).await?;
    context.delete(&made).await
}

async fn still_runs(context: &Context, made: &VmInfo) -> Result<(), Failure> {
    let echo = context.shell(made, "echo unharmed").await?;
    ensure(echo == "unharmed", || echo.clone())
}

pub(crate) async fn another_owners_vm_is_not_there(context: &mut Context) -> Result<(), Failure> {
    let made = context.create().await?;
    let other = context.appliance.other_client().await?;
    let code = ErrorCode::VmNotFound;
    refused(other.get(vm::reference(&made)).await, code)?;
    refused(other.stop(vm::reference(&made), None).await, code)?;
    refused(other.delete(vm::reference(&made)).await, code)?;
    let run = other
        .vm(vm::reference(&made))
        .exec(Command::shell("true"))
        .await;
    refused(run, code)?;
    let listed = other.list().await?;
    ensure(listed.is_empty(), || format!("{listed:?}"))?;
    still_runs(context, &made).await?;
    context.delete(&made).await
}

pub(crate) async fn a_wrong_token_is_refused(context: &mut Context) -> Result<(), Failure> {
    let log = context.logged()?;
    let code = ErrorCode::Unauthenticated;
    refused(context.appliance.client_with("wrong").await, code)?;
    refused(context.appliance.client_with("").await, code)?;
    // Without a token nothing is said at all.
    let silent = Wire::connect(&context.appliance).await?;
    let mut stream = silent.stream().await?;
    stream.send(&GetVm { vm: unknown()? }).await?;
    let error = stream.error().await?;
    ensure(error.code == ErrorCode::HelloRequired, || {
        format!("{error:?}")
    })?;
    let words = ["Unauthenticated", "HelloRequired"];
    context.log_says(log, &words).await?;
    unharmed(context).await
}

pub(crate) async fn garbage_and_wrong_alpn_end_the_connection_only(
    context: &mut Context,
) -> Result<(), Failure> {
    let appliance = &context.appliance;
    let log = context.logged()?;
    for alpn in [&[b"h2".as_slice()][..], &[]] {
        let told = async {
            let mut stream = wire::tls(appliance, alpn).await?;
            let mut byte = [0];
            ensure(stream.read(&mut byte).await? > 0, || "closed")
        };
        let told = timeout(wire::PATIENCE, told).await?;
        ensure(told.is_err(), || format!("ALPN {alpn:?} was let in"))?;
    }
    // No TLS at all.
    let mut socket = TcpStream::connect(("127.0.0.1", appliance.port())).await?;
    socket.write_all(&[0xff; 4096]).await?;
    closes(&mut socket).await?;
    // TLS, but no yamux in it.
    let mut stream = wire::tls(appliance, &[protocol::hello::ALPN]).await?;
    stream.write_all(&[0xff; 4096]).await?;
    closes(&mut stream).await?;
    let words = ["handshake failed", "connection broken"];
    context.log_says(log, &words).await?;
    unharmed(context).await
}

async fn closes(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Result<(), Failure> {
    let mut rest = Vec::new();
    // A reset is an end as well; only silence is not.
    let _ = timeout(wire::PATIENCE, stream.read_to_end(&mut rest)).await?;
    Ok(())
}

pub(crate) async fn frames_that_break_the_rules_are_refused(
    context: &mut Context,
) -> Result<(), Failure> {
    let log = context.logged()?;
    let wire = Wire::let_in(&context.appliance).await?;
    let header = |kind, length: usize| Header {
        length: u32::try_from(length).unwrap_or(u32::MAX),
        kind,
        flags: 0,
    };
    let cases = [
        (header(Kind(0x7777), 0), vec![], ErrorCode::Unsupported),
        (
            header(Kind::GET_VM, MAX_BODY + 1),
            vec![],
            ErrorCode::FrameTooLarge,
        ),
        (
            header(Kind::CREATE_VM, 3),
            vec![0xff; 3],
            ErrorCode::Malformed,
        ),
    ];
    for (header, body, code) in cases {
        let mut stream = wire.stream().await?;
        stream
            .send_bytes(&[&header.to_bytes()[..], &body].concat())
            .await?;
        let error = stream.error().await?;
        ensure(error.code == code, || format!("{header:?}: {error:?}"))?;
    }
    // The same connection still serves.
    let mut stream = wire.stream().await?;
    stream.send(&GetVm { vm: unknown()? }).await?;
    let error = stream.error().await?;
    ensure(error.code == ErrorCode::VmNotFound, || format!("{error:?}"))?;
    let words = ["Unsupported", "FrameTooLarge", "Malformed"];
    context.log_says(log, &words).await?;
    unharmed(context).await
}

pub(crate) async fn one_stream_too_many_is_refused_and_the_others_live(
    context: &mut Context,
) -> Result<(), Failure> {
    let limits = context
        .client
        .limits()
        .ok_or_else(|| Failure::new("no limits in HelloOk"))?;
    let made = context.create().await?;
    let log = context.logged()?;
    let wire = Wire::let_in(&context.appliance).await?;
    // Yamux lets a client have 256 streams that were never answered; with these, which were, it
    // gets over the appliance's own limit.
    let mut answered = Vec::new();
    for _ in 0..8 {
        let mut stream = wire.stream().await?;
        let vm = vm::reference(&made);
        stream.send(&OpenVm { vm }).await?;
        let opened = stream.frame().await?;
        ensure(
            opened
                .as_ref()
                .is_some_and(|frame| frame.kind == Kind::OPENED),
            || format!("not opened: {opened:?}"),
        )?;
        answered.push(stream);
    }
    let mut streams = Vec::new();
    let header = Header {
        length: 100,
        kind: Kind::GET_VM,
        flags: 0,
    };
    // Open, and waiting for the rest of their first frame.
    for _ in answered.len()..limits.max_streams as usize + 4 {
        let mut stream = wire.stream().await?;
        stream.send_bytes(&header.to_bytes()).await?;
        streams.push(stream);
    }
    // Which of them are refused is the appliance's choice; the first answer is such a refusal.
    let mut answers = JoinSet::new();
    for mut stream in streams {
        answers.spawn(async move { stream.error().await });
    }
    let error = answers
        .join_next()
        .await
        .ok_or_else(|| Failure::new("no stream was opened"))???;
    ensure(error.code == ErrorCode::TooManyStreams, || {
        format!("{error:?}")
    })?;
    // A stream from before, into the VM, still works.
    let mut into_vm = answered
        .pop()
        .ok_or_else(|| Failure::new("no stream into the VM"))?;
    let start = StartProcess {
        id: ProcessId([7; 16]),
        mode: CommandMode::Shell,
        command: vec![b"true".to_vec()],
        cwd: Vec::new(),
        env: Vec::new(),
        stdin: StdinMode::Null,
        output: OutputMode::Follow,
        user: Vec::new(),
        deadline_ms: None,
        memory_bytes: None,
        terminal: None,
    };
    into_vm.send(&start).await?;
    loop {
        let frame = into_vm.frame().await?;
        let frame = frame.ok_or_else(|| Failure::new("the stream into the VM has ended"))?;
        if frame.kind == Kind::PROCESS_ENDED {
            break;
        }
    }
    context.log_says(log, &["TooManyStreams"]).await?;
    answers.shutdown().await;
    drop((answered, into_vm, wire));
    still_runs(context, &made).await?;
    unharmed(context).await?;
    context.delete(&made).await
}

pub(crate) async fn a_client_that_vanishes_in_mid_frame_harms_nobody(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let log = context.logged()?;
    for _ in 0..20 {
        let wire = Wire::let_in(&context.appliance).await?;
        let mut stream = wire.stream().await?;
        let whole = protocol::encode(&GetVm { vm: unknown()? })?;
        stream
            .send_bytes(whole.get(..whole.len() - 2).unwrap_or_default())
            .await?;
        wire.vanish();
    }
    context.log_says(log, &["vanished"]).await?;
    // In the middle of a command's output, too.
    let client = context.appliance.client().await?;
    let run = client
        .vm(vm::reference(&made))
        .exec(Command::shell("yes"))
        .await;
    let mut run = match run {
        Ok(run) => run,
        Err(error @ ClientError::Refused(_)) => return Err(error.into()),
        Err(error) => return Err(error.into()),
    };
    run.next().await?;
    drop((run, client));
    still_runs(context, &made).await?;
    context.shell(&made, "pkill -KILL -x yes || true").await?;
    unharmed(context).await?;
    context.delete(&made).await
}
