//! What a VM is told about itself and tells its owner: clock, names, health, and the way to its
//! ports.

use protocol::agent::{AGENT_PORT, Dial, Dialed, Health, HealthReport, SetTime, TimeSet};
use protocol::vm::VmInfo;
use protocol::{ErrorBody, ErrorCode, Kind};

use super::talk::{Talk, eventually, part, shell};
use super::wire::WireStream;
use super::{Context, Failure, ensure};

const MIB: u64 = 1 << 20;
const SECOND: u64 = 1_000_000_000;

/// How far a guest's clock may be from its host's.
const CLOCK: u64 = 2 * SECOND;

pub(crate) async fn a_vm_knows_the_time_its_names_and_how_it_does(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let talk = Talk::with(context, &made).await?;
    part("the clock", clock(context, &talk)).await?;
    part("names", names(&made, &talk)).await?;
    part("health", health(&made, &talk)).await?;
    part("ports", ports(&talk)).await?;
    context.delete(&made).await
}

async fn health_report(talk: &Talk<'_>) -> Result<HealthReport, Failure> {
    talk.ask(&Health {}).await
}

/// The host's clock is read before and after the guest's, so that it does not matter how long
/// anything takes where everything is emulated.
async fn clock(context: &Context, talk: &Talk<'_>) -> Result<(), Failure> {
    let mut probe = context.probe().await?;
    let ptp = "cat /sys/class/ptp/*/clock_name 2> /dev/null; true";
    let ptp = talk.shell(ptp).await?;
    let source = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = talk.shell(source).await?;
    println!("                   clock source: {source}; PTP clocks: {ptp:?}");

    let before: u64 = probe.run("date +%s").await?.trim().parse()?;
    let report = health_report(talk).await?;
    let after: u64 = probe.run("date +%s").await?.trim().parse()?;
    // `date` cuts its second off.
    let (earliest, latest) = (before * SECOND - CLOCK, (after + 1) * SECOND + CLOCK);
    ensure((earliest..=latest).contains(&report.unix_ns), || {
        format!(
            "the guest's clock says {} ns, the host's said {before} s before and {after} s after",
            report.unix_ns
        )
    })?;

    // A clock that was left behind is put right.
    let hour = 3600 * SECOND;
    let unix_ns = report.unix_ns - hour;
    let back: TimeSet = talk.ask(&SetTime { unix_ns }).await?;
    let seen = health_report(talk).await?.unix_ns;
    let unix_ns = seen + hour;
    let forth: TimeSet = talk.ask(&SetTime { unix_ns }).await?;
    let step = i64::try_from(hour)?;
    ensure(
        seen < report.unix_ns && back.step_ns <= -step && (0..=step).contains(&forth.step_ns),
        || format!("{back:?}, {forth:?}, {seen} ns between"),
    )
}

async fn names(made: &VmInfo, talk: &Talk<'_>) -> Result<(), Failure> {
    let id = made.id.to_string();
    let short = id.trim_start_matches("vm-").get(..4).unwrap_or_default();
    let name = format!("supvm-{short}");
    let said = "uname -n; cat /proc/sys/kernel/hostname /etc/hostname";
    let said = talk.shell(said).await?;
    ensure(said == format!("{name}\n{name}\n{name}"), || said.clone())?;
    let hosts = "python3 -c 'import socket; print(socket.gethostbyname(socket.gethostname()), socket.gethostbyname(\"localhost\"))'";
    let hosts = talk.shell(hosts).await?;
    ensure(
        hosts.starts_with("127.") && hosts.ends_with(" 127.0.0.1"),
        || hosts.clone(),
    )?;
    let resolver = talk.shell("cat /etc/resolv.conf").await?;
    ensure(resolver.contains("nameserver 10.213.0.1"), || {
        resolver.clone()
    })?;
    let machine = talk.shell("cat /etc/machine-id").await?;
    ensure(
        machine.len() == 32
            && machine.bytes().all(|byte| byte.is_ascii_hexdigit())
            && machine.bytes().any(|byte| byte != b'0'),
        || format!("machine-id {machine:?}"),
    )
}

