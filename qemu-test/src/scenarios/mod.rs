//! What the appliance promises, each promise as a scenario that is played from outside. A scenario
//! leaves no VM behind, so that the next one finds the appliance as this one did.

mod agent;
mod bad_input;
mod boot_deadline;
mod confinement;
mod endings;
mod files;
mod guest;
mod host;
mod housekeeping;
mod lifecycle;
mod network;
mod origin;
mod output;
mod patches;
mod processes;
mod restart;
mod talk;
mod wire;

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use client::{Client, ClientError};
use protocol::ErrorCode;
use protocol::vm::{VmInfo, VmState};
use tokio::time::{Instant, sleep};

use crate::appliance::Appliance;
use crate::settings::Options;
use crate::{probe::Probe, vm};

/// A promise.
pub(crate) struct Scenario {
    /// Subject and promise.
    pub(crate) name: &'static str,
    /// Seconds after which it has failed.
    pub(crate) deadline_s: u64,
    /// The settings it wants.
    pub(crate) options: Options,
    /// What it does.
    pub(crate) run: for<'a> fn(&'a mut Context) -> Play<'a>,
}

/// A scenario that is being played.
pub(crate) type Play<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + 'a>>;

const DEFAULT: Options = Options::DEFAULT;

/// Its VMs never come up.
const STUCK: Options = Options {
    boot_deadline_s: 15,
    stuck_guest: true,
    ..DEFAULT
};

/// For VMs that are made by others, whose size the scenario cannot say (see [`Context::create`]).
const ONE_CPU: Options = Options {
    one_cpu: true,
    ..DEFAULT
};

macro_rules! scenarios {
    ($($module:ident :: $function:ident, $deadline_s:literal, $options:expr;)*) => {
        /// All scenarios, in the order in which they are played.
        pub(crate) const ALL: &[Scenario] = &[$(Scenario {
            name: concat!(stringify!($module), "::", stringify!($function)),
            deadline_s: $deadline_s,
            options: $options,
            run: |context| Box::pin($module::$function(context)),
        },)*];
    };
}

scenarios! {
    lifecycle::a_vm_is_made_used_stopped_started_and_deleted, 240, DEFAULT;
    lifecycle::a_vm_that_asks_for_nothing_gets_the_default_size, 180, DEFAULT;
    lifecycle::commands_get_arguments_environment_and_directory, 180, DEFAULT;
    lifecycle::a_create_repeated_with_its_key_makes_one_vm, 180, DEFAULT;
    guest::the_disk_grows_to_what_was_asked_for, 180, DEFAULT;
    guest::the_system_inside_is_clean_and_can_do_what_containers_need, 420, DEFAULT;
    processes::a_process_outlives_its_client_and_obeys_the_next_one, 240, DEFAULT;
    processes::a_terminal_feels_local, 180, DEFAULT;
    processes::two_hundred_commands_at_once_lose_no_line, 240, DEFAULT;
    files::files_go_both_ways_whole_or_not_at_all, 300, DEFAULT;
    housekeeping::a_vm_knows_the_time_its_names_and_how_it_does, 240, DEFAULT;
    agent::limits_end_a_command_with_their_reason, 240, DEFAULT;
    agent::the_agent_outlives_whatever_its_commands_do, 480, DEFAULT;
    bad_input::requests_that_cannot_be_served_are_refused_by_name, 180, DEFAULT;
    bad_input::commands_that_cannot_be_started_are_refused_by_name, 180, DEFAULT;
    bad_input::another_owners_vm_is_not_there, 180, DEFAULT;
    bad_input::a_wrong_token_is_refused, 120, DEFAULT;
    bad_input::garbage_and_wrong_alpn_end_the_connection_only, 120, DEFAULT;
    bad_input::frames_that_break_the_rules_are_refused, 120, DEFAULT;
    bad_input::one_stream_too_many_is_refused_and_the_others_live, 120, DEFAULT;
    bad_input::a_client_that_vanishes_in_mid_frame_harms_nobody, 180, DEFAULT;
    confinement::a_monitor_is_confined_and_holds_only_what_it_was_handed, 180, DEFAULT;
    restart::a_killed_control_loses_no_line_of_a_running_command, 240, DEFAULT;
    restart::a_monitor_that_died_while_control_was_down_is_reported, 240, DEFAULT;
    restart::a_killed_proxy_comes_back_and_the_vm_never_notices, 240, DEFAULT;
    endings::a_power_off_inside_stops_the_vm, 240, DEFAULT;
    endings::a_reboot_inside_boots_the_vm_again, 300, DEFAULT;
    endings::a_kernel_panic_is_reported_as_one, 240, DEFAULT;
    endings::a_triple_fault_is_reported_as_one, 240, DEFAULT;
    output::three_hundred_megabytes_on_both_outputs_leave_memory_flat, 600, DEFAULT;
    host::vms_and_their_files_outlive_a_reboot_of_the_host, 420, DEFAULT;
    host::an_acknowledged_create_survives_a_power_cut, 420, DEFAULT;
    network::a_server_in_a_vm_is_reached_at_its_public_address, 480, DEFAULT;
    network::git_pip_npm_and_apt_reach_what_the_rules_open, 600, DEFAULT;
    patches::patches_use_every_method, 420, ONE_CPU;
    patches::a_picture_and_a_sound_come_out_as_what_they_are, 300, ONE_CPU;
    patches::what_a_patch_keeps_is_alive_in_the_next_run, 300, ONE_CPU;
    boot_deadline::a_vm_that_does_not_come_up_leaves_nothing_behind, 240, STUCK;
}

