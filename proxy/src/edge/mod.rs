//! The edge: HTTPS from the world to the ports of VMs. It knows VMs only through [`Guests`], and
//! certificates only as the TLS configuration it is given. Every byte of a visitor and every byte of
//! a guest is an attacker's: neither may be felt by others.

mod access;
mod activity;
mod body;
pub mod challenges;
mod connection;
mod forward;
mod framing;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guests;
mod header_blocks;
mod headers;
pub mod limits;
mod links;
mod listen;
mod log;
mod pages;
mod places;
mod pool;
mod redirect;
mod root;
mod route;
mod service;
mod tasks;
mod tunnel;
mod visitor;
mod websocket;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use protocol::host::proxy::{AdmitLink, CustomDomain, ServeEdge};
use protocol::network::DomainName;
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use tokio::sync::Mutex;
use tokio::time::Instant;

use access::Tries;
use challenges::Challenges;
use guests::{Guest, Guests};
use limits::Limits;
use links::Links;
use listen::{Listening, Speaks};
use places::Places;
use pool::{Pools, VmPool};
use root::Root;
use route::Route;
use tasks::Tasks;

use crate::Quiet;

/// The edge, listening where it was told to.
#[derive(Debug)]
pub struct Edge<G> {
    core: Arc<Core<G>>,
    listening: Mutex<Listeners>,
    /// Kept over changes of the certificate, so that sessions can be resumed.
    tickets: Option<Arc<dyn ProducesTickets>>,
}

#[derive(Debug, Default)]
struct Listeners {
    https: Listening,
    http: Listening,
}

/// What the edge serves now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Where it listens for TLS, with the actual port; empty for nowhere.
    pub https_address: String,
    /// Where it listens for plain HTTP, likewise.
    pub http_address: String,
    /// What it does not serve and why; empty when all is well.
    pub message: String,
}

/// What all connections share.
#[derive(Debug)]
struct Core<G> {
    guests: Arc<G>,
    limits: Arc<Limits>,
    names: RwLock<Arc<Names>>,
    tls: RwLock<Option<Arc<rustls::ServerConfig>>>,
    challenges: Arc<Challenges>,
    places: Arc<Places>,
    pools: Pools,
    tries: Tries,
    links: Links,
    tasks: Tasks,
    /// The access log's allowance.
    log: Quiet,
}

/// Under which names VMs are reached.
#[derive(Debug)]
struct Names {
    domain: String,
    public_port: u16,
    /// The built-in authority, where something that is shown comes from it.
    root: Option<Root>,
    /// Names beside the domain, with what they lead to.
    custom: HashMap<String, Route>,
}

impl Names {
    /// Where the name `host` leads, as [`route::host_name`] gives it.
    fn route(&self, host: &str) -> Route {
        let custom = self.custom.get(host).cloned();
        custom.unwrap_or_else(|| route::route(host, &self.domain))
    }
}

/// A name of the operator's and where it leads.
fn custom(domain: &CustomDomain) -> (String, Route) {
    let guest = Route::Guest {
        subdomain: domain.subdomain.clone(),
        port: domain.port,
    };
    (domain.name.to_ascii_lowercase(), guest)
}

impl<G: Guests> Edge<G> {
    /// An edge that listens nowhere yet.
    pub fn new(guests: Arc<G>, limits: Limits) -> Self {
        let tickets = rustls::crypto::ring::Ticketer::new();
        if let Err(error) = &tickets {
            tracing::warn!(%error, "TLS sessions cannot be resumed");
        }
        let limits = Arc::new(limits);
        Self {
            core: Arc::new(Core {
                guests,
                tries: Tries::new(limits.tries, limits.tries_period),
                places: Places::new(&limits),
                limits,
                names: RwLock::new(Arc::new(Names {
                    domain: String::new(),
                    public_port: 443,
                    root: None,
                    custom: HashMap::new(),
                })),
                tls: RwLock::new(None),
                challenges: Arc::default(),
                pools: Pools::default(),
                links: Links::default(),
                tasks: Tasks::default(),
                log: Quiet::new(),
            }),
            listening: Mutex::default(),
            tickets: tickets.ok(),
        }
    }

