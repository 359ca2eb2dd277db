//! Short ways to what scenarios, demonstration and measurements do all the time: a VM that is
//! deleted in the end, a command with its whole output.

use client::{Client, ClientError, Command, Output};
use protocol::ErrorCode;
use protocol::process::ProcessEnded;
use protocol::vm::{CreateVm, VmInfo, VmRef};

use crate::qemu::Accelerator;

/// A command's output and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
    /// How it ended.
    pub(crate) ended: ProcessEnded,
}

impl Finished {
    /// Whether it exited with code 0.
    pub(crate) fn succeeded(&self) -> bool {
        self.ended.exit_code == 0 && self.ended.signal == 0
    }
}

/// A VM by its identifier.
pub(crate) fn reference(vm: &VmInfo) -> VmRef {
    VmRef::Id(vm.id.clone())
}

/// Makes a VM of the default size with a changed request.
pub(crate) async fn create(
    client: &Client,
    change: impl FnOnce(&mut CreateVm),
) -> Result<VmInfo, ClientError> {
    let mut request = client::new_vm()?;
    change(&mut request);
    client.create(request).await
}

/// Makes a VM with nothing but defaults, so with two CPUs. What the emulator may do to such a VM is
/// said and made good by another one.
pub(crate) async fn create_default(client: &Client) -> Result<VmInfo, ClientError> {
    let mut repeats = 0;
    loop {
        match create(client, |_| {}).await {
            Err(error) if repeats < EMULATOR_REPEATS && is_the_emulators(&error) => {
                eprintln!("qemu-test: another VM, because of the emulator: {error}");
                repeats += 1;
            }
            other => return other,
        }
    }
}

/// How many VMs the emulator may end before that is taken for a defect of ours.
const EMULATOR_REPEATS: u32 = 2;

/// QEMU's emulation of SVM now and then gives a guest an interrupt twice, and one with several CPUs
/// ends in a triple fault; docs/performance.md says what is known.
fn is_the_emulators(error: &ClientError) -> bool {
    Accelerator::detect() == Accelerator::Tcg
        && error.code() == Some(ErrorCode::BootFailed)
        && error.to_string().contains("triple fault")
}

/// Runs a command to its end.
pub(crate) async fn run(
    client: &Client,
    vm: &VmInfo,
    command: Command,
) -> Result<Finished, ClientError> {
    let mut execution = client.vm(reference(vm)).exec(command).await?;
    let mut stdout = Vec::new();
    let mut stderr = Vec::new();
    while let Some(output) = execution.next().await? {
        match output {
            Output::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            Output::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            _ => {}
        }
    }
    let ended = execution.ended().cloned().ok_or(ClientError::AgentGone)?;
    Ok(Finished {
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        ended,
    })
}

/// Runs a shell line to its end.
pub(crate) async fn shell(
    client: &Client,
    vm: &VmInfo,
    line: &str,
) -> Result<Finished, ClientError> {
    run(client, vm, Command::shell(line)).await
}

/// Runs so many commands at the same time, each of which prints so many lines; says whether every
/// line of each came.
pub(crate) async fn at_once(
    client: &Client,
    vm: &VmInfo,
    commands: usize,
    lines: usize,
) -> Result<bool, ClientError> {
    let runs = (0..commands).map(|number| async move {
        let line = format!("for i in $(seq {lines}); do echo {number} $i; done");
        let wanted: String = (1..=lines).map(|i| format!("{number} {i}\n")).collect();
        Ok::<_, ClientError>(shell(client, vm, &line).await?.stdout == wanted)
    });
    let whole = futures::future::try_join_all(runs).await?;
    Ok(whole.into_iter().all(|one| one))
}
