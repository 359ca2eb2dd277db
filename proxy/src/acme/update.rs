//! Dynamic updates of a DNS zone (RFC 2136), signed with a shared key (TSIG with HMAC-SHA256,
//! RFC 8945): how proof is given that the domain is ours. It sets and removes TXT records of one
//! name and nothing else.
//!
//! The server's answer is not verified: who forges one can make an order for a certificate fail,
//! which whoever is on that way could do anyhow.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ring::hmac;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long one update may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// In seconds: how far the clocks may be apart (RFC 8945 recommends this).
const FUDGE: u16 = 300;

/// In seconds; the records live only as long as the order.
const TTL: u32 = 60;

const TYPE_TSIG: u16 = 250;
const CLASS_ANY: u16 = 255;

/// Why a zone was not changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// A name in the settings is none.
    #[error("`{0}` is no domain name")]
    Name(String),
    /// The message cannot be written.
    #[error("the update of {0} cannot be written")]
    Unwritable(String),
    /// The server cannot be reached.
    #[error("the name server {server} cannot be reached: {cause}")]
    Unreachable {
        /// Who.
        server: SocketAddr,
        /// What the system said.
        cause: io::Error,
    },
    /// The server did not answer in time.
    #[error("the name server {0} did not answer")]
    Silent(SocketAddr),
    /// What it answered makes no sense.
    #[error("the name server {0} answered something that is no answer to an update")]
    Senseless(SocketAddr),
    /// It said no.
    #[error(
        "the name server {server} refused to change {name}: {code}; NOTAUTH means that key or \
         clock differ or that it does not serve the zone, REFUSED that the key may not change it"
    )]
    Refused {
        /// Who.
        server: SocketAddr,
        /// What was to be changed.
        name: String,
        /// How it said so.
        code: ResponseCode,
    },
}

/// Where a zone is changed, and with what.
pub(super) struct Zone {
    server: SocketAddr,
    zone: Name,
    key_name: Name,
    key: hmac::Key,
}

impl Zone {
    /// `secret` is the key itself, not its base64.
    pub(super) fn new(
        server: SocketAddr,
        zone: &str,
        key_name: &str,
        secret: &[u8],
    ) -> Result<Self, UpdateError> {
        Ok(Self {
            server,
            zone: name(zone)?,
            key_name: name(key_name)?.to_lowercase(),
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
        })
    }

    /// Replaces all TXT records of `at` by these; none removes them.
    pub(super) async fn set_txt(&self, at: &str, values: &[String]) -> Result<(), UpdateError> {
        let bytes = self.update(at, values, SystemTime::now())?;
        match timeout(PATIENCE, self.exchange(&bytes)).await {
            Err(_) => Err(UpdateError::Silent(self.server)),
            Ok(Err(cause)) => Err(UpdateError::Unreachable {
                server: self.server,
                cause,
            }),
            Ok(Ok(answer)) => self.check(at, &bytes, &answer),
        }
    }

    fn update(&self, at: &str, values: &[String], now: SystemTime) -> Result<Vec<u8>, UpdateError> {
        let owner = name(at)?;
        let mut message = Message::query();
        message.metadata.op_code = OpCode::Update;
        message.add_query(Query::query(self.zone.clone(), RecordType::SOA));
        // RFC 2136, 2.5.2: class ANY and no data delete the whole set.
        let mut delete = Record::update0(owner.clone(), 0, RecordType::TXT);
        delete.dns_class = DNSClass::ANY;
        message.add_authority(delete);
        for value in values {
            let data = RData::TXT(TXT::new(vec![value.clone()]));
            message.add_authority(Record::from_rdata(owner.clone(), TTL, data));
        }
        let unwritable = || UpdateError::Unwritable(at.to_owned());
        let bytes = message.to_vec().map_err(|_| unwritable())?;
        self.sign(bytes, now).ok_or_else(unwritable)
    }

    /// Appends the signature, and counts it.
    fn sign(&self, mut message: Vec<u8>, now: SystemTime) -> Option<Vec<u8>> {
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
        let [0, 0, time @ ..] = seconds.to_be_bytes() else {
            return None;
        };
        let key_name = wire(&self.key_name);
        let algorithm = wire(&Name::from_ascii("hmac-sha256.").ok()?);
        let mut signed = hmac::Context::with_key(&self.key);
        let class = CLASS_ANY.to_be_bytes();
        let ttl = 0_u32.to_be_bytes();
        let fudge = FUDGE.to_be_bytes();
        let none = [0, 0];
        let parts: [&[u8]; 9] = [
            &message, &key_name, &class, &ttl, &algorithm, &time, &fudge, &none, &none,
        ];
        parts.into_iter().for_each(|part| signed.update(part));
        let mac = signed.sign();
        let mac = mac.as_ref();
        let mut data = algorithm;
        data.extend_from_slice(&time);
        data.extend_from_slice(&fudge);
        data.extend_from_slice(&u16::try_from(mac.len()).ok()?.to_be_bytes());
        data.extend_from_slice(mac);
        data.extend_from_slice(message.get(..2)?);
        data.extend_from_slice(&none);
        data.extend_from_slice(&none);
        message.extend_from_slice(&key_name);
        message.extend_from_slice(&TYPE_TSIG.to_be_bytes());
        message.extend_from_slice(&class);
        message.extend_from_slice(&ttl);
        message.extend_from_slice(&u16::try_from(data.len()).ok()?.to_be_bytes());
        message.extend_from_slice(&data);
        // The only additional record.
        *message.get_mut(11)? = 1;
        Some(message)
    }

    /// Over TCP: what is changed is not asked for twice.
    async fn exchange(&self, update: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(self.server).await?;
        let length = u16::try_from(update.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(update);
        stream.write_all(&framed).await?;
        let length = stream.read_u16().await?;
        let mut answer = Vec::new();
        (&mut stream)
            .take(length.into())
            .read_to_end(&mut answer)
            .await?;
        Ok(answer)
    }

    fn check(&self, at: &str, update: &[u8], answer: &[u8]) -> Result<(), UpdateError> {
        let Some([id1, id0, flags, code, ..]) = answer.first_chunk::<12>() else {
            return Err(UpdateError::Senseless(self.server));
        };
        let expected = 0x80 | u8::from(OpCode::Update) << 3;
        if update.get(..2) != Some(&[*id1, *id0]) || flags & 0xf8 != expected {
            return Err(UpdateError::Senseless(self.server));
        }
        match ResponseCode::from_low(code & 0x0f) {
            ResponseCode::NoError => Ok(()),
            code => Err(UpdateError::Refused {
                server: self.server,
                name: at.to_owned(),
                code,
            }),
        }
    }
}

fn name(text: &str) -> Result<Name, UpdateError> {
    let mut name = Name::from_ascii(text).map_err(|_| UpdateError::Name(text.to_owned()))?;
    name.set_fqdn(true);
    Ok(name)
}

/// In canonical form: lower case, not compressed.
fn wire(name: &Name) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.iter() {
        bytes.push(u8::try_from(label.len()).unwrap_or(0));
        bytes.extend(label.to_ascii_lowercase());
    }
    bytes.push(0);
    bytes
}
