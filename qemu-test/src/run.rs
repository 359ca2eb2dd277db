//! Runs scenarios one after the other and counts. One appliance serves them all, but for those that
//! want other settings and after a failure that may have harmed it; each has a deadline, and a
//! failure shows the console's end.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::appliance::{Appliance, Boot, Layout};
use crate::scenarios::{ALL, Context, Failure, Scenario};
use crate::settings::Options;
use crate::show_tail;

/// After so long a forgotten appliance is ended.
const APPLIANCE_DEADLINE: Duration = Duration::from_secs(3600);

/// How long a boot of the appliance may take before the scenario's own time begins.
const BOOT_DEADLINE: Duration = Duration::from_secs(240);

/// Runs those whose name contains `filter`; the exit code says whether all passed.
pub(crate) async fn run(layout: &Layout, filter: Option<&str>) -> u8 {
    let wanted = |scenario: &&Scenario| filter.is_none_or(|text| scenario.name.contains(text));
    let mut runner = Runner {
        layout,
        current: None,
    };
    let (mut passed, mut failed) = (0_u32, 0_u32);
    for scenario in ALL.iter().filter(wanted) {
        let begun = Instant::now();
        let result = runner.one(scenario).await;
        let seconds = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok      {seconds:>7.1} s  {}", scenario.name);
            }
            Err(failure) => {
                failed += 1;
                println!("FAILED  {seconds:>7.1} s  {}: {failure}", scenario.name);
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
    println!("{passed} passed, {failed} failed");
    u8::from(failed > 0)
}

struct Runner<'a> {
    layout: &'a Layout,
    current: Option<(Options, Context)>,
}

impl Runner<'_> {
    async fn one(&mut self, scenario: &Scenario) -> Result<(), Failure> {
        let context = timeout(BOOT_DEADLINE, self.context(scenario.options))
            .await
            .map_err(|_| Failure::new("the appliance did not boot in time"))??;
        let deadline = Duration::from_secs(scenario.deadline_s);
        timeout(deadline, (scenario.run)(context))
            .await
            .map_err(|_| Failure::new(format!("not done within {} s", scenario.deadline_s)))?
    }

    /// The running appliance if its settings are those asked for, else another one.
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
        Ok(&mut self.current.insert((options, kept)).1)
    }
}
