//! Processes that run in a VM or have ended lately: `ps`, `logs`, `attach`, `kill`. A process is
//! named by its id or by the beginning of one.

use std::time::Duration;

use client::protocol::processes::ProcessInfo;
use client::protocol::vm::VmRef;
use client::{Client, Process, ReadFrom};
use serde_json::{Value, json};

use crate::args::{Attach, Kill, Logs, ProcessPrefix, Ps};
use crate::complaint::{Complaint, harmless};
use crate::session::{Interrupts, Manner, Source, explain, follow_only, stay};
use crate::terminal::{self, Colour};

pub(crate) async fn ps(client: &Client, ps: Ps) -> Result<u8, Complaint> {
    let mut list = list(client, &ps.vm).await?;
    list.retain(|info| ps.all || info.ended.is_none());
    let text = if ps.json {
        format!("{:#}\n", Value::from_iter(list.iter().map(value)))
    } else if ps.quiet {
        list.iter().map(|info| format!("{}\n", info.id)).collect()
    } else {
        table(&list, terminal::colours())
    };
    crate::print(&text)
}

pub(crate) async fn logs(client: &Client, logs: Logs) -> Result<u8, Complaint> {
    let process = find(client, &logs.vm, &logs.process).await?;
    let from = logs.tail.map_or(ReadFrom::Oldest, ReadFrom::LastLines);
    let begun = if logs.follow {
        process.follow(from).await
    } else {
        process.replay(from).await
    };
    match begun {
        Ok(reader) => follow_only(client, &logs.vm, Source::Attached(Box::new(reader))).await,
        Err(error) => Err(explain(client, &logs.vm, &error).await),
    }
}

pub(crate) async fn attach(client: &Client, attach: Attach) -> Result<u8, Complaint> {
    let interrupts = Interrupts::new()?;
    let process = find(client, &attach.vm, &attach.process).await?;
    let reader = match process.follow(ReadFrom::Now).await {
        Ok(reader) => reader,
        Err(error) => return Err(explain(client, &attach.vm, &error).await),
    };
    let manner = Manner {
        input: true,
        terminal: reader.info().terminal,
        may_leave: true,
    };
    let source = Source::Attached(Box::new(reader));
    stay(client, &attach.vm, source, manner, interrupts).await
}

pub(crate) async fn kill(client: &Client, kill: Kill) -> Result<u8, Complaint> {
    let mut code = 0;
    for prefix in &kill.processes {
        let done = async {
            let process = find(client, &kill.vm, prefix).await?;
            let done = match kill.signal {
                Some(signal) => process.signal(signal).await,
                None => process
                    .kill(kill.grace.map(Duration::from_secs))
                    .await
                    .map(drop),
            };
            done.map_err(|error| Complaint::of(&format!("ending {prefix} in {}", kill.vm), &error))
        };
        if let Err(complaint) = done.await {
            complaint.print();
            code = 1;
        }
    }
    Ok(code)
}

async fn list(client: &Client, vm: &VmRef) -> Result<Vec<ProcessInfo>, Complaint> {
    let list = client.vm(vm.clone()).processes().await;
    list.map_err(|error| Complaint::of(&format!("listing the processes of {vm}"), &error))
}

/// The one process whose id begins so.
async fn find(client: &Client, vm: &VmRef, prefix: &ProcessPrefix) -> Result<Process, Complaint> {
    let all = list(client, vm).await?;
    let mut fitting = all.iter().filter(|info| prefix.fits(info.id));
    let wrong = |why: &str| {
        Complaint::new(&format!("finding the process {prefix} in {vm}"), why)
            .advice(format!("`sup ps --all {vm}` lists them"))
    };
    match (fitting.next(), fitting.next()) {
        (Some(info), None) => Ok(client.vm(vm.clone()).process(info.id)),
        (Some(_), Some(_)) => Err(wrong("several ids begin so")),
        _ => Err(wrong("there is none")),
    }
}

fn command(info: &ProcessInfo) -> String {
    let words: Vec<_> = info
        .command
        .iter()
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    words.join(" ")
}

fn state(info: &ProcessInfo) -> String {
    match &info.ended {
        None => "running".into(),
        Some(ended) => format!("exit {}", ended.exit_code),
    }
}

fn table(list: &[ProcessInfo], colours: bool) -> String {
    let mut text = format!("{:32}  {:>7}  {:8}  COMMAND\n", "ID", "PID", "STATE");
    for info in list {
        let line = harmless(&command(info).replace(['\n', '\t'], " "));
        let colour = match &info.ended {
            None => Colour::Green,
            Some(ended) if ended.exit_code == 0 => Colour::None,
            Some(_) => Colour::Red,
        };
        let state = colour.paint(&format!("{:8}", state(info)), colours);
        text.push_str(&format!("{}  {:>7}  {state}  {line}\n", info.id, info.pid));
    }
    text
}

fn value(info: &ProcessInfo) -> Value {
    let words = info
        .command
        .iter()
        .map(|word| String::from_utf8_lossy(word).into_owned());
    json!({
        "id": info.id.to_string(),
        "pid": info.pid,
        "command": words.collect::<Vec<String>>(),
        "terminal": info.terminal,
        "startedUnixMs": info.started_unix_ms,
        "endedUnixMs": info.ended.as_ref().map(|_| info.ended_unix_ms),
        "exitCode": info.ended.as_ref().map(|ended| ended.exit_code),
        "message": info.ended.as_ref().map(|ended| ended.message.clone()),
        "bytes": info.bytes,
        "droppedBytes": info.dropped,
    })
}
