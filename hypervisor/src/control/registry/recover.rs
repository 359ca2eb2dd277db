//! What the registry finds when control starts: VMs that are off, that run, or that ended meanwhile;
//! creates that were never answered, which are undone; and runs that no VM has, which are ended.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::host::supervisor::Run;
use protocol::vm::EndReason;

use super::super::store::record::{RunState, VmRecord};
use super::super::store::{StoreError, is_damage};
use super::super::supervisor_client::{Exit, SupervisorError};
use super::super::vm::{Beginning, end_run, give_up_run};
use super::Registry;

impl Registry {
    /// Brings back what the state directory and the supervisor know.
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), RecoverError> {
        let running = self.host.supervisor.list().await?;
        let ended: HashMap<Run, Exit> = self.host.supervisor.ended_runs().into_iter().collect();
        self.remove_dead_sockets(&running);
        let host = self.host.clone();
        let (found, deleted) = tokio::task::spawn_blocking(move || {
            Ok::<_, StoreError>((host.store.load()?, host.store.load_deleted()?))
        })
        .await
        .map_err(RecoverError::Panicked)??;
        for (name, error) in &found.broken {
            tracing::error!(name, %error, "VM cannot be used");
        }
        // Those found come newest first; the oldest are to be forgotten first.
        for deleted in deleted.into_iter().rev() {
            if found.records.iter().any(|record| record.id == deleted.id) {
                // The host went down inside the delete, before anything was gone.
                self.host.store.forget_deleted(&deleted.id);
                continue;
            }
            let forgotten = self.inner().index.note_deleted(deleted);
            self.forget_deleted(&forgotten);
        }
        let mut stray: Vec<Run> = running.clone();
        stray.extend(ended.keys().cloned());
        // What cannot be read now may be read by another version or at another time.
        stray.retain(|run| {
            let mut unread = found.broken.iter().filter(|(_, error)| !is_damage(error));
            !unread.any(|(name, _)| name == run.vm.as_str())
        });
        let mut found_vms = Vec::new();
        for record in found.records {
            let run = Run {
                vm: record.id.clone(),
                generation: record.generation,
            };
            let runs = running.contains(&run);
            if !record.acknowledged {
                // Its create was never answered; whoever waits for it asks again.
                tracing::info!(vm = %record.id, "undoing a create that was not finished");
                stray.retain(|other| *other != run);
                let process = runs || ended.contains_key(&run);
                self.undo(record, run, process);
                continue;
            }
            let beginning = match ended.get(&run) {
                _ if record.run == RunState::Off => Beginning::Off,
                Some(exit) => Beginning::Ended(*exit),
                None if runs => Beginning::Adopt,
                None => Beginning::Off,
            };
            if !matches!(beginning, Beginning::Off) {
                stray.retain(|other| *other != run);
            }
            let record = self.after_host_restart(record, &beginning).await;
            found_vms.push((record, beginning));
        }
        // Before any VM may be started again under that name.
        for run in &stray {
            let _ = std::fs::remove_file(self.host.socket(&run.vm));
        }
        for (record, beginning) in found_vms {
            self.insert(record, beginning, None);
        }
        for run in stray {
            let host = self.host.clone();
            tokio::spawn(async move {
                let mut end = host.supervisor.ended(&run);
                tracing::info!(vm = %run.vm, generation = run.generation, "ending a run that no VM has");
                end_run(&host, &run, &mut end).await;
            });
        }
        Ok(())
    }

    /// Removes the sockets of monitors that are no more.
    fn remove_dead_sockets(&self, running: &[Run]) {
        let live: Vec<_> = running
            .iter()
            .map(|run| self.host.socket(&run.vm))
            .collect();
        for entry in std::fs::read_dir(&self.host.sockets)
            .into_iter()
            .flatten()
            .flatten()
        {
            if !live.contains(&entry.path()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// A VM that was on and has no monitor any more went down with its host.
    async fn after_host_restart(&self, mut record: VmRecord, beginning: &Beginning) -> VmRecord {
        if matches!(beginning, Beginning::Off) && record.run != RunState::Off {
            record.run = RunState::Off;
            record.end_reason = EndReason::HostRestarted;
            record.end_message = "the host went down while it ran; start it again".into();
            let saved = record.clone();
            let save = self.host.blocking(move |host| host.store.save(&saved));
            if let Err(error) = save.await {
                tracing::error!(vm = %record.id, %error, "cannot save the VM's record");
            }
        }
        record
    }

    fn undo(&self, record: VmRecord, run: Run, process: bool) {
        let host = self.host.clone();
        tokio::spawn(async move {
            if process {
                let mut end = host.supervisor.ended(&run);
                give_up_run(&host, &run, &mut end).await;
            }
            let id = record.id.clone();
            if let Err(error) = host.blocking(move |host| host.store.remove_vm(&id)).await {
                tracing::error!(vm = %record.id, %error, "cannot undo a create; the next start tries again");
            }
        });
    }
}

/// Why control cannot go on from where it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    /// The supervisor does not answer.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// The state directory cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Reading it panicked.
    #[error("reading the state directory failed: {0}")]
    Panicked(tokio::task::JoinError),
}
