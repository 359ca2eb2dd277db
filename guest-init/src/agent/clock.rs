//! Keeps the machine's clock at the host's: compared when the machine is configured and then every
//! minute or so, slewed when it is off by little, stepped when by much. Whoever sets the clock to
//! another time means it: from then on it is left alone until it is set back to about the host's.

use std::path::Path;
use std::time::Duration;

use crate::log;
use crate::system::ptp::{self, HostClock, PtpError, Woken};

/// From one comparison to the next. A clock that goes wrong by 50 parts in a million is off by three
/// milliseconds then, and right again six seconds later.
const PERIOD: Duration = Duration::from_secs(64);
/// As long as nothing is to be done.
const LONG: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// What is further off than that is stepped, in nanoseconds: slewing it would take a quarter of an hour.
const FAR: u64 = 500_000_000;
/// What is closer than that is as good as right, in nanoseconds.
const NEAR: u64 = 20_000;

/// The two clocks and a timer; in tests others than the machine's.
trait Clocks {
    /// By how many nanoseconds the host's clock is ahead.
    fn offset(&self) -> Result<i64, PtpError>;
    fn slew(&self, microseconds: i64) -> Result<(), PtpError>;
    fn step(&self, nanoseconds: i64) -> Result<(), PtpError>;
    /// Begins a wait; true if somebody has set the clock since the last one.
    fn arm(&self, after: Duration) -> Result<bool, PtpError>;
    fn wait(&self) -> Result<Woken, PtpError>;
}

impl Clocks for HostClock {
    fn offset(&self) -> Result<i64, PtpError> {
        self.offset()
    }

    fn slew(&self, microseconds: i64) -> Result<(), PtpError> {
        self.slew(microseconds)
    }

    fn step(&self, nanoseconds: i64) -> Result<(), PtpError> {
        self.step(nanoseconds)
    }

    fn arm(&self, after: Duration) -> Result<bool, PtpError> {
        self.arm(after)
    }

    fn wait(&self) -> Result<Woken, PtpError> {
        self.wait()
    }
}

/// Whose the clock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// It follows the host's.
    Kept,
    /// Somebody has set it to another time.
    LeftAlone,
}

/// Why a comparison is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// It is the first one: nobody has looked at the clock yet.
    First,
    /// The time for one has come.
    Due,
    /// Somebody has set the clock.
    ClockSet,
}

/// What is to be done about an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Nothing,
    /// By so many microseconds.
    Slew(i64),
    /// By so many nanoseconds.
    Step(i64),
}

/// Decides; does nothing itself.
fn decide(mode: Mode, cause: Cause, offset: i64) -> (Mode, Action) {
    let size = offset.unsigned_abs();
    let right = |offset: i64| {
        if size <= NEAR {
            Action::Nothing
        } else if size <= FAR && cause != Cause::First {
            Action::Slew(offset / 1000)
        } else {
            Action::Step(offset)
        }
    };
    match (mode, cause) {
        (_, Cause::ClockSet) if size > FAR => (Mode::LeftAlone, Action::Nothing),
        (Mode::LeftAlone, Cause::Due) => (Mode::LeftAlone, Action::Nothing),
        _ => (Mode::Kept, right(offset)),
    }
}

/// Sets the clock right and begins to keep it, if the machine can see its host's. For a machine of
/// its own, once its clock was set roughly and before anybody looks at it.
pub(super) fn begin() {
    let Some(path) = ptp::find(Path::new("/sys")) else {
        log::info(format_args!(
            "event=clock_not_kept reason=\"the machine shows no clock of its host's\""
        ));
        return;
    };
    let begun = HostClock::open(&path).and_then(|clocks| {
        let keeper = Keeper::begin(clocks)?;
        let what = "start a thread";
        super::start_thread("clock", move || keeper.run())
            .map_err(|errno| PtpError::System { what, errno })
    });
    match begun {
        Ok(()) => log::info(format_args!("event=clock_kept by={}", path.display())),
        Err(error) => log::warn(format_args!("event=clock_not_kept reason=\"{error}\"")),
    }
}

struct Keeper<C> {
    clocks: C,
    mode: Mode,
    /// Somebody has set the clock, and it could not be compared since.
    was_set: bool,
}

impl<C: Clocks> Keeper<C> {
    /// Makes the first comparison.
    fn begin(clocks: C) -> Result<Self, PtpError> {
        let mut keeper = Self {
            clocks,
            mode: Mode::Kept,
            was_set: false,
        };
        keeper.turn(Cause::First)?;
        Ok(keeper)
    }

