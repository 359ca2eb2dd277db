//! The TXT records of an order. The set at `_acme-challenge.` of each name is the appliance's alone:
//! what is in it is removed before an order, because one that was cut may have left it there, and
//! after it, also when it fails or is cut while proxy lives.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::update::{UpdateError, Zone};

pub(super) struct Records {
    zone: Arc<Zone>,
    /// Names with the values of this order. The domain and the names below it prove themselves at
    /// the same place.
    sets: Vec<(String, Vec<String>)>,
    /// There may be something to remove.
    dirty: bool,
}

impl Records {
    /// Removes what is at the places for `names`.
    pub(super) async fn clean(zone: Zone, names: &[String]) -> Result<Self, UpdateError> {
        let mut sets: Vec<(String, Vec<String>)> = Vec::new();
        for name in names {
            let at = place(name);
            if !sets.iter().any(|(known, _)| *known == at) {
                zone.set_txt(&at, &[]).await?;
                sets.push((at, Vec::new()));
            }
        }
        Ok(Self {
            zone: Arc::new(zone),
            sets,
            dirty: false,
        })
    }

    /// Takes a value for `name`, to be set with the others.
    pub(super) fn note(&mut self, name: &str, value: String) {
        let at = place(name);
        match self.sets.iter_mut().find(|(known, _)| *known == at) {
            Some((_, values)) => values.push(value),
            None => self.sets.push((at, vec![value])),
        }
    }

    /// Sets what was noted, and waits until the zone's other servers have it.
    pub(super) async fn set(&mut self, propagation: Duration) -> Result<(), UpdateError> {
        for (at, values) in &self.sets {
            if !values.is_empty() {
                self.dirty = true;
                self.zone.set_txt(at, values).await?;
            }
        }
        if self.dirty {
            sleep(propagation).await;
        }
        Ok(())
    }

    /// Removes what was set.
    pub(super) async fn remove(mut self) {
        if self.dirty {
            remove(&self.zone, &self.sets).await;
            self.dirty = false;
        }
    }
}

impl Drop for Records {
    /// The order was cut: by its deadline, or because control has gone.
    fn drop(&mut self) {
        if !self.dirty {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (zone, sets) = (Arc::clone(&self.zone), std::mem::take(&mut self.sets));
            // It ends by itself: each update has a deadline.
            runtime.spawn(async move { remove(&zone, &sets).await });
        }
    }
}

async fn remove(zone: &Zone, sets: &[(String, Vec<String>)]) {
    for (at, _) in sets {
        if let Err(error) = zone.set_txt(at, &[]).await {
            tracing::warn!(%error, name = at, "the TXT record of an order is left until the next one");
        }
    }
}

fn place(name: &str) -> String {
    format!("_acme-challenge.{}", name.trim_start_matches("*."))
}
