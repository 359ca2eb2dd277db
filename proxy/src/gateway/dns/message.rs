//! DNS messages at the guest's side: a query becomes a [`Question`] or a refusal, a [`Reply`]
//! becomes bytes that the guest's transport can carry. Nothing here waits or remembers.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};

use super::Transport;

/// Bytes of a message's header.
pub(super) const HEADER: usize = 12;

/// The longest query that is read: a question and an OPT record with a few options.
const MAX_QUERY: usize = 1232;

/// What every client takes over UDP (RFC 1035).
const LEAST_UDP: u16 = 512;

/// The longest answer over UDP. The guest's link carries more in one packet; longer answers go
/// over TCP all the same, as RFC 9715 wants it.
const MOST_UDP: u16 = 4096;

/// Which extended error (RFC 8914) says what.
const BLOCKED: u16 = 15;
const OTHER: u16 = 0;

/// What a guest asks for.
#[derive(Clone, Debug)]
pub(super) struct Question {
    id: u16,
    recursion_desired: bool,
    authentic_data: bool,
    /// The guest checks signatures itself.
    pub(super) checking_disabled: bool,
    /// The name, in the guest's spelling.
    pub(super) name: Name,
    /// The type.
    pub(super) record_type: RecordType,
    edns: Option<ClientEdns>,
}

#[derive(Clone, Copy, Debug)]
struct ClientEdns {
    payload: u16,
    dnssec_ok: bool,
}

/// What a guest is answered.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) code: ResponseCode,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    /// The name server has checked signatures.
    pub(super) authentic: bool,
    /// Why it is refused (RFC 8914).
    explanation: Option<(u16, &'static str)>,
}

impl Reply {
    /// No records.
    pub(super) fn empty(code: ResponseCode) -> Self {
        Self {
            code,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            authentic: false,
            explanation: None,
        }
    }

    /// A rule closes the name. `REFUSED`, because `NXDOMAIN` would be a lie that resolvers keep.
    pub(super) fn blocked() -> Self {
        Self {
            explanation: Some((BLOCKED, "closed by the network rules of this VM")),
            ..Self::empty(ResponseCode::Refused)
        }
    }

    /// It cannot be answered now.
    pub(super) fn failed(why: &'static str) -> Self {
        Self {
            explanation: Some((OTHER, why)),
            ..Self::empty(ResponseCode::ServFail)
        }
    }
}

/// What a query that is no question gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// No answer: it may be one itself, and answering answers would never end.
    Silently,
    /// These bytes.
    With(Vec<u8>),
}

impl Question {
    /// Reads a query.
    pub(super) fn read(query: &[u8]) -> Result<Self, Rejected> {
        let Some((header, _)) = query.split_first_chunk::<HEADER>() else {
            return Err(Rejected::Silently);
        };
        let [.., flags, _, q1, q0, an1, an0, ns1, ns0, ar1, ar0] = *header;
        if flags & 0x80 != 0 {
            return Err(Rejected::Silently);
        }
        let reject = |code| Rejected::With(bare(header, code));
        if flags & 0x78 != 0 {
            return Err(reject(ResponseCode::NotImp));
        }
        let counts = [
            u16::from_be_bytes([q1, q0]),
            u16::from_be_bytes([an1, an0]),
            u16::from_be_bytes([ns1, ns0]),
        ];
        // An OPT record, a TSIG record, and one more.
        if counts != [1, 0, 0] || u16::from_be_bytes([ar1, ar0]) > 3 || query.len() > MAX_QUERY {
            // IXFR carries a record that the answer begins with.
            return Err(reject(ResponseCode::FormErr));
        }
        let message = Message::from_vec(query).map_err(|_| reject(ResponseCode::FormErr))?;
        let Some(asked) = message.queries.first() else {
            return Err(reject(ResponseCode::FormErr));
        };
        let question = Self {
            id: message.metadata.id,
            recursion_desired: message.metadata.recursion_desired,
            authentic_data: message.metadata.authentic_data,
            checking_disabled: message.metadata.checking_disabled,
            name: asked.name().clone(),
            record_type: asked.query_type(),
            edns: message.edns.as_ref().map(|edns| ClientEdns {
                payload: edns.max_payload(),
                dnssec_ok: edns.flags().dnssec_ok,
            }),
        };
        let refused = match message.edns.as_ref().map_or(0, Edns::version) {
            0 if asked.query_class() != DNSClass::IN => Some(ResponseCode::Refused),
            // Types that stand for several, for a transfer, or for parts of a message.
            0 if matches!(
                u16::from(question.record_type),
                0 | 24 | 41 | 128 | 249..=255
            ) =>
            {
                Some(ResponseCode::Refused)
            }
            0 => None,
            _ => Some(ResponseCode::BADVERS),
        };
        match refused.map(|code| (code, question.write(&Reply::empty(code), Transport::Udp))) {
            None => Ok(question),
            Some((_, Some(bytes))) => Err(Rejected::With(bytes)),
            Some((code, None)) => Err(reject(code)),
        }
    }

