//! Answers of name servers: whether bytes that came are the answer to what was asked, and what is
//! in them. A name server may be hostile, and anybody may guess at its answers.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::message::{HEADER, Reply};

/// What we take over UDP in one piece (the DNS Flag Day 2020's).
const PAYLOAD: u16 = 1232;

/// How long answers are kept at most, whatever they say.
const LONGEST: u32 = 24 * 60 * 60;
const LONGEST_NEGATIVE: u32 = 60 * 60;

/// How many steps of CNAMEs are followed from the name that was asked for.
const MAX_CHAIN: usize = 16;

/// What is asked of a name server; the same for every VM that asks it, and so the key of caches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ask {
    /// In lower case, fully qualified.
    name: Name,
    record_type: RecordType,
    dnssec_ok: bool,
    checking_disabled: bool,
}

/// A query on its way.
pub(super) struct Sent {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
}

/// What bytes from a name server's address are.
pub(super) enum Received {
    /// The answer.
    Answer(Box<Answer>),
    /// An answer that did not fit, or one whose question is spelled in another way than ours: TCP
    /// tells.
    AskOverTcp,
    /// The server cannot tell; another one might.
    Failed(ResponseCode),
    /// Not what was asked for: somebody is guessing, or it is late.
    Wrong,
}

/// A checked answer: the name exists and has these records, or it does not.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    code: ResponseCode,
    authentic: bool,
    answers: Vec<Record>,
    authorities: Vec<Record>,
    additionals: Vec<Record>,
    /// How long it may be kept; zero for not at all.
    pub(super) ttl: Duration,
    /// What it takes in memory, about.
    pub(super) size: usize,
}

impl Ask {
    pub(super) fn new(
        name: &Name,
        record_type: RecordType,
        dnssec_ok: bool,
        checking_disabled: bool,
    ) -> Self {
        let mut name = name.to_lowercase();
        name.set_fqdn(true);
        Self {
            name,
            record_type,
            dnssec_ok,
            checking_disabled,
        }
    }

    /// A query with an id of its own and a spelling of its own: with the port, what somebody who
    /// does not see it would have to guess.
    pub(super) fn query(&self) -> Option<Sent> {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = self.checking_disabled;
        let mut name = self.name.clone();
        name.randomize_label_case();
        message.add_query(Query::query(name, self.record_type));
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        edns.set_dnssec_ok(self.dnssec_ok);
        message.set_edns(edns);
        let bytes = message.to_vec().ok()?;
        Some(Sent { bytes })
    }

    /// What `bytes` are to the query that was sent.
    pub(super) fn receive(&self, sent: &Sent, bytes: &[u8], tcp: bool) -> Received {
        match same_question(&sent.bytes, bytes) {
            Same::No => return Received::Wrong,
            Same::ButForSpelling if !tcp => return Received::AskOverTcp,
            Same::ButForSpelling | Same::Exactly => {}
        }
        // Not all servers cut at the end of a record: what is left may not be readable.
        if bytes.get(2).is_some_and(|flags| flags & 0x02 != 0) {
            return if tcp {
                Received::Failed(ResponseCode::ServFail)
            } else {
                Received::AskOverTcp
            };
        }
        match Message::from_vec(bytes) {
            Ok(message) => self.read(message, bytes.len()),
            Err(_) => Received::Failed(ResponseCode::FormErr),
        }
    }