    /// Waits and compares, until the timer itself fails.
    fn run(mut self) {
        let mut failing = false;
        loop {
            let cause = match self.clocks.wait() {
                Ok(Woken::Due) => Cause::Due,
                Ok(Woken::ClockSet) => Cause::ClockSet,
                Err(error) => {
                    log::warn(format_args!("event=clock_not_kept reason=\"{error}\""));
                    return;
                }
            };
            let turn = self.turn(cause);
            if let Err(error) = &turn
                && !failing
            {
                // Once, however long it lasts.
                log::warn(format_args!("event=clock_not_compared error=\"{error}\""));
            }
            failing = turn.is_err();
        }
    }

    /// Begins the next wait and compares, in this order: so a clock that is set meanwhile is noticed
    /// by the end of the wait.
    fn turn(&mut self, cause: Cause) -> Result<(), PtpError> {
        self.was_set |= self.clocks.arm(PERIOD)? || cause == Cause::ClockSet;
        let offset = self.clocks.offset()?;
        let cause = match std::mem::take(&mut self.was_set) {
            true => Cause::ClockSet,
            false => cause,
        };
        let (mode, action) = decide(self.mode, cause, offset);
        if mode != self.mode {
            self.mode = mode;
            log::info(format_args!("event=clock mode={mode:?} offset_ns={offset}"));
        }
        match action {
            Action::Nothing => {}
            Action::Slew(microseconds) => self.clocks.slew(microseconds)?,
            Action::Step(nanoseconds) => {
                let stepped = self.clocks.step(nanoseconds);
                // The step has ended the wait: nobody else has set the clock.
                self.clocks.arm(PERIOD)?;
                stepped?;
                log::info(format_args!("event=clock_stepped step_ns={nanoseconds}"));
            }
        }
        match self.mode {
            Mode::Kept => Ok(()),
            // Set at this very moment is left alone as well, until it is set once more.
            Mode::LeftAlone => self.clocks.arm(LONG).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn little_is_slewed_and_much_is_stepped() {
        let kept = |cause, offset| {
            let (mode, action) = decide(Mode::Kept, cause, offset);
            assert_eq!(mode, Mode::Kept);
            action
        };
        assert_eq!(kept(Cause::Due, 20_000), Action::Nothing);
        assert_eq!(kept(Cause::Due, 20_001), Action::Slew(20));
        assert_eq!(kept(Cause::Due, -SECOND / 2), Action::Slew(-500_000));
        assert_eq!(
            kept(Cause::Due, SECOND / 2 + 1),
            Action::Step(SECOND / 2 + 1)
        );
        assert_eq!(kept(Cause::Due, i64::MIN), Action::Step(i64::MIN));
        // Nobody has seen it yet.
        assert_eq!(kept(Cause::First, -1_000_000), Action::Step(-1_000_000));
        assert_eq!(kept(Cause::First, 10), Action::Nothing);
    }

    #[test]
    fn a_clock_that_was_set_right_is_kept_and_one_that_was_set_elsewhere_is_not() {
        let set = |mode, offset| decide(mode, Cause::ClockSet, offset);
        for mode in [Mode::Kept, Mode::LeftAlone] {
            assert_eq!(set(mode, 3_000_000), (Mode::Kept, Action::Slew(3000)));
            assert_eq!(set(mode, -9 * SECOND), (Mode::LeftAlone, Action::Nothing));
        }
        let due = decide(Mode::LeftAlone, Cause::Due, 5 * SECOND);
        assert_eq!(due, (Mode::LeftAlone, Action::Nothing));
    }

    /// Two clocks in a world where the time passes by waiting. The guest's goes wrong by a hundred
    /// parts in a million, and `settings` says at which second somebody sets it off by how much.
    struct Fake(RefCell<World>);

    #[derive(Default)]
    struct World {
        now: i64,
        offset: i64,
        slewing: i64,
        settings: Vec<(i64, i64)>,
        armed: i64,
        was_set: bool,
        broken: bool,
        steps: Vec<i64>,
        worst: i64,
        until: i64,
    }

    impl World {
        fn pass(&mut self, seconds: i64) {
            for _ in 0..seconds {
                self.now += 1;
                let slewed = self.slewing.clamp(-500_000, 500_000);
                self.slewing -= slewed;
                self.offset += 100_000 - slewed;
                self.worst = self.worst.max(self.offset.abs());
            }
        }
    }

    impl Clocks for &Fake {
        fn offset(&self) -> Result<i64, PtpError> {
            let world = self.0.borrow();
            if world.broken {
                return Err(broken());
            }
            Ok(world.offset)
        }

        fn slew(&self, microseconds: i64) -> Result<(), PtpError> {
            self.0.borrow_mut().slewing = microseconds * 1000;
            Ok(())
        }

        fn step(&self, nanoseconds: i64) -> Result<(), PtpError> {
            let mut world = self.0.borrow_mut();
            world.offset -= nanoseconds;
            world.slewing = 0;
            world.steps.push(nanoseconds);
            world.was_set = true;
            Ok(())
        }

        fn arm(&self, after: Duration) -> Result<bool, PtpError> {
            let mut world = self.0.borrow_mut();
            world.armed = world.now + after.as_secs() as i64;
            Ok(std::mem::take(&mut world.was_set))
        }

        fn wait(&self) -> Result<Woken, PtpError> {
            let mut world = self.0.borrow_mut();
            if world.was_set {
                return Ok(Woken::ClockSet);
            }
            let setting = world.settings.first().copied();
            let (at, woken) = match setting {
                Some((at, offset)) if at <= world.armed => {
                    world.settings.remove(0);
                    let seconds = at - world.now;
                    world.pass(seconds);
                    world.offset = offset;
                    world.slewing = 0;
                    (at, Woken::ClockSet)
                }
                _ => (world.armed, Woken::Due),
            };
            // The end of the world ends the thread.
            if at > world.until {
                return Err(broken());
            }
            let seconds = at - world.now;
            world.pass(seconds);
            Ok(woken)
        }
    }

    fn broken() -> PtpError {
        let errno = nix::errno::Errno::EIO;
        PtpError::System {
            what: "go on",
            errno,
        }
    }

    fn live(world: World) -> World {
        let fake = Fake(RefCell::new(World {
            until: 10_000,
            ..world
        }));
        Keeper::begin(&fake).unwrap().run();
        fake.0.into_inner()
    }

    #[test]
    fn a_clock_that_goes_wrong_stays_within_milliseconds_and_is_stepped_once() {
        let world = live(World {
            offset: 7_000_000,
            ..World::default()
        });
        assert_eq!(world.steps, [7_000_000]);
        assert!(world.worst < 7_000_000, "{} ns", world.worst);
        assert!(world.now > 9_900);
    }

    #[test]
    fn what_somebody_set_is_not_fought_and_ends_when_it_is_set_right() {
        let world = live(World {
            settings: vec![(1000, 3600 * SECOND), (5000, -2_000_000)],
            ..World::default()
        });
        assert_eq!(world.steps, []);
        assert!(world.offset.abs() < 7_000_000, "{} ns", world.offset);
        let never = live(World {
            settings: vec![(1000, 3600 * SECOND)],
            ..World::default()
        });
        assert_eq!(never.steps, []);
        assert_eq!((never.now, never.offset), (1000, 3600 * SECOND));
    }

    #[test]
    fn a_pause_that_nobody_told_of_is_made_good_at_the_next_comparison() {
        let fake = Fake(RefCell::new(World::default()));
        let mut keeper = Keeper::begin(&fake).unwrap();
        fake.0.borrow_mut().offset = 3600 * SECOND;
        keeper.turn(Cause::Due).unwrap();
        assert_eq!(fake.0.borrow().offset, 0);
        // Its own step does not look like somebody's.
        assert!(!fake.0.borrow().was_set);
    }

    #[test]
    fn a_host_whose_clock_cannot_be_read_for_a_while_is_asked_again() {
        let fake = Fake(RefCell::new(World::default()));
        let mut keeper = Keeper::begin(&fake).unwrap();
        fake.0.borrow_mut().broken = true;
        assert!(keeper.turn(Cause::Due).is_err());
        let armed = fake.0.borrow().armed;
        assert_eq!(armed, PERIOD.as_secs() as i64);
        assert!(keeper.turn(Cause::Due).is_err());
        fake.0.borrow_mut().broken = false;
        fake.0.borrow_mut().offset = SECOND;
        keeper.turn(Cause::Due).unwrap();
        assert_eq!(fake.0.borrow().offset, 0);
        // Nor is forgotten what happened meanwhile.
        fake.0.borrow_mut().broken = true;
        assert!(keeper.turn(Cause::ClockSet).is_err());
        fake.0.borrow_mut().broken = false;
        fake.0.borrow_mut().offset = SECOND;
        keeper.turn(Cause::Due).unwrap();
        assert_eq!(fake.0.borrow().offset, SECOND);
    }
}
