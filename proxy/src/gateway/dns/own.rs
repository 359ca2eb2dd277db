//! Names that the gateway answers itself: the VM's own, the gateway's, those of their network's
//! addresses, and names that no name server may be asked for (RFC 6761, RFC 7686).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::message::{Question, Reply};

const GUEST: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 213, 0, 2),
    Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 2),
);
const GATEWAY: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 213, 0, 1),
    Ipv6Addr::new(0xfd73, 0x7570, 0, 0, 0, 0, 0, 1),
);
const LOOPBACK: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);

/// The reverse zones of 10.213.0.0/24 and fd73:7570::/64.
const REVERSE: [&str; 2] = [
    "0.213.10.in-addr.arpa",
    "0.0.0.0.0.0.0.0.0.7.5.7.3.7.d.f.ip6.arpa",
];

/// In seconds. The addresses never change, but a VM's name is another one in a copy of it.
const TTL: u32 = 60;

/// The names of one VM.
#[derive(Debug)]
pub(super) struct Own {
    hostname: String,
}

impl Own {
    /// For the VM of this name.
    pub(super) fn new(hostname: &str) -> Self {
        Self {
            hostname: hostname.trim_end_matches('.').to_ascii_lowercase(),
        }
    }

    /// The answer; none for a name of the world.
    pub(super) fn answer(&self, question: &Question) -> Option<Reply> {
        let asked = question.name.to_ascii().to_ascii_lowercase();
        let asked = asked.strip_suffix('.').unwrap_or(&asked);
        let is_or_below = |zone: &str| {
            asked
                .strip_suffix(zone)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if asked == self.hostname {
            return Some(addresses(question, GUEST));
        }
        if asked == "gateway" {
            return Some(addresses(question, GATEWAY));
        }
        if is_or_below("localhost") {
            return Some(addresses(question, LOOPBACK));
        }
        if is_or_below("invalid") || is_or_below("onion") {
            return Some(Reply::empty(ResponseCode::NXDomain));
        }
        REVERSE
            .into_iter()
            .any(is_or_below)
            .then(|| self.reverse(question, asked))
    }

    fn reverse(&self, question: &Question, asked: &str) -> Reply {
        let owner = |(v4, v6): (Ipv4Addr, Ipv6Addr)| {
            [IpAddr::from(v4), v6.into()].into_iter().any(|address| {
                let reverse = Name::from(address).to_ascii();
                reverse.strip_suffix('.').unwrap_or(&reverse) == asked
            })
        };
        let name = if owner(GUEST) {
            self.hostname.as_str()
        } else if owner(GATEWAY) {
            "gateway"
        } else if REVERSE.contains(&asked) {
            return Reply::empty(ResponseCode::NoError);
        } else {
            return Reply::empty(ResponseCode::NXDomain);
        };
        let mut reply = Reply::empty(ResponseCode::NoError);
        if let Ok(mut name) = Name::from_ascii(name)
            && question.record_type == RecordType::PTR
        {
            name.set_fqdn(true);
            let data = RData::PTR(PTR(name));
            reply
                .answers
                .push(Record::from_rdata(question.name.clone(), TTL, data));
        }
        reply
    }
}

fn addresses(question: &Question, (v4, v6): (Ipv4Addr, Ipv6Addr)) -> Reply {
    let mut reply = Reply::empty(ResponseCode::NoError);
    let data = match question.record_type {
        RecordType::A => RData::A(v4.into()),
        RecordType::AAAA => RData::AAAA(v6.into()),
        // The name is there, this type of it is not.
        _ => return reply,
    };
    reply
        .answers
        .push(Record::from_rdata(question.name.clone(), TTL, data));
    reply
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, Query};

    use super::*;

    fn ask(name: &str, record_type: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
        let question = Question::read(&message.to_vec().unwrap()).unwrap();
        let reply = Own::new("Supvm-1a2b").answer(&question)?;
        let data = reply.answers.iter().map(|record| record.data.to_string());
        Some((reply.code, data.collect()))
    }

    #[test]
    fn the_vms_own_name_the_gateways_and_their_addresses_are_answered() {
        use RecordType::{A, AAAA, MX, PTR};
        let six = |last| format!("{last}.{}{}.", "0.".repeat(15), REVERSE[1]);
        for (name, record_type, expected) in [
            ("supvm-1a2b.", A, "10.213.0.2"),
            ("SUPVM-1A2B.", AAAA, "fd73:7570::2"),
            ("gateway.", A, "10.213.0.1"),
            ("gateway.", AAAA, "fd73:7570::1"),
            ("localhost.", A, "127.0.0.1"),
            ("a.localhost.", AAAA, "::1"),
            ("2.0.213.10.in-addr.arpa.", PTR, "supvm-1a2b."),
            ("1.0.213.10.in-addr.arpa.", PTR, "gateway."),
            (six(2).as_str(), PTR, "supvm-1a2b."),
            (six(1).as_str(), PTR, "gateway."),
        ] {
            let answer = ask(name, record_type).unwrap();
            assert_eq!(
                answer,
                (ResponseCode::NoError, vec![expected.to_owned()]),
                "{name}"
            );
        }
        let nothing = Some((ResponseCode::NoError, vec![]));
        assert_eq!(ask("supvm-1a2b.", MX), nothing);
        assert_eq!(ask("2.0.213.10.in-addr.arpa.", A), nothing);
        assert_eq!(ask("0.213.10.in-addr.arpa.", PTR), nothing);
        for name in [
            "3.0.213.10.in-addr.arpa.",
            "x.onion.",
            "invalid.",
            six(3).as_str(),
        ] {
            assert_eq!(
                ask(name, PTR),
                Some((ResponseCode::NXDomain, vec![])),
                "{name}"
            );
        }
    }

    #[test]
    fn names_of_the_world_are_not_the_gateways() {
        for name in [
            "example.org.",
            "supvm-1a2b.example.org.",
            "a.supvm-1a2b.",
            "gateway.example.",
            "notlocalhost.",
            "8.8.8.8.in-addr.arpa.",
            "2.1.213.10.in-addr.arpa.",
            "10.213.10.in-addr.arpa.",
            ".",
        ] {
            assert_eq!(ask(name, RecordType::A), None, "{name}");
        }
    }
}