    fn read(&self, message: Message, length: usize) -> Received {
        let code = message.metadata.response_code;
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Received::Failed(code);
        }
        let soa = message
            .authorities
            .iter()
            .find_map(|record| match &record.data {
                RData::SOA(soa) => Some(ttl(record).min(soa.minimum)),
                _ => None,
            });
        // A server that does not resolve names for us and only points at others.
        let referral = message.answers.is_empty()
            && soa.is_none()
            && !message.authorities.is_empty()
            && code == ResponseCode::NoError;
        if referral {
            return Received::Failed(ResponseCode::Refused);
        }
        let positive = message
            .answers
            .iter()
            .any(|record| record.record_type() == self.record_type);
        let least = message.answers.iter().map(ttl).min();
        let ttl = if positive && code == ResponseCode::NoError {
            least.unwrap_or(0).min(LONGEST)
        } else {
            // RFC 2308: without the zone's SOA nothing is known to last.
            soa.unwrap_or(0)
                .min(least.unwrap_or(u32::MAX))
                .min(LONGEST_NEGATIVE)
        };
        let records = message
            .answers
            .len()
            .saturating_add(message.authorities.len())
            .saturating_add(message.additionals.len());
        let size = size_of::<Record>()
            .saturating_mul(records)
            .saturating_add(length)
            .saturating_add(size_of::<Self>());
        Received::Answer(Box::new(Answer {
            code,
            authentic: message.metadata.authentic_data,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
            ttl: Duration::from_secs(ttl.into()),
            size,
        }))
    }
}

impl Answer {
    /// The answer for a guest that spells the name as in `name`, after it was kept for `age`.
    pub(super) fn reply(&self, name: &Name, age: Duration) -> Reply {
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let aged = |records: &[Record]| {
            let age_one = |record: &Record| {
                let mut record = record.clone();
                record.ttl = ttl(&record).min(LONGEST).saturating_sub(age);
                if record.name == *name {
                    record.name = name.clone();
                }
                record
            };
            records.iter().map(age_one).collect()
        };
        let mut reply = Reply::empty(self.code);
        reply.authentic = self.authentic;
        reply.answers = aged(&self.answers);
        reply.authorities = aged(&self.authorities);
        reply.additionals = aged(&self.additionals);
        reply
    }
}

/// The addresses that an answer gives to the name that was asked for, through its CNAMEs.
pub(super) fn addresses(asked: &Name, answers: &[Record]) -> Vec<(IpAddr, Duration)> {
    let mut found = Vec::new();
    let mut current = asked;
    for _ in 0..MAX_CHAIN {
        let own = || answers.iter().filter(|record| record.name == *current);
        for record in own() {
            let ttl = Duration::from_secs(record.ttl.into());
            match &record.data {
                RData::A(address) => found.push((address.0.into(), ttl)),
                RData::AAAA(address) => found.push((address.0.into(), ttl)),
                _ => {}
            }
        }
        let next = own().find_map(|record| match &record.data {
            RData::CNAME(target) => Some(&target.0),
            _ => None,
        });
        match next {
            Some(target) => current = target,
            None => break,
        }
    }
    found
}

/// One with the highest bit set counts as zero (RFC 2181).
fn ttl(record: &Record) -> u32 {
    if record.ttl > i32::MAX.cast_unsigned() {
        0
    } else {
        record.ttl
    }
}

enum Same {
    Exactly,
    ButForSpelling,
    No,
}

/// Whether an answer has the id and the question of our query. Both are compared as bytes: the
/// first name of a message has nothing before it to point at.
fn same_question(query: &[u8], answer: &[u8]) -> Same {
    let question = |message: &[u8]| {
        let (header, rest) = message.split_first_chunk::<HEADER>()?;
        let [id1, id0, flags, _, q1, q0, ..] = *header;
        Some((([id1, id0], flags, [q1, q0]), rest.to_vec()))
    };
    let Some((((id, _, _), mut ours), ((answer_id, flags, count), theirs))) =
        question(query).zip(question(answer))
    else {
        return Same::No;
    };
    // Up to the end of our question: the OPT record behind it has 11 bytes.
    ours.truncate(ours.len().saturating_sub(11));
    let is_response = flags & 0x80 != 0 && flags & 0x78 == 0;
    let Some((theirs, _)) = theirs.split_at_checked(ours.len()) else {
        return Same::No;
    };
    if answer_id != id || !is_response || count != [0, 1] {
        return Same::No;
    }
    let type_at = ours.len().saturating_sub(4);
    let (our_name, our_type) = ours.split_at(type_at);
    let (their_name, their_type) = theirs.split_at(type_at);
    if our_type != their_type {
        Same::No
    } else if our_name == their_name {
        Same::Exactly
    } else if our_name.eq_ignore_ascii_case(their_name) {
        Same::ButForSpelling
    } else {
        Same::No
    }
}