    /// Whether the guest wants signatures.
    pub(super) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// The answer in bytes; none for one that cannot be written at all.
    pub(super) fn write(&self, reply: &Reply, over: Transport) -> Option<Vec<u8>> {
        let limit = match over {
            Transport::Tcp => u16::MAX,
            Transport::Udp => self
                .edns
                .map_or(LEAST_UDP, |edns| edns.payload.clamp(LEAST_UDP, MOST_UDP)),
        };
        let mut message = Message::new(self.id, MessageType::Response, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.checking_disabled;
        message.metadata.authentic_data =
            reply.authentic && (self.authentic_data || self.dnssec_ok());
        message.metadata.response_code = reply.code;
        message.add_query(Query::query(self.name.clone(), self.record_type));
        if let Some(edns) = self.edns {
            let mut ours = Edns::new();
            ours.set_max_payload(u16::try_from(MAX_QUERY).unwrap_or(LEAST_UDP));
            ours.set_dnssec_ok(edns.dnssec_ok);
            if let Some((code, text)) = reply.explanation {
                let mut data = code.to_be_bytes().to_vec();
                data.extend_from_slice(text.as_bytes());
                ours.options_mut().insert(EdnsOption::Unknown(15, data));
            }
            message.set_edns(ours);
        }
        let empty = message.clone();
        message.answers.clone_from(&reply.answers);
        message.authorities.clone_from(&reply.authorities);
        message.additionals.clone_from(&reply.additionals);
        let fits = |bytes: &Vec<u8>| bytes.len() <= usize::from(limit);
        message.to_vec().ok().filter(fits).or_else(|| {
            // The client asks again over TCP.
            empty.truncate().to_vec().ok().filter(fits)
        })
    }
}

/// A header alone, for a query of which nothing else is known to be sound.
fn bare(query: &[u8; HEADER], code: ResponseCode) -> Vec<u8> {
    let [id1, id0, flags, ..] = *query;
    let mut header = vec![id1, id0, 0x80 | (flags & 0x79), 0x80 | code.low()];
    header.resize(HEADER, 0);
    header
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::RData;
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, record_type: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
        message
    }