    /// Serves what `serve` says from now on. Connections that are open go on.
    pub async fn apply(&self, serve: &ServeEdge) -> Applied {
        let mut applied = Applied::default();
        let mut listening = self.listening.lock().await;
        let domain = if serve.https_address.is_empty() && serve.http_address.is_empty() {
            Ok(String::new())
        } else {
            serve
                .domain
                .parse()
                .map(|domain: DomainName| domain.as_str().to_owned())
        };
        let serve = match domain {
            Ok(domain) => {
                let public_port = match serve.public_port {
                    0 => 443,
                    port => port,
                };
                let names = Arc::new(Names {
                    domain,
                    public_port,
                    root: Root::new(&serve.authority),
                    custom: serve.custom.iter().map(custom).collect(),
                });
                *self
                    .core
                    .names
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = names;
                serve.clone()
            }
            Err(error) => {
                applied.message = format!("the domain of the VMs: {error}");
                ServeEdge::default()
            }
        };
        let https = &mut listening.https;
        match https
            .apply(&serve.https_address, Speaks::Tls, &self.core)
            .await
        {
            Ok(address) => applied.https_address = address,
            Err(error) => applied.message = error.to_string(),
        }
        let http = &mut listening.http;
        match http
            .apply(&serve.http_address, Speaks::Plain, &self.core)
            .await
        {
            Ok(address) => applied.http_address = address,
            Err(error) if applied.message.is_empty() => applied.message = error.to_string(),
            Err(error) => applied.message = format!("{}; {error}", applied.message),
        }
        applied
    }

    /// Takes in a link that lets one visitor in to a VM with a token.
    pub fn admit(&self, link: &AdmitLink) {
        self.core.links.admit(link, Instant::now());
    }

    /// Shows these certificates from now on. Connections that are open go on with the old ones.
    /// ALPN and session tickets are the edge's to set.
    pub fn set_tls(&self, config: Arc<rustls::ServerConfig>) {
        let mut config = rustls::ServerConfig::clone(&config);
        // In the order of preference; old clients offer nothing but the last.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec(), b"http/1.0".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        if let Some(tickets) = &self.tickets {
            config.ticketer = Arc::clone(tickets);
        }
        *self
            .core
            .tls
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(config));
    }

    /// Where certificates for names are ordered by TLS-ALPN-01.
    pub fn challenges(&self) -> Arc<Challenges> {
        Arc::clone(&self.core.challenges)
    }

    /// The domain below which VMs have their names; empty while it is not known.
    pub fn domain(&self) -> String {
        self.core.names().domain.clone()
    }

    /// How many of its tasks panicked.
    pub fn panics(&self) -> u64 {
        self.core.tasks.panics()
    }
}

impl<G: Guests> Core<G> {
    fn names(&self) -> Arc<Names> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&names)
    }

    fn tls(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The pool of a VM, which goes when this start of the VM ends.
    fn pool(self: &Arc<Self>, guest: &Guest) -> Arc<VmPool> {
        let (pool, new) = self.pools.of(guest, &self.limits, &self.tasks);
        if new {
            let (core, guest, watched) = (Arc::clone(self), guest.clone(), Arc::clone(&pool));
            self.tasks.spawn(async move {
                // Also when watching panics.
                let _ending = Ending {
                    core: &core,
                    guest: &guest,
                    pool: &watched,
                };
                core.guests.ended(&guest).await;
            });
        }
        pool
    }
}

/// Ends a pool when it goes.
struct Ending<'a, G> {
    core: &'a Core<G>,
    guest: &'a Guest,
    pool: &'a Arc<VmPool>,
}

impl<G> Drop for Ending<'_, G> {
    fn drop(&mut self) {
        self.core.pools.end(&self.guest.vm, self.pool);
    }
}
