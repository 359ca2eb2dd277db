//! The name server at each VM's gateway address: it reads a guest's query, asks the VM's policy
//! about the name, and answers from names of its own, from what is known, or from the name servers
//! that the host was told. It must never resolve a name for a VM whose rules close it, and never
//! read the host's own resolver configuration.

mod answer;
mod cache;
mod exchange;
mod failures;
#[cfg(fuzzing)]
pub mod fuzz;
mod message;
mod own;
mod upstream;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RecordType};
use protocol::network::DomainName;
use tokio::sync::Semaphore;

use crate::gateway::policy::{Policy, Verdict};
use answer::Ask;
use message::{Question, Rejected, Reply};
use own::Own;
use upstream::Failure;
pub use upstream::{MAX_SERVERS, Upstreams};

/// Names of one VM that are being looked up at the same time; more are answered `SERVFAIL`.
pub const MAX_UNDER_WAY: usize = 64;

/// How a query came, and so how its answer goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In one datagram: an answer that does not fit is cut and says so.
    Udp,
    /// On a connection, without the length before it.
    Tcp,
}

/// What one VM asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsCounters {
    /// Queries that were read, sound or not.
    pub asked: u64,
    /// Those that the rules refused.
    pub denied: u64,
    /// Those that a limit refused.
    pub limited: u64,
    /// Those that no name server answered.
    pub failed: u64,
}

/// One VM's name server.
#[derive(Debug)]
pub struct Resolver {
    own: Own,
    policy: Arc<Policy>,
    upstreams: Arc<Upstreams>,
    under_way: Semaphore,
    asked: AtomicU64,
    denied: AtomicU64,
    limited: AtomicU64,
    failed: AtomicU64,
}

impl Resolver {
    /// For the VM that calls itself `hostname`.
    pub fn new(hostname: &str, policy: Arc<Policy>, upstreams: Arc<Upstreams>) -> Self {
        Self {
            own: Own::new(hostname),
            policy,
            upstreams,
            under_way: Semaphore::new(MAX_UNDER_WAY),
            asked: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            limited: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Answers a query; none means silence. It always ends within seconds, and may be dropped.
    /// Callers may have any number of these under way: beyond a limit they end at once.
    pub async fn answer(&self, query: Vec<u8>, over: Transport) -> Option<Vec<u8>> {
        count(&self.asked);
        let question = match Question::read(&query) {
            Ok(question) => question,
            Err(Rejected::Silently) => return None,
            Err(Rejected::With(bytes)) => return Some(bytes),
        };
        drop(query);
        let reply = self.reply(&question).await;
        question.write(&reply, over)
    }

    /// What was counted.
    pub fn counters(&self) -> DnsCounters {
        DnsCounters {
            asked: self.asked.load(Ordering::Relaxed),
            denied: self.denied.load(Ordering::Relaxed),
            limited: self.limited.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    async fn reply(&self, question: &Question) -> Reply {
        if let Some(reply) = self.own.answer(question) {
            return reply;
        }
        let name = if question.name.is_root() {
            None
        } else {
            match question.name.to_ascii().parse::<DomainName>() {
                Ok(name) => Some(name),
                // Rules could not speak about it, so they could be got round by it.
                Err(_) => return Reply::empty(ResponseCode::Refused),
            }
        };
        // Before anything that is shared with other VMs.
        if self.policy.may_ask(name.as_ref()) == Verdict::Deny {
            count(&self.denied);
            return Reply::blocked();
        }
        let Ok(_under_way) = self.under_way.try_acquire() else {
            count(&self.limited);
            return Reply::failed("this VM looks up too many names at the same time");
        };
        let ask = Ask::new(
            &question.name,
            question.record_type,
            question.dnssec_ok(),
            question.checking_disabled,
        );
        let (answer, age) = match self.upstreams.resolve(ask).await {
            Ok(answer) => answer,
            Err(failure) => {
                count(if failure == Failure::Busy {
                    &self.limited
                } else {
                    &self.failed
                });
                return Reply::failed(failure.text());
            }
        };
        // The rules may have changed while the VM waited.
        if self.policy.may_ask(name.as_ref()) == Verdict::Deny {
            count(&self.denied);
            return Reply::blocked();
        }
        let reply = answer.reply(&question.name, age);
        if let Some(name) = name
            && matches!(question.record_type, RecordType::A | RecordType::AAAA)
        {
            let addresses = answer::addresses(&question.name, &reply.answers);
            self.policy.pin(&name, &addresses);
        }
        reply
    }
}

/// The addresses of a name, IPv4 first, for proxy's own use; none when nobody knows it.
pub(crate) async fn lookup(upstreams: &Arc<Upstreams>, host: &str) -> Vec<IpAddr> {
    let Ok(mut name) = Name::from_ascii(host) else {
        return Vec::new();
    };
    name.set_fqdn(true);
    let mut found = Vec::new();
    for record_type in [RecordType::A, RecordType::AAAA] {
        let ask = Ask::new(&name, record_type, false, false);
        if let Ok((answer, age)) = upstreams.resolve(ask).await {
            let reply = answer.reply(&name, age);
            let addresses = answer::addresses(&name, &reply.answers);
            found.extend(addresses.into_iter().map(|(address, _)| address));
        }
    }
    found
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
