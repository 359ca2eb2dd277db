//! A VM's web server from here: its URL, the browser, and a port of ours that leads to one of its.
//! A port is opened on 127.0.0.1 only.

use std::process::Stdio;
use std::time::Duration;

use client::protocol::vm::VmRef;
use client::{Client, Vm};
use tokio::net::{TcpListener, TcpStream};

use crate::args::{Forward, Ports};
use crate::complaint::{Complaint, harmless};
use crate::session::{INTERRUPTED, Interrupts};

pub(crate) async fn url(client: &Client, vm: &VmRef) -> Result<String, Complaint> {
    let what = format!("finding the URL of {vm}");
    let info = client.get(vm.clone()).await;
    let info = info.map_err(|error| Complaint::of(&what, &error))?;
    if info.url.is_empty() {
        return Err(Complaint::new(&what, "the appliance gave it none")
            .advice(format!("`sup forward {vm} PORT` reaches a port of it")));
    }
    Ok(info.url.to_string())
}

/// A link that lets one visitor in.
pub(crate) async fn link(client: &Client, vm: &VmRef) -> Result<String, Complaint> {
    let what = format!("making a link to {vm}");
    let link = client.create_link(vm.clone()).await;
    let link = link.map_err(|error| Complaint::of(&what, &error))?;
    Ok(harmless(&link.url))
}

/// How long the opener may take to say that it cannot; then it is the browser itself.
const OPENING: Duration = Duration::from_secs(5);

/// In the browser, or printed where there is none.
pub(crate) async fn open(url: &str) -> Result<u8, Complaint> {
    if !url.starts_with("https://") && !url.starts_with("http://") {
        let what = "opening the browser";
        return Err(Complaint::new(what, format!("`{url}` is no web address")));
    }
    if let Some(program) = opener() {
        let opening = tokio::process::Command::new(program)
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        if let Ok(mut opening) = opening {
            match tokio::time::timeout(OPENING, opening.wait()).await {
                Ok(Ok(status)) if !status.success() => {}
                _ => return Ok(0),
            }
        }
    }
    crate::print(&format!("{}\n", harmless(url)))
}

/// What opens addresses here, if somebody can see it.
fn opener() -> Option<&'static str> {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if cfg!(target_os = "macos") {
        Some("open")
    } else if set("DISPLAY") || set("WAYLAND_DISPLAY") {
        Some("xdg-open")
    } else {
        None
    }
}

/// Listens until Ctrl-C.
pub(crate) async fn forward(client: &Client, forward: Forward) -> Result<u8, Complaint> {
    let Ports { local, remote } = forward.ports;
    let mut interrupts = Interrupts::new()?;
    let what = format!("listening on 127.0.0.1:{local}");
    let wrong = |error: std::io::Error| {
        Complaint::new(&what, error.to_string()).advice("choose another one with LOCAL:REMOTE")
    };
    let listener = TcpListener::bind(("127.0.0.1", local))
        .await
        .map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    let vm = client.vm(forward.vm.clone());
    // An unknown VM is told now, not to the first who connects.
    vm.health()
        .await
        .map_err(|error| Complaint::of(&format!("reaching {}", forward.vm), &error))?;
    eprintln!("sup: {address} leads to port {remote} of {}", forward.vm);
    crate::print(&format!("{address}\n"))?;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (near, _) = accepted.map_err(wrong)?;
                tokio::spawn(pass(vm.clone(), near, remote));
            }
            () = interrupts.next() => return Ok(INTERRUPTED),
        }
    }
}

async fn pass(vm: Vm, mut near: TcpStream, port: u16) {
    match vm.dial(port).await {
        Ok(mut far) => {
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        }
        Err(error) => Complaint::of(&format!("connecting to port {port}"), &error).print(),
    }
}
