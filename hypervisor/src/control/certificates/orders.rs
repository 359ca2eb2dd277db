//! All certificates that are ordered from an authority: one for the domain, with the names below it
//! where DNS proves them, and one for each name of the operator's. One is ordered at a time, because
//! proxy carries out one order at a time.

use std::net::SocketAddr;
use std::path::Path;
use std::time::SystemTime;

use protocol::host::proxy::{CertificateOrdered, OrderCertificate};

use super::acme::{Acme, AcmeError, UnderWay};
use super::pair::Pair;
use super::wildcard;
use crate::settings::Settings;

#[derive(Default)]
pub(super) struct Orders {
    all: Vec<Acme>,
    /// Which, and by which ticket.
    under_way: Option<(usize, u64, UnderWay)>,
    tickets: u64,
}

impl Orders {
    pub(super) fn new(settings: &Settings, keys: &Path) -> Self {
        let Some(acme) = &settings.acme else {
            return Self::default();
        };
        let domain = match acme.dns {
            Some(_) => wildcard(&settings.domain),
            None => vec![settings.domain.as_str().to_owned()],
        };
        let mut all = vec![Acme::new(
            acme.clone(),
            acme.dns.clone(),
            domain,
            keys,
            "acme",
        )];
        for custom in &settings.domains {
            let name = custom.name.as_str().to_owned();
            let file = format!("acme-{name}");
            all.push(Acme::new(acme.clone(), None, vec![name], keys, &file));
        }
        Self {
            all,
            ..Self::default()
        }
    }

    /// The line to proxy is a new one: what was ordered over the old one is lost.
    pub(super) fn forget(&mut self) {
        self.under_way = None;
    }

    /// What has to be ordered next, and when.
    pub(super) fn next(&self, now: SystemTime) -> Option<(usize, SystemTime)> {
        let due = self.all.iter().map(|acme| acme.due(now)).enumerate();
        let (which, at) = due.min_by_key(|(_, at)| *at)?;
        match &self.under_way {
            Some((_, _, order)) => Some((which, at.max(order.lost()))),
            None => Some((which, at)),
        }
    }

    /// An order for the certificate of this number.
    pub(super) fn order(
        &mut self,
        which: usize,
        name_servers: &[SocketAddr],
        now: SystemTime,
    ) -> Result<Option<OrderCertificate>, AcmeError> {
        let Some(acme) = self.all.get_mut(which) else {
            return Ok(None);
        };
        let (mut order, key) = acme.order(name_servers, now)?;
        self.tickets = self.tickets.wrapping_add(1);
        order.ticket = self.tickets;
        self.under_way = Some((which, order.ticket, UnderWay { key, since: now }));
        Ok(Some(order))
    }

    /// Takes what came of an order. The names of the certificate; none for an answer that nobody
    /// waits for.
    pub(super) fn ordered(
        &mut self,
        answer: &CertificateOrdered,
        now: SystemTime,
    ) -> Result<Option<&[String]>, AcmeError> {
        let awaited = |under_way: &mut (usize, u64, UnderWay)| under_way.1 == answer.ticket;
        let Some((which, _, order)) = self.under_way.take_if(awaited) else {
            return Ok(None);
        };
        let Some(acme) = self.all.get_mut(which) else {
            return Ok(None);
        };
        acme.ordered(&order.key, answer, now)?;
        Ok(Some(acme.names()))
    }

    /// What to show for the domain and all names below it.
    pub(super) fn wildcard(&self, now: SystemTime) -> Option<&Pair> {
        let acme = self.all.iter().find(|acme| acme.names().len() > 1)?;
        acme.pair(now)
    }

    /// What to show for single names.
    pub(super) fn named(&self, now: SystemTime) -> impl Iterator<Item = (&str, &Pair)> {
        self.all.iter().filter_map(move |acme| match acme.names() {
            [name] => Some((name.as_str(), acme.pair(now)?)),
            _ => None,
        })
    }
}