    fn code(rejected: Result<Question, Rejected>) -> ResponseCode {
        match rejected {
            Err(Rejected::With(bytes)) => {
                let message = Message::from_vec(&bytes).unwrap();
                assert_eq!(message.metadata.message_type, MessageType::Response);
                message.metadata.response_code
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_looks_like_an_answer_or_is_too_short_is_met_with_silence() {
        let mut bytes = query("example.org.", RecordType::A).to_vec().unwrap();
        assert!(matches!(
            Question::read(&bytes[..11]),
            Err(Rejected::Silently)
        ));
        assert!(matches!(Question::read(&[]), Err(Rejected::Silently)));
        bytes[2] |= 0x80;
        assert!(matches!(Question::read(&bytes), Err(Rejected::Silently)));
    }

    #[test]
    fn malformed_queries_are_form_errors() {
        let sound = query("example.org.", RecordType::A).to_vec().unwrap();
        assert!(Question::read(&sound).is_ok());
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = sound.clone();
            change(&mut bytes);
            code(Question::read(&bytes))
        };
        assert_eq!(changed(&|b| b.truncate(20)), ResponseCode::FormErr);
        assert_eq!(changed(&|b| b.truncate(12)), ResponseCode::FormErr);
        assert_eq!(changed(&|b| b.resize(1233, 0)), ResponseCode::FormErr);
        for (count, number) in [(5, 0), (5, 2), (4, 255), (7, 1), (9, 1), (11, 4), (10, 255)] {
            assert_eq!(changed(&|b| b[count] = number), ResponseCode::FormErr);
        }
        // Pointers to themselves, to each other, and forwards.
        for name in [
            &[0xc0, 12][..],
            &[0xc0, 14, 0xc0, 12],
            &[1, b'a', 0xc0, 12],
            &[0xc0, 255],
        ] {
            let mut bytes = sound[..12].to_vec();
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(&[0, 1, 0, 1]);
            assert_eq!(
                code(Question::read(&bytes)),
                ResponseCode::FormErr,
                "{name:?}"
            );
        }
    }

    #[test]
    fn transfers_any_and_other_classes_are_refused() {
        for record_type in [
            RecordType::AXFR,
            RecordType::ANY,
            RecordType::IXFR,
            RecordType::OPT,
        ] {
            let bytes = query("example.org.", record_type).to_vec().unwrap();
            assert_eq!(code(Question::read(&bytes)), ResponseCode::Refused);
        }
        for class in [DNSClass::CH, DNSClass::HS, DNSClass::ANY, DNSClass::NONE] {
            let mut message = query("version.bind.", RecordType::TXT);
            message.queries[0].set_query_class(class);
            let bytes = message.to_vec().unwrap();
            assert_eq!(code(Question::read(&bytes)), ResponseCode::Refused);
        }
        let mut update = query("example.org.", RecordType::SOA);
        update.metadata.op_code = OpCode::Update;
        let bytes = update.to_vec().unwrap();
        assert_eq!(code(Question::read(&bytes)), ResponseCode::NotImp);
        let mut newer = query("example.org.", RecordType::A);
        let mut edns = Edns::new();
        edns.set_version(1);
        newer.set_edns(edns);
        let bytes = newer.to_vec().unwrap();
        // BADVERS and BADSIG are the same number.
        assert_eq!(u16::from(code(Question::read(&bytes))), 16);
    }

    #[test]
    fn an_answer_that_is_too_long_for_the_transport_is_truncated() {
        let asked = |payload: Option<u16>| {
            let mut message = query("big.example.", RecordType::A);
            if let Some(payload) = payload {
                let mut edns = Edns::new();
                edns.set_max_payload(payload);
                message.set_edns(edns);
            }
            Question::read(&message.to_vec().unwrap()).unwrap()
        };
        let name = Name::from_ascii("big.example.").unwrap();
        let mut reply = Reply::empty(ResponseCode::NoError);
        for n in 0..60_u8 {
            let data = RData::A(std::net::Ipv4Addr::new(10, 0, 0, n).into());
            reply
                .answers
                .push(Record::from_rdata(name.clone(), 60, data));
        }
        let answers = |question: &Question, over| {
            let bytes = question.write(&reply, over).unwrap();
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!(message.queries.len(), 1);
            (
                message.metadata.truncation,
                message.answers.len(),
                bytes.len(),
            )
        };
        for payload in [None, Some(0), Some(512), Some(900)] {
            let (truncated, count, size) = answers(&asked(payload), Transport::Udp);
            assert_eq!((truncated, count), (true, 0));
            assert!(size <= 512);
            assert_eq!(answers(&asked(payload), Transport::Tcp).1, 60);
        }
        for payload in [1232, u16::MAX] {
            let (truncated, count, _) = answers(&asked(Some(payload)), Transport::Udp);
            assert_eq!((truncated, count), (false, 60));
        }
    }

    #[test]
    fn a_refusal_says_why_to_clients_that_can_read_it() {
        let mut message = query("closed.example.", RecordType::A);
        message.set_edns(Edns::new());
        let question = Question::read(&message.to_vec().unwrap()).unwrap();
        let bytes = question.write(&Reply::blocked(), Transport::Udp).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
        let option = answer.edns.unwrap().option(15.into()).cloned();
        assert!(
            matches!(option, Some(EdnsOption::Unknown(15, data)) if data.starts_with(&[0, 15])),
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_and_every_answer_is_for_its_query(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), sound in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if sound && bytes.len() > 12 {
                bytes[2] &= 0x07;
                bytes[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
            }
            let answer = match Question::read(&bytes) {
                Ok(question) => question.write(&Reply::empty(ResponseCode::NoError), Transport::Udp),
                Err(Rejected::With(answer)) => Some(answer),
                Err(Rejected::Silently) => None,
            };
            if let Some(answer) = answer {
                prop_assert_eq!(&answer[..2], &bytes[..2]);
                prop_assert!(answer[2] & 0x80 != 0 && answer.len() <= 512);
            }
        }
    }
}
