//! `sup`: the command line of a supvm appliance. It parses, asks the library and prints; results go
//! to standard output, everything about them to standard error.

mod args;
mod complaint;
mod config;
mod copy;
mod exec;
mod login;
mod network;
mod processes;
mod rules;
#[cfg(feature = "patch")]
mod run;
mod session;
mod show;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use client::protocol::hello::GENERATION;
use client::protocol::vm::{CreateVm, VmRef};
use client::{Client, new_vm};

use args::{Arguments, Create, Task};
use complaint::Complaint;
use config::Target;

/// What a command whose exit code is that of something it runs returns when there is none.
const NO_EXIT_CODE: u8 = 255;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    keep_freed_memory();
    let failed = match arguments.task {
        Task::Exec(_) | Task::Shell(_) | Task::Attach(_) | Task::Run(_) => NO_EXIT_CODE,
        _ => 1,
    };
    // One thread moves the bytes; what blocks has threads of its own. Two would only wake each other for
    // every frame of a copy.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            Complaint::new("starting", error.to_string()).print();
            return failed.into();
        }
    };
    let code = runtime
        .block_on(run(arguments))
        .unwrap_or_else(|complaint| {
            complaint.print();
            complaint.code(failed)
        });
    // A read of standard input may still be blocked; nobody waits for it.
    runtime.shutdown_background();
    code.into()
}

/// The end of the heap is not given back to the kernel for every buffer of a copy, only to be asked
/// for again, page by page, for the next.
fn keep_freed_memory() {
    /// Bytes at the heap's end that may lie unused.
    #[cfg(target_env = "gnu")]
    const UNUSED: i32 = 16 << 20;
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes numbers and changes the allocator's settings under its lock.
    unsafe {
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, UNUSED);
    }
}

async fn run(arguments: Arguments) -> Result<u8, Complaint> {
    let target = || Target::find(&arguments.target);
    match arguments.task {
        Task::Create(create) => {
            let request = create_request(create)?;
            let vm = with_client(target()?, async |client| {
                let made = client.create(request).await;
                made.map_err(|error| Complaint::of("creating a VM", &error))
            })
            .await?;
            print(&format!("{}\n", vm.id))
        }
        Task::Ls { json, quiet } => {
            let vms = with_client(target()?, async |client| {
                let vms = client.list().await;
                vms.map_err(|error| Complaint::of("listing VMs", &error))
            })
            .await?;
            print(&if json {
                show::json_list(&vms)
            } else if quiet {
                vms.iter().map(|vm| format!("{}\n", vm.id)).collect()
            } else {
                show::table(&vms, terminal::colours())
            })
        }
        Task::Inspect { vm } => {
            let info = with_client(target()?, async |client| {
                let info = client.get(vm.clone()).await;
                info.map_err(|error| Complaint::of(&format!("inspecting {vm}"), &error))
            })
            .await?;
            print(&show::json(&info))
        }
        Task::Stop { vm, deadline } => {
            let deadline_ms = deadline.map(|seconds| seconds.saturating_mul(1000));
            with_client(target()?, async |client| {
                let stopped = client.stop(vm.clone(), deadline_ms).await;
                stopped.map_err(|error| Complaint::of(&format!("stopping {vm}"), &error))
            })
            .await?;
            Ok(0)
        }
        Task::Start { vm } => {
            with_client(target()?, async |client| {
                let started = client.start(vm.clone()).await;
                started.map_err(|error| Complaint::of(&format!("starting {vm}"), &error))
            })
            .await?;
            Ok(0)
        }
        Task::Exec(exec) => {
            with_client(target()?, async |client| exec::run(client, exec).await).await
        }
        Task::Shell(shell) => {
            with_client(target()?, async |client| exec::shell(client, shell).await).await
        }
        Task::Ps(ps) => {
            with_client(target()?, async |client| processes::ps(client, ps).await).await
        }
        Task::Logs(logs) => {
            with_client(target()?, async |client| {
                processes::logs(client, logs).await
            })
            .await
        }
        Task::Attach(attach) => {
            with_client(target()?, async |client| {
                processes::attach(client, attach).await
            })
            .await
        }
        Task::Kill(kill) => {
            with_client(target()?, async |client| {
                processes::kill(client, kill).await
            })
            .await
        }
        Task::Cp(copy) => {
            with_client(target()?, async |client| copy::run(client, copy).await).await
        }
        Task::Url { vm, link } => {
            let finding = async |client: &Client| match link {
                true => network::link(client, &vm).await,
                false => network::url(client, &vm).await,
            };
            let url = with_client(target()?, finding).await?;
            print(&format!("{url}\n"))
        }
        Task::Network(network) => {
            let shown =
                with_client(target()?, async |client| rules::run(client, network).await).await?;
            print(&shown)
        }
        Task::Forward(forward) => {
            with_client(target()?, async |client| {
                network::forward(client, forward).await
            })
            .await
        }
        Task::Rm { vms } => with_client(target()?, async |client| remove(client, vms).await).await,
        Task::Open { vm } => {
            let url =
                with_client(target()?, async |client| network::url(client, &vm).await).await?;
            network::open(&url).await
        }
        #[cfg(feature = "patch")]
        Task::Run(run) => run::run(target()?, run).await,
        Task::Login(login) => login::run(&arguments.target, login).await,
        Task::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "sup", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Task::Version => print(&format!(
            "sup {} (protocol generation {})\n",
            env!("CARGO_PKG_VERSION"),
            GENERATION
        )),
        Task::CaFetch => {
            let endpoint = Target::endpoint(&arguments.target)?;
            let fetched = client::fetch_ca(&endpoint)
                .await
                .map_err(|error| Complaint::of("fetching the CA certificate", &error))?;
            eprintln!("SHA-256 {}", fetched.sha256);
            print(&fetched.pem)
        }
    }
}

/// Connects, works, and says goodbye however the work went.
async fn with_client<T>(
    target: Target,
    work: impl AsyncFnOnce(&Client) -> Result<T, Complaint>,
) -> Result<T, Complaint> {
    let what = format!("connecting to {}", target.endpoint);
    let client = Client::connect(target.endpoint, target.token, target.trust)
        .await
        .map_err(|error| Complaint::of(&what, &error))?;
    let result = work(&client).await;
    client.close().await;
    result
}

async fn remove(client: &Client, vms: Vec<VmRef>) -> Result<u8, Complaint> {
    let mut code = 0;
    for vm in vms {
        if let Err(error) = client.delete(vm.clone()).await {
            Complaint::of(&format!("deleting {vm}"), &error).print();
            code = 1;
        }
    }
    Ok(code)
}

fn create_request(create: Create) -> Result<CreateVm, Complaint> {
    let (egress, publication) = create.connected.wanted()?;
    let fresh = new_vm().map_err(|error| Complaint::of("creating a VM", &error))?;
    Ok(CreateVm {
        template: create.template,
        name: create.name,
        cpus: create.cpus,
        memory_mib: create.memory,
        disk_mib: create.disk,
        labels: create.label,
        env: create.env,
        egress,
        publication,
        ..fresh
    })
}

/// Writes a result. A reader that has had enough is no error.
fn print(text: &str) -> Result<u8, Complaint> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Complaint::new("writing the result", error.to_string()))
        }
        _ => Ok(0),
    }
}
