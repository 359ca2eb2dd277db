//! VMs that are not attached: who may come in, and waking them. To wake one, all visitors of one
//! address share one question to control, which ends with the last of them. What a VM that sleeps costs is one start, however many ask.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use protocol::host::proxy::{Awake, LookUp, LookedUp, Wake};
use protocol::id::{Subdomain, VmId};
use protocol::network::Publication;
use protocol::{ErrorBody, ErrorCode, Kind};

use super::{Vms, refusal};

/// Which VM woke, in which of its starts.
type Woken = Result<(VmId, u64), ErrorBody>;

type Question = BoxFuture<'static, Woken>;

/// The questions under way.
#[derive(Debug, Default)]
pub(super) struct Waking {
    last: u64,
    /// With a number, so that the end of one does not take the next one away.
    questions: HashMap<Subdomain, (u64, WeakShared<Question>)>,
}

#[cfg(test)]
impl Waking {
    pub(super) fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }
}

impl Vms {
    /// Who may come in at a public address: known at once when its VM is attached, else control is
    /// asked, which starts nothing for it.
    pub(crate) async fn publication(
        &self,
        subdomain: &Subdomain,
    ) -> Result<Publication, ErrorBody> {
        if let Some(vm) = self.find(subdomain) {
            return Ok(vm.publication().as_ref().clone());
        }
        if self.lock().unknown.has(subdomain, Instant::now()) {
            return Err(nobody());
        }
        let look_up = LookUp {
            subdomain: subdomain.clone(),
        };
        let answer = self.desk.ask_edge(&look_up).await;
        let looked_up = answer.and_then(|answer| {
            if answer.frame.kind != Kind::LOOKED_UP {
                return Err(refusal(&answer.frame));
            }
            Ok(protocol::decode::<LookedUp>(&answer.frame)?)
        });
        if let Err(error) = &looked_up
            && error.code == ErrorCode::VmNotFound
        {
            let mut state = self.lock();
            // A VM may have been made with it while control answered.
            if !state.by_label.contains_key(subdomain) {
                state.unknown.remember(look_up.subdomain, Instant::now());
            }
        }
        Ok(looked_up?.publication)
    }

    /// Makes sure that the VM of a public address is up: at once when it is attached, else by asking
    /// control, which starts it. Whoever calls sets the deadline; giving up waiting takes nothing back.
    pub(crate) async fn wake(self: &Arc<Self>, subdomain: &Subdomain) -> Woken {
        if let Some(vm) = self.find(subdomain) {
            return Ok((vm.id.clone(), vm.generation));
        }
        self.question(subdomain)?.await
    }

    fn question(self: &Arc<Self>, subdomain: &Subdomain) -> Result<Shared<Question>, ErrorBody> {
        let mut state = self.lock();
        if state.unknown.has(subdomain, Instant::now()) {
            return Err(nobody());
        }
        let questions = &state.waking.questions;
        if let Some(question) = questions.get(subdomain).and_then(|(_, one)| one.upgrade()) {
            return Ok(question);
        }
        state.waking.last = state.waking.last.wrapping_add(1);
        let number = state.waking.last;
        let forget = Forget {
            vms: Arc::downgrade(self),
            subdomain: subdomain.clone(),
            number,
        };
        let desk = Arc::clone(&self.desk);
        let question = async move {
            let wake = Wake {
                subdomain: forget.subdomain.clone(),
            };
            let woken = desk.ask_edge(&wake).await.and_then(|answer| {
                if answer.frame.kind != Kind::AWAKE {
                    return Err(refusal(&answer.frame));
                }
                let Awake { vm, generation } = protocol::decode(&answer.frame)?;
                Ok((vm, generation))
            });
            if let Err(error) = &woken
                && error.code == ErrorCode::VmNotFound
                && let Some(vms) = forget.vms.upgrade()
            {
                vms.lock().unknown.remember(wake.subdomain, Instant::now());
            }
            woken
        };
        let question = question.boxed().shared();
        if let Some(weak) = question.downgrade() {
            state
                .waking
                .questions
                .insert(subdomain.clone(), (number, weak));
        }
        Ok(question)
    }
}

fn nobody() -> ErrorBody {
    ErrorBody::caller(ErrorCode::VmNotFound, "there is no VM at this address")
}

/// Forgets a question when it is answered or nobody waits any more.
struct Forget {
    vms: Weak<Vms>,
    subdomain: Subdomain,
    number: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        let Some(vms) = self.vms.upgrade() else {
            return;
        };
        let mut state = vms.state.lock().unwrap_or_else(PoisonError::into_inner);
        let questions = &mut state.waking.questions;
        if questions
            .get(&self.subdomain)
            .is_some_and(|(number, _)| *number == self.number)
        {
            questions.remove(&self.subdomain);
        }
    }
}
