//! What a VM may reach and who may reach it: the rules of its gateway, its place at the edge, and
//! what was counted. The same values are in a create, in a VM's record and in what proxy is told.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::message::messages;
use crate::vm::VmRef;
use crate::wire_enum::wire_enum;

/// Most rules of one VM.
pub const MAX_RULES: usize = 256;

/// The most connections and flows that a VM can be given.
pub const MAX_CONNECTIONS: u32 = 16_384;

/// What a VM may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Egress {
    /// Nothing at all beyond its gateway, names included; its public address works on.
    pub offline: bool,
    /// Tried in order, the first that matches decides; where none does, the public internet is
    /// open and everything else closed. At most [`MAX_RULES`].
    pub rules: Vec<Rule>,
    /// Most bytes per second in each direction; zero for no limit.
    pub bytes_per_second: u64,
    /// Most packets per second in each direction; zero for no limit.
    pub packets_per_second: u64,
    /// Most connections and flows to the world at the same time; zero for the appliance's default.
    /// At most [`MAX_CONNECTIONS`].
    pub max_connections: u32,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What happens.
    pub action: RuleAction,
    /// To where.
    pub to: Destination,
    /// By which protocol.
    pub protocol: RuleProtocol,
    /// The first and the last port; 0 and 65535 for all. ICMP has no ports and is matched by
    /// rules with all of them.
    pub ports: (u16, u16),
}

wire_enum! {
    /// What a rule does.
    RuleAction: u8 {
        /// Opens.
        Allow = 0,
        /// Closes.
        Deny = 1,
    }
}

wire_enum! {
    /// Which protocol a rule is about.
    RuleProtocol: u8 {
        /// Each.
        Any = 0,
        /// TCP.
        Tcp = 1,
        /// UDP.
        Udp = 2,
        /// ICMP and ICMPv6 echo.
        Icmp = 3,
    }
}

/// Addresses or names. As text: `*`, `192.0.2.0/24`, `2001:db8::1`, `example.org` (this name
/// alone), `*.example.org` (every name below it).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Every address.
    Everything,
    /// The addresses that share their first bits with this one; the other bits are zero.
    Network {
        /// The first address.
        address: IpAddr,
        /// How many bits are shared.
        prefix: u8,
    },
    /// The addresses that this name had when the VM asked for it.
    Name(DomainName),
    /// The same for every name below this one.
    Below(DomainName),
}

/// A domain name in lower case without a final dot: labels of 1 to 63 characters of `[0-9a-z_-]`,
/// at most 253 characters in all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainName(String);

impl DomainName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no rule's destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// It is no address, network or name.
    #[error(
        "`{0}` is no destination: give an address, a network such as 192.0.2.0/24, a name, \
         *.name, or *"
    )]
    Form(String),
    /// More bits than the address has.
    #[error("`{0}` has a prefix longer than its address")]
    Prefix(String),
    /// Bits after the prefix.
    #[error("`{0}` has bits set after its prefix; the network is {1}")]
    HostBits(String, Destination),
}

impl FromStr for DomainName {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
        };
        // A name whose last label is a number would be an address written badly; `0x7f` is one to
        // many programs.
        let numeric = lower.rsplit('.').next().is_some_and(|last| {
            let (digits, hexadecimal) = match last.strip_prefix("0x") {
                Some(rest) => (rest, true),
                None => (last, false),
            };
            (hexadecimal || !digits.is_empty())
                && digits
                    .bytes()
                    .all(|byte| byte.is_ascii_digit() || hexadecimal && byte.is_ascii_hexdigit())
        });
        if lower.len() > 253 || numeric || !lower.split('.').all(label) {
            return Err(DestinationError::Form(text.chars().take(64).collect()));
        }
        Ok(Self(lower))
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl Destination {
    /// Whether an address is one of a network's.
    pub fn contains(&self, address: IpAddr) -> bool {
        match self {
            Self::Everything => true,
            Self::Network {
                address: network,
                prefix,
            } => {
                // `::ffff:192.0.2.1` is 192.0.2.1.
                let address = address.to_canonical();
                network.is_ipv4() == address.is_ipv4() && masked(address, *prefix) == *network
            }
            Self::Name(_) | Self::Below(_) => false,
        }
    }

    /// Whether a name is one of a rule's names.
    pub fn names(&self, name: &DomainName) -> bool {
        match self {
            Self::Everything | Self::Network { .. } => false,
            Self::Name(own) => own == name,
            Self::Below(own) => name
                .as_str()
                .strip_suffix(own.as_str())
                .is_some_and(|rest| rest.ends_with('.')),
        }
    }
}

fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix));
            Ipv4Addr::from_bits(v4.to_bits() & mask.unwrap_or(0)).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix));
            Ipv6Addr::from_bits(v6.to_bits() & mask.unwrap_or(0)).into()
        }
    }
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || DestinationError::Form(text.chars().take(64).collect());
        if text == "*" {
            return Ok(Self::Everything);
        }
        if let Some(name) = text.strip_prefix("*.") {
            return name.parse().map(Self::Below).map_err(|_| form());
        }
        let (address, prefix): (_, u8) = match text.split_once('/') {
            Some((address, prefix)) => {
                let address: IpAddr = address.parse().map_err(|_| form())?;
                // `parse` would take a sign.
                if !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(form());
                }
                (address, prefix.parse().map_err(|_| form())?)
            }
            None => match text.parse::<IpAddr>() {
                Ok(address) => (address, if address.is_ipv4() { 32 } else { 128 }),
                Err(_) => return text.parse().map(Self::Name).map_err(|_| form()),
            },
        };
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(DestinationError::Prefix(text.to_owned()));
        }
        // `::ffff:192.0.2.0/120` is 192.0.2.0/24, and matched as that.
        let (address, prefix) = match (address, prefix.checked_sub(96)) {
            (IpAddr::V6(v6), Some(rest)) => match v6.to_ipv4_mapped() {
                Some(v4) => (v4.into(), rest),
                None => (address, prefix),
            },
            _ => (address, prefix),
        };
        let network = Self::Network {
            address: masked(address, prefix),
            prefix,
        };
        if masked(address, prefix) != address {
            return Err(DestinationError::HostBits(text.to_owned(), network));
        }
        Ok(network)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => formatter.write_str("*"),
            Self::Network { address, prefix } => write!(formatter, "{address}/{prefix}"),
            Self::Name(name) => write!(formatter, "{name}"),
            Self::Below(name) => write!(formatter, "*.{name}"),
        }
    }
}

impl Serialize for Destination {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Destination {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The longest is `*.` and a name.
        let text = <heapless::String<256> as Deserialize>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How a VM can be reached at its public address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Requests and API calls start the VM when it is stopped.
    pub autostart: bool,
    /// The BLAKE3 hash of the token that every request must show; none lets everybody in who
    /// knows the address.
    pub token: Option<[u8; 32]>,
}

impl Default for Publication {
    fn default() -> Self {
        Self {
            autostart: true,
            token: None,
        }
    }
}

/// Asks how a VM is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetNetwork {
    /// Which VM.
    pub vm: VmRef,
}

/// Changes how a VM is connected, at once and for good. Connections that are open go on, also
/// where a rule would refuse them now; `offline` ends them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetNetwork {
    /// Which VM.
    pub vm: VmRef,
    /// What it may reach; none changes nothing.
    pub egress: Option<Egress>,
    /// How it can be reached; none changes nothing.
    pub publication: Option<Publication>,
}

/// Answer to [`GetNetwork`] and [`SetNetwork`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// What the VM may reach.
    pub egress: Egress,
    /// How it can be reached.
    pub publication: Publication,
    /// What was counted since the VM or the appliance's proxy process last started; zero for a
    /// stopped VM.
    pub counters: NetworkCounters,
}

/// The field of a query in which a one-time link carries its secret.
pub const LINK_QUERY: &str = "supvm_link";

/// Seconds for which a one-time link can be opened.
pub const LINK_LIFETIME_S: u32 = 24 * 60 * 60;

/// Asks for a link that lets one visitor in to a VM whose public address asks for a token. A VM
/// without a token is refused with `InvalidArgument`: its address is its link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateLink {
    /// Which VM.
    pub vm: VmRef,
}

/// Answer to [`CreateLink`]. The link is worth nothing after it was opened, once the VM's token has
/// changed, and when the appliance's proxy process was started anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkCreated {
    /// The VM's public address with [`LINK_QUERY`].
    pub url: String,
    /// Seconds for which it can be opened.
    pub lifetime_s: u32,
}

/// What was counted for a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkCounters {
    /// Frames from the VM.
    pub frames_out: u64,
    /// Bytes of these.
    pub bytes_out: u64,
    /// Frames to the VM.
    pub frames_in: u64,
    /// Bytes of these.
    pub bytes_in: u64,
    /// Frames from the VM that were thrown away: broken, not understood, or above a limit.
    pub dropped: u64,
    /// Connections and flows to the world that were made.
    pub connections: u64,
    /// Those that are open now.
    pub open: u32,
    /// Those that the rules refused.
    pub denied: u64,
    /// Those that a limit refused.
    pub limited: u64,
    /// Names asked for.
    pub names: u64,
    /// Requests at the public address.
    pub requests: u64,
}

messages! {
    GET_NETWORK => GetNetwork,
    SET_NETWORK => SetNetwork,
    NETWORK => NetworkInfo,
    CREATE_LINK => CreateLink,
    LINK_CREATED => LinkCreated,
}

#[cfg(test)]
mod tests;