/// What a scenario works with.
pub(crate) struct Context {
    /// The appliance.
    pub(crate) appliance: Appliance,
    /// A connection to it.
    pub(crate) client: Client,
}

impl Context {
    /// Connects to a booted appliance.
    pub(crate) async fn new(appliance: Appliance) -> Result<Self, Failure> {
        let client = appliance.client().await?;
        Ok(Self { appliance, client })
    }

    /// A shell inside the appliance.
    pub(crate) async fn probe(&self) -> Result<Probe, Failure> {
        Ok(self.appliance.probe().await?)
    }

    /// Makes a VM with one CPU: QEMU's emulated SVM was seen to break down when machines have
    /// more busy CPUs together than the appliance has (see [`output`]).
    pub(crate) async fn create(&self) -> Result<VmInfo, Failure> {
        Ok(vm::create(&self.client, |request| request.cpus = Some(1)).await?)
    }

    /// Runs a shell line that must succeed and gives its standard output without the last line end.
    pub(crate) async fn shell(&self, vm: &VmInfo, line: &str) -> Result<String, Failure> {
        let finished = vm::shell(&self.client, vm, line).await?;
        ensure(finished.succeeded(), || {
            format!("`{line}` in {}: {:?}", vm.id, finished)
        })?;
        Ok(finished.stdout.trim_end().to_owned())
    }

    /// The guest's boot_id.
    pub(crate) async fn boot_id(&self, vm: &VmInfo) -> Result<String, Failure> {
        self.shell(vm, "cat /proc/sys/kernel/random/boot_id").await
    }

    /// Deletes a VM.
    pub(crate) async fn delete(&self, vm: &VmInfo) -> Result<(), Failure> {
        Ok(self.client.delete(vm::reference(vm)).await?)
    }

    /// Connects anew after a part of the host was restarted.
    pub(crate) async fn reconnect(&mut self) -> Result<(), Failure> {
        self.client = self.appliance.client_again().await?;
        Ok(())
    }

    /// How long the console's text is now.
    pub(crate) fn logged(&self) -> Result<usize, Failure> {
        Ok(self.appliance.home().console().text()?.len())
    }

    /// Waits until each of `words` is in a line that the console got since `from`.
    pub(crate) async fn log_says(&self, from: usize, words: &[&str]) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let text = self.appliance.home().console().text()?;
            let new = text.get(from..).unwrap_or_default();
            let Some(missing) = words.iter().find(|word| !new.contains(**word)) else {
                return Ok(());
            };
            ensure(Instant::now() < deadline, || {
                format!("the log says nothing of `{missing}`")
            })?;
            sleep(Duration::from_millis(250)).await;
        }
    }

    /// Waits until a VM is in `state`; there is no event for that in the API yet, so it is asked
    /// again after a pause, at most until `patience` is over.
    pub(crate) async fn until(
        &self,
        vm: &VmInfo,
        state: VmState,
        patience: Duration,
    ) -> Result<VmInfo, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            let info = self.client.get(vm::reference(vm)).await?;
            if info.state == state {
                return Ok(info);
            }
            ensure(Instant::now() < deadline, || {
                format!(
                    "{} is {:?}, not {state:?}: {}",
                    vm.id, info.state, info.end_message
                )
            })?;
            sleep(Duration::from_millis(250)).await;
        }
    }
}

/// Why a scenario failed, for whoever reads the run's output.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    /// A failure with its reason.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    /// The error's message, and below it what the appliance added, such as a guest's console.
    fn from(error: E) -> Self {
        let any: &dyn std::error::Error = &error;
        let detail = any.downcast_ref().map_or("", ClientError::detail);
        let gap = if detail.is_empty() { "" } else { "\n" };
        Self(format!("{error}{gap}{detail}"))
    }
}

/// Fails unless `holds`.
pub(crate) fn ensure<T: Into<String>>(
    holds: bool,
    reason: impl FnOnce() -> T,
) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::new(reason()))
    }
}

/// Fails unless `result` is a refusal with this code and a message.
pub(crate) fn refused<T: fmt::Debug>(
    result: Result<T, ClientError>,
    code: ErrorCode,
) -> Result<(), Failure> {
    match result {
        Err(ClientError::Refused(body)) if body.code == code && !body.message.is_empty() => Ok(()),
        other => Err(Failure::new(format!("expected {code:?}, got {other:?}"))),
    }
}
