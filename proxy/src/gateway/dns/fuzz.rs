//! What the fuzz target reaches of this module: bytes of a guest, and bytes of a name server that
//! knows id and question. Only cargo-fuzz compiles it.

use std::time::Duration;

use hickory_proto::rr::{Name, RecordType};

use super::Transport;
use super::answer::{self, Ask, Received};
use super::message::{Question, Rejected, Reply};
use super::own::Own;

/// A query, on the way to the names that the gateway answers itself.
pub fn query(bytes: &[u8]) {
    let question = match Question::read(bytes) {
        Ok(question) => question,
        Err(Rejected::With(answer)) => {
            assert!(
                answer.get(..2) == bytes.get(..2),
                "an answer to another query"
            );
            return;
        }
        Err(Rejected::Silently) => return,
    };
    let own = Own::new("supvm-1a2b").answer(&question);
    for reply in [own.unwrap_or_else(Reply::blocked), Reply::failed("so")] {
        let answer = question.write(&reply, Transport::Udp);
        assert!(
            answer.is_some_and(|answer| answer.len() <= 4096),
            "no answer"
        );
    }
    let ask = Ask::new(
        &question.name,
        question.record_type,
        question.dnssec_ok(),
        false,
    );
    assert!(ask.query().is_some(), "a question that cannot be passed on");
}

/// An answer: its id and its question are made those of a query that was sent, if `honest`.
pub fn answer(bytes: &[u8], honest: bool, tcp: bool) {
    let Ok(name) = Name::from_ascii("www.example.org.") else {
        return;
    };
    let ask = Ask::new(&name, RecordType::A, true, false);
    let Some(sent) = ask.query() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if honest {
        let question = sent.bytes.get(12..sent.bytes.len().saturating_sub(11));
        let Some((header, rest)) = bytes.split_at_checked(12) else {
            return;
        };
        let mut whole = header.to_vec();
        whole.extend_from_slice(question.unwrap_or_default());
        whole.extend_from_slice(rest);
        for (at, value) in [
            (0, sent.bytes.first()),
            (1, sent.bytes.get(1)),
            (4, Some(&0)),
            (5, Some(&1)),
        ] {
            if let (Some(byte), Some(value)) = (whole.get_mut(at), value) {
                *byte = *value;
            }
        }
        if let Some(flags) = whole.get_mut(2) {
            *flags = 0x80 | (*flags & 0x07);
        }
        bytes = whole;
    }
    let Received::Answer(received) = ask.receive(&sent, &bytes, tcp) else {
        return;
    };
    assert!(honest, "a guessed answer was taken");
    let reply = received.reply(&name, Duration::from_secs(7));
    let pinned = answer::addresses(&name, &reply.answers);
    assert!(
        pinned.len() <= 16 * reply.answers.len(),
        "more addresses than records"
    );
    // As a guest gets it.
    if let Ok(question) = Question::read(&sent.bytes) {
        for over in [Transport::Udp, Transport::Tcp] {
            let written = question.write(&reply, over);
            assert!(
                written.is_some_and(|bytes| bytes.len() <= 65_535),
                "no answer"
            );
        }
    }
}
