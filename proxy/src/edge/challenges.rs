//! Proof for an authority that a name leads here (TLS-ALPN-01, RFC 8737). Who offers `acme-tls/1` and
//! nothing else, for a name that is being proved, is shown that name's proof; its connection ends
//! with the handshake. Nobody else sees it, and no request is ever served on such a connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::ServerConfig;
use rustls::server::ClientHello;

/// The protocol's name in ALPN.
pub(crate) const ALPN: &[u8] = b"acme-tls/1";

/// The names that are being proved, each with what its handshakes show.
#[derive(Debug, Default)]
pub struct Challenges(Mutex<HashMap<String, Arc<ServerConfig>>>);

/// A name that is being proved, until this goes.
#[derive(Debug)]
pub(crate) struct Proving {
    challenges: Arc<Challenges>,
    name: String,
    config: Arc<ServerConfig>,
}

impl Challenges {
    /// Shows `config` for `name` from now on.
    pub(crate) fn prove(self: &Arc<Self>, name: &str, config: Arc<ServerConfig>) -> Proving {
        let name = name.to_ascii_lowercase();
        self.lock().insert(name.clone(), Arc::clone(&config));
        Proving {
            challenges: Arc::clone(self),
            name,
            config,
        }
    }

    /// What to show to this visitor, when it is an authority that looks at a name being proved.
    pub(crate) fn answer(&self, hello: &ClientHello<'_>) -> Option<Arc<ServerConfig>> {
        let mut offered = hello.alpn()?;
        if offered.next() != Some(ALPN) || offered.next().is_some() {
            return None;
        }
        let name = hello.server_name()?.to_ascii_lowercase();
        self.lock().get(&name).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<ServerConfig>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proving {
    fn drop(&mut self) {
        let mut names = self.challenges.lock();
        // A newer order may prove the same name.
        let own = names.get(&self.name);
        if own.is_some_and(|config| Arc::ptr_eq(config, &self.config)) {
            names.remove(&self.name);
        }
    }
}
