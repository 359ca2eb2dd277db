//! VMs as tables and as JSON.

use client::protocol::vm::{EndReason, VmInfo, VmState};
use serde_json::{Value, json as object};

use crate::complaint::harmless;
use crate::terminal::Colour;

const HEADING: [&str; 8] = [
    "ID", "NAME", "STATE", "TEMPLATE", "CPUS", "MEMORY", "DISK", "LABELS",
];

/// One line per VM under a heading.
pub(crate) fn table(vms: &[VmInfo], colours: bool) -> String {
    let mut rows = vec![(HEADING.map(String::from), Colour::None)];
    rows.extend(vms.iter().map(|vm| {
        let name = vm.name.as_ref();
        let labels = vm
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        let cells = [
            vm.id.to_string(),
            name.map_or_else(|| "-".into(), ToString::to_string),
            state(vm.state),
            format!("{}@{}", vm.template, vm.template_version),
            vm.cpus.to_string(),
            format!("{}M", vm.memory_mib),
            format!("{}M", vm.disk_mib),
            harmless(&labels.collect::<Vec<_>>().join(",")).replace(['\n', '\t'], " "),
        ];
        (cells, colour(vm.state))
    }));
    let mut widths = [0; HEADING.len()];
    for (row, _) in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    rows.iter()
        .map(|(row, colour)| {
            let cells: Vec<String> = row
                .iter()
                .zip(widths)
                .zip(HEADING)
                .map(|((cell, width), heading)| {
                    let cell = harmless(&format!("{cell:width$}"));
                    match heading {
                        "STATE" => colour.paint(&cell, colours),
                        _ => cell,
                    }
                })
                .collect();
            format!("{}\n", cells.join("  ").trim_end())
        })
        .collect()
}

fn colour(state: VmState) -> Colour {
    match state {
        VmState::Running => Colour::Green,
        VmState::Starting | VmState::Stopping => Colour::Yellow,
        _ => Colour::None,
    }
}

/// An array of all there is to know.
pub(crate) fn json_list(vms: &[VmInfo]) -> String {
    format!("{:#}\n", Value::from_iter(vms.iter().map(value)))
}

/// All there is to know about one VM.
pub(crate) fn json(vm: &VmInfo) -> String {
    format!("{:#}\n", value(vm))
}

fn value(vm: &VmInfo) -> Value {
    let labels: serde_json::Map<String, Value> = vm
        .labels
        .iter()
        .map(|(key, value)| (key.clone(), value.clone().into()))
        .collect();
    object!({
        "id": vm.id.as_str(),
        "name": vm.name.as_ref().map(|name| name.as_str()),
        "state": state(vm.state),
        "endReason": end_reason(vm.end_reason),
        "endMessage": vm.end_message,
        "template": vm.template.as_str(),
        "templateVersion": vm.template_version.as_str(),
        "cpus": vm.cpus,
        "memoryMiB": vm.memory_mib,
        "diskMiB": vm.disk_mib,
        "labels": labels,
        "createdUnixMs": vm.created_unix_ms,
        "generation": vm.generation,
        "url": vm.url,
    })
}

fn state(state: VmState) -> String {
    match state {
        VmState::Stopped => "stopped".into(),
        VmState::Starting => "starting".into(),
        VmState::Running => "running".into(),
        VmState::Stopping => "stopping".into(),
        other => format!("state-{}", other.to_wire()),
    }
}

/// The text for a reason; none when the VM has not ended.
pub(crate) fn end_reason(reason: EndReason) -> Option<String> {
    Some(match reason {
        EndReason::None => return None,
        EndReason::PoweredOff => "powered-off".into(),
        EndReason::Stopped => "stopped".into(),
        EndReason::Rebooted => "rebooted".into(),
        EndReason::GuestPanic => "guest-panic".into(),
        EndReason::TripleFault => "triple-fault".into(),
        EndReason::Killed => "killed".into(),
        EndReason::BootTimeout => "boot-timeout".into(),
        EndReason::DeviceFault => "device-fault".into(),
        EndReason::MonitorFailed => "monitor-failed".into(),
        EndReason::HostRestarted => "host-restarted".into(),
        other => format!("reason-{}", other.to_wire()),
    })
}
