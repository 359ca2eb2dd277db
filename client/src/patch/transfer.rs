//! Uploads and downloads that go on while the patch does something else: one thread each, a bound
//! on how many, and one place to wait for them. The patch's end waits for all of them.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Failure;
use super::interrupt::Interrupt;
use super::media::Media;

/// The most transfers at one time.
const MAX_ACTIVE: usize = 32;

/// What a transfer gives.
#[derive(Clone, Debug)]
pub(super) enum Product {
    /// The path that was uploaded to, as the patch shows it.
    Path(String),
    /// What was downloaded.
    Media(Box<Media>),
}

/// Tells how far one transfer is.
pub(super) struct Report {
    shared: Arc<Shared>,
    id: u32,
}

impl Report {
    /// So many of so many bytes; an unknown sum stands at what was told last.
    pub(super) fn at(&self, done: u64, total: Option<u64>) {
        let Some(total) = total.filter(|total| *total > 0) else {
            return;
        };
        let percent = u128::from(done)
            .saturating_mul(100)
            .checked_div(total.into())
            .unwrap_or(0)
            // A hundred is the end, and the end is when everything is in its place.
            .min(99) as u8;
        let mut table = self.shared.table();
        if let Some(transfer) = table.get_mut(&self.id)
            && percent > transfer.percent
        {
            transfer.percent = percent;
            self.shared.changed.notify_all();
        }
    }
}

#[derive(Default)]
struct Shared {
    table: Mutex<HashMap<u32, Transfer>>,
    changed: Condvar,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, HashMap<u32, Transfer>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Transfer {
    /// For a complaint at the end.
    what: String,
    percent: u8,
    result: Option<Result<Product, Failure>>,
    /// Whether the patch has been told of the result.
    seen: bool,
}

/// All transfers of a run.
pub(super) struct Transfers {
    shared: Arc<Shared>,
    interrupt: Interrupt,
    next: u32,
}

impl Transfers {
    /// None yet.
    pub(super) fn new(interrupt: Interrupt) -> Self {
        let shared = Arc::new(Shared::default());
        let waiting = Arc::clone(&shared);
        interrupt.on_set(move || {
            // Under the lock, or a waiter between its look and its wait would miss it.
            let _table = waiting.table();
            waiting.changed.notify_all();
        });
        Self {
            shared,
            interrupt,
            next: 0,
        }
    }

    /// Starts one.
    pub(super) fn start(
        &mut self,
        what: String,
        work: impl FnOnce(&Report) -> Result<Product, Failure> + Send + 'static,
    ) -> Result<u32, Failure> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        {
            let mut table = self.shared.table();
            let active = table.values().filter(|one| one.result.is_none()).count();
            if active >= MAX_ACTIVE {
                return Err(Failure::Host {
                    code: "TOO_MANY_TRANSFERS".into(),
                    message: format!(
                        "{MAX_ACTIVE} transfers are under way: wait() for one before the next"
                    ),
                });
            }
            let transfer = Transfer {
                what,
                percent: 0,
                result: None,
                seen: false,
            };
            table.insert(id, transfer);
        }
        let report = Report {
            shared: Arc::clone(&self.shared),
            id,
        };
        let spawned = std::thread::Builder::new()
            .name("transfer".into())
            .spawn(move || {
                let worked =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&report)));
                let result = worked.unwrap_or_else(|_| {
                    Err(Failure::Host {
                        code: "BROKEN".into(),
                        message: "the transfer broke off: this is a defect of sup".into(),
                    })
                });
                let mut table = report.shared.table();
                if let Some(transfer) = table.get_mut(&report.id) {
                    if result.is_ok() {
                        transfer.percent = 100;
                    }
                    transfer.result = Some(result);
                }
                report.shared.changed.notify_all();
            });
        match spawned {
            Ok(_) => Ok(id),
            Err(error) => {
                self.shared.table().remove(&id);
                Err(Failure::Host {
                    code: "NO_THREAD".into(),
                    message: format!("no thread for a transfer: {error}"),
                })
            }
        }
    }

    /// Waits until one is further than `after`, and says how far.
    pub(super) fn progress(&self, id: u32, after: i32) -> Result<u8, Failure> {
        self.wait_until(id, |transfer| match &transfer.result {
            Some(Ok(_)) => Some(Ok(100)),
            Some(Err(failure)) => {
                transfer.seen = true;
                Some(Err(failure.clone()))
            }
            None if i32::from(transfer.percent) > after => Some(Ok(transfer.percent)),
            None => None,
        })
    }

    /// Waits for the end of one.
    pub(super) fn wait(&self, id: u32) -> Result<Product, Failure> {
        self.wait_until(id, |transfer| {
            let result = transfer.result.clone()?;
            transfer.seen = true;
            Some(result)
        })
    }

    /// Waits for all, and gives what failed without the patch having been told.
    pub(super) fn finish(&self) -> Result<Vec<String>, Failure> {
        let mut table = self.shared.table();
        while table.values().any(|transfer| transfer.result.is_none()) {
            if self.interrupt.is_set() {
                return Err(Failure::Interrupted);
            }
            table = self
                .shared
                .changed
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let mut failed: Vec<String> = table
            .values()
            .filter(|transfer| !transfer.seen)
            .filter_map(|transfer| match &transfer.result {
                Some(Err(failure)) => Some(format!("{}: {failure}", transfer.what)),
                _ => None,
            })
            .collect();
        failed.sort();
        Ok(failed)
    }

    fn wait_until<T>(
        &self,
        id: u32,
        mut look: impl FnMut(&mut Transfer) -> Option<Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut table = self.shared.table();
        loop {
            let transfer = table
                .get_mut(&id)
                .ok_or_else(|| Failure::Usage(format!("there is no transfer {id}")))?;
            if let Some(found) = look(transfer) {
                return found;
            }
            if self.interrupt.is_set() {
                return Err(Failure::Interrupted);
            }
            table = self
                .shared
                .changed
                .wait(table)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
