//! Runs scenarios one after the other and counts. One appliance serves them all, but for those that
//! want other settings and after a failure that may have harmed it; each has a deadline, and a
//! failure shows the console's end. A scenario that the emulator broke is played again, which is
//! said and counted; one that failed by itself never is.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::appliance::{Appliance, Boot, Layout};
use crate::instance::Home;
use crate::qemu::Accelerator;
use crate::scenarios::{ALL, Context, Failure, Scenario};
use crate::settings::Options;
use crate::show_tail;

/// After so long a forgotten appliance is ended.
const APPLIANCE_DEADLINE: Duration = Duration::from_secs(3600);

/// How long a boot of the appliance may take before the scenario's own time begins.
const BOOT_DEADLINE: Duration = Duration::from_secs(240);

/// How often in one run the emulator's faults are made good by playing a scenario again.
const EMULATOR_REPEATS: u32 = 3;

/// What the console shows when the emulation of nested virtualization failed, and nothing in the
/// appliance can make happen from user space; docs/performance.md says what is known.
const EMULATOR_FAULTS: [&str; 2] = [
    "corrupted stack end detected inside scheduler",
    "vCPU cannot go on",
];

/// Runs those whose name contains `filter`; the exit code says whether all passed.
pub(crate) async fn run(layout: &Layout, filter: Option<&str>) -> u8 {
    let wanted = |scenario: &&Scenario| filter.is_none_or(|text| scenario.name.contains(text));
    let mut runner = Runner {
        layout,
        current: None,
        from: 0,
    };
    let (mut passed, mut failed, mut repeats) = (0_u32, 0_u32, 0_u32);
    let mut pending = ALL.iter().filter(wanted);
    let mut again = None;
    while let Some(scenario) = again.take().or_else(|| pending.next()) {
        let begun = Instant::now();
        let result = runner.one(scenario).await;
        let seconds = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok      {seconds:>7.1} s  {}", scenario.name);
            }
            Err(failure) => {
                let fault = emulator_fault(Accelerator::detect(), &runner.console());
                if let Some(fault) = fault.filter(|_| repeats < EMULATOR_REPEATS) {
                    repeats += 1;
                    again = Some(scenario);
                    println!(
                        "again   {seconds:>7.1} s  {}: the emulator failed ({fault}): {failure}",
                        scenario.name
                    );
                } else {
                    failed += 1;
                    println!("FAILED  {seconds:>7.1} s  {}: {failure}", scenario.name);
                }
                show_tail(layout);
                // It may be the next one's victim too.
                runner.current = None;
            }
        }
    }
    if let Some((_, context)) = runner.current.take() {
        let off = context.appliance.home().power_off().await;
        if !matches!(off, Ok(true)) {
            failed += 1;
            println!("FAILED  power off at the end: {off:?}");
            show_tail(layout);
        }
    }
    if passed + failed == 0 {
        println!(
            "no scenario's name contains `{}`",
            filter.unwrap_or_default()
        );
        failed += 1;
    }
    if repeats > 0 {
        println!("scenarios played again because the emulator failed: {repeats}");
    }
    println!("{passed} passed, {failed} failed");
    u8::from(failed > 0)
}

/// Which fault of the emulator these lines of the console show.
fn emulator_fault(accelerator: Accelerator, console: &str) -> Option<&'static str> {
    EMULATOR_FAULTS
        .into_iter()
        .find(|fault| accelerator == Accelerator::Tcg && console.contains(fault))
}

struct Runner<'a> {
    layout: &'a Layout,
    current: Option<(Options, Context)>,
    /// How much of the console was there before the scenario.
    from: usize,
}

impl Runner<'_> {
    /// What the console said during the scenario.
    fn console(&self) -> String {
        let text = Home::open(&self.layout.home).map(|home| home.console().text());
        let Ok(Ok(mut text)) = text else {
            return String::new();
        };
        text.split_off(text.floor_char_boundary(self.from))
    }

    async fn one(&mut self, scenario: &Scenario) -> Result<(), Failure> {
        self.from = 0;
        let context = timeout(BOOT_DEADLINE, self.context(scenario.options))
            .await
            .map_err(|_| Failure::new("the appliance did not boot in time"))??;
        let deadline = Duration::from_secs(scenario.deadline_s);
        timeout(deadline, (scenario.run)(context))
            .await
            .map_err(|_| Failure::new(format!("not done within {} s", scenario.deadline_s)))?
    }

    /// The running appliance if its settings are those asked for, else another one; and where its
    /// console is now.
    async fn context(&mut self, options: Options) -> Result<&mut Context, Failure> {
        let kept = match self.current.take() {
            Some((has, context)) if has == options => context,
            other => {
                if let Some((_, context)) = &other {
                    context.appliance.home().power_off().await?;
                }
                drop(other);
                let boot = Boot {
                    options,
                    keep_data: false,
                    deadline: APPLIANCE_DEADLINE,
                    attached: true,
                };
                let appliance = Appliance::boot(self.layout, boot).await?;
                println!(
                    "        {:>7.1} s  (booted)",
                    appliance.boot_time.as_secs_f64()
                );
                Context::new(appliance).await?
            }
        };
        self.from = kept.logged()?;
        Ok(&mut self.current.insert((options, kept)).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_emulators_own_faults_are_made_good() {
        let panic = "x\n[ 74.3] Kernel panic - not syncing: corrupted stack end detected inside scheduler\n";
        let shutdown = "ERROR vmm::vcpu: vCPU cannot go on registers=\"rip=0xfff0\"";
        for console in [panic, shutdown] {
            assert!(emulator_fault(Accelerator::Tcg, console).is_some());
            assert_eq!(emulator_fault(Accelerator::Kvm, console), None);
        }
        let other = "Kernel panic - not syncing: Attempted to kill init!\nFAILED";
        assert_eq!(emulator_fault(Accelerator::Tcg, other), None);
    }
}