async fn health(made: &VmInfo, talk: &Talk<'_>) -> Result<(), Failure> {
    let sleeping = talk.start_log(&shell("exec sleep 7010")?).await?;
    let report = health_report(talk).await?;
    println!("                   {report:?}");
    let memory = u64::from(made.memory_mib) * MIB;
    let disk = u64::from(made.disk_mib) * MIB;
    let uptime = talk.shell("cut -d . -f 1 /proc/uptime").await?;
    let uptime: u64 = uptime.parse()?;
    // The kernel keeps a part of both for itself.
    let part_of = |some: u64, all: u64| some > all / 4 * 3 && some <= all;
    ensure(
        report.uptime_ms > 0
            && report.uptime_ms / 1000 <= uptime
            && part_of(report.memory_bytes, memory)
            && report.memory_available_bytes > memory / 2
            && report.memory_available_bytes < report.memory_bytes
            && part_of(report.disk_bytes, disk)
            && report.disk_available_bytes > MIB
            && report.disk_available_bytes < report.disk_bytes
            && report.disk_free_files > 1000
            && (2..200).contains(&report.processes)
            && (MIB / 4..16 * MIB).contains(&report.agent_bytes)
            && (1..64).contains(&report.streams),
        || format!("{report:?} in {made:?}"),
    )?;
    let grace_ms = Some(0);
    let id = sleeping;
    let kill = protocol::processes::KillProcess { id, grace_ms };
    talk.ask::<_, protocol::processes::ProcessInfo>(&kill)
        .await?;
    Ok(())
}

/// Opens a connection to a port, or says how it was refused.
async fn dial(talk: &Talk<'_>, port: u16) -> Result<Result<WireStream, ErrorBody>, Failure> {
    let mut stream = talk.begin(&Dial { port }).await?;
    let frame = stream.frame().await?;
    let frame = frame.ok_or_else(|| Failure::new("no answer to a dial"))?;
    if frame.kind == Kind::ERROR {
        return Ok(Err(protocol::message::decode_body(&frame.body)?));
    }
    protocol::decode::<Dialed>(&frame)?;
    Ok(Ok(stream))
}

async fn ports(talk: &Talk<'_>) -> Result<(), Failure> {
    for port in [0, u16::try_from(AGENT_PORT)?] {
        talk.refused(&Dial { port }, ErrorCode::InvalidArgument)
            .await?;
    }
    let nobody = ErrorCode::ConnectionRefused;
    let port = 3000;
    talk.refused(&Dial { port }, nobody).await?;
    talk.shell("mkdir -p site && seq 1 200000 > site/numbers && echo hello > site/hello")
        .await?;
    let server = "cd site && exec python3 -m http.server --bind 127.0.0.1 3000";
    talk.start_log(&shell(server)?).await?;
    eventually("the server listens", async || {
        match dial(talk, port).await? {
            Ok(_) => Ok(true),
            Err(error) if error.code == nobody => Ok(false),
            Err(error) => Err(Failure::new(format!("{error:?}"))),
        }
    })
    .await?;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    for (path, content) in [("hello", "hello\n"), ("numbers", &expected)] {
        let mut stream = dial(talk, port)
            .await?
            .map_err(|error| Failure::new(format!("{error:?}")))?;
        let request = format!("GET /{path} HTTP/1.0\r\n\r\n");
        stream.send_bytes(request.as_bytes()).await?;
        let answer = stream.rest().await?;
        let answer = String::from_utf8_lossy(&answer);
        ensure(
            answer.starts_with("HTTP/1.0 200") && answer.ends_with(&format!("\r\n\r\n{content}")),
            || format!("{path}: {} bytes", answer.len()),
        )?;
    }
    Ok(())
}
