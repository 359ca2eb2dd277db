//! Answers that are still good, for all VMs together: bounded in number and in bytes, the one that
//! was not used for longest goes first. It knows no VM and no rule: those are asked before it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answer::{Answer, Ask};

const MAX_ENTRIES: usize = 8192;
const MAX_BYTES: usize = 16 << 20;

/// An answer that is longer is not kept: it would push out many others.
const MAX_ANSWER: usize = 256 << 10;

struct Entry {
    answer: Arc<Answer>,
    stored: Instant,
    order: u64,
}

/// The answers.
#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<Ask, Entry>,
    /// Least recently used first.
    order: BTreeMap<u64, Ask>,
    bytes: usize,
    next: u64,
}

impl Cache {
    /// An answer that is still good, and its age.
    pub(super) fn get(&mut self, ask: &Ask, now: Instant) -> Option<(Arc<Answer>, Duration)> {
        let entry = self.entries.get_mut(ask)?;
        let age = now.saturating_duration_since(entry.stored);
        if age >= entry.answer.ttl {
            self.remove(ask);
            return None;
        }
        let answer = Arc::clone(&entry.answer);
        let ask = self.order.remove(&entry.order)?;
        entry.order = self.next;
        self.order.insert(self.next, ask);
        self.next = self.next.wrapping_add(1);
        Some((answer, age))
    }

    /// Keeps an answer, if it may be kept.
    pub(super) fn insert(&mut self, ask: Ask, answer: Arc<Answer>, now: Instant) {
        self.remove(&ask);
        if answer.ttl.is_zero() || answer.size > MAX_ANSWER {
            return;
        }
        self.bytes = self.bytes.saturating_add(answer.size);
        let entry = Entry {
            answer,
            stored: now,
            order: self.next,
        };
        self.order.insert(self.next, ask.clone());
        self.next = self.next.wrapping_add(1);
        self.entries.insert(ask, entry);
        while self.bytes > MAX_BYTES || self.entries.len() > MAX_ENTRIES {
            match self.order.first_key_value().map(|(_, ask)| ask.clone()) {
                Some(oldest) => self.remove(&oldest),
                None => break,
            }
        }
    }

    fn remove(&mut self, ask: &Ask) {
        if let Some(entry) = self.entries.remove(ask) {
            self.order.remove(&entry.order);
            self.bytes = self.bytes.saturating_sub(entry.answer.size);
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::{Name, RData, Record, RecordType};

    use super::super::answer::Received;
    use super::*;

    fn ask(name: &str) -> Ask {
        Ask::new(
            &Name::from_ascii(name).unwrap(),
            RecordType::A,
            false,
            false,
        )
    }

    /// An answer of `records` addresses that lasts `ttl` seconds.
    fn answer(ask: &Ask, records: u32, ttl: u32) -> Arc<Answer> {
        let sent = ask.query().unwrap();
        let mut message = Message::from_vec(&sent.bytes).unwrap().into_response();
        message.metadata.response_code = ResponseCode::NoError;
        let name = message.queries[0].name().clone();
        for n in 0..records {
            let data = RData::A(std::net::Ipv4Addr::from_bits(n).into());
            message.add_answer(Record::from_rdata(name.clone(), ttl, data));
        }
        match ask.receive(&sent, &message.to_vec().unwrap(), false) {
            Received::Answer(answer) => Arc::new(*answer),
            _ => panic!("{records} records were not read"),
        }
    }

    #[test]
    fn an_answer_is_good_until_its_time_is_over() {
        let (mut cache, now, one) = (Cache::default(), Instant::now(), ask("one.example."));
        cache.insert(one.clone(), answer(&one, 1, 10), now);
        let at = |cache: &mut Cache, seconds| {
            let kept = cache.get(&one, now + Duration::from_secs(seconds));
            kept.map(|(_, age)| age.as_secs())
        };
        assert_eq!(at(&mut cache, 0), Some(0));
        assert_eq!(at(&mut cache, 9), Some(9));
        assert_eq!(at(&mut cache, 10), None);
        assert_eq!((cache.bytes, cache.order.len()), (0, 0));
        cache.insert(one.clone(), answer(&one, 1, 0), now);
        assert_eq!(at(&mut cache, 0), None);
        cache.insert(one.clone(), answer(&one, 1, u32::MAX), now);
        assert_eq!(at(&mut cache, 0), None);
        cache.insert(one.clone(), answer(&one, 1, i32::MAX as u32), now);
        assert_eq!(at(&mut cache, 86_399), Some(86_399));
        assert_eq!(at(&mut cache, 86_400), None);
    }

    #[test]
    fn what_was_not_used_for_longest_makes_room() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let small = answer(&ask("x.example."), 1, 60);
        for n in 0..MAX_ENTRIES {
            cache.insert(ask(&format!("n{n}.example.")), Arc::clone(&small), now);
        }
        assert!(cache.get(&ask("n0.example."), now).is_some());
        cache.insert(ask("new.example."), small, now);
        assert_eq!(cache.entries.len(), MAX_ENTRIES);
        assert!(cache.get(&ask("n0.example."), now).is_some());
        assert!(cache.get(&ask("n1.example."), now).is_none());
        let large = answer(&ask("x.example."), 500, 60);
        assert!(large.size > 500 * 16 && large.size < MAX_ANSWER);
        for n in 0..2000 {
            cache.insert(ask(&format!("l{n}.example.")), Arc::clone(&large), now);
            assert!(cache.bytes <= MAX_BYTES);
        }
        assert!(cache.get(&ask("n0.example."), now).is_none());
        assert!(cache.get(&ask("l1999.example."), now).is_some());
        assert!(answer(&ask("x.example."), 2000, 60).size > MAX_ANSWER);
        let giant = answer(&ask("x.example."), 2000, 60);
        cache.insert(ask("giant.example."), giant, now);
        assert!(cache.get(&ask("giant.example."), now).is_none());
        let held: usize = cache.entries.values().map(|entry| entry.answer.size).sum();
        assert_eq!(
            (held, cache.order.len()),
            (cache.bytes, cache.entries.len())
        );
    }
}
