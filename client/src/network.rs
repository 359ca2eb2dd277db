//! What a VM may reach and who may reach it, as people write it: rules in one word each, and tokens of
//! which the appliance keeps a hash only.

use protocol::network::{Destination, DestinationError, Rule, RuleAction, RuleProtocol};

/// Why a text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// What comes before ports and protocol is no destination.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The ports cannot be read.
    #[error("`{0}` are no ports; write one, such as 443, or two with a - between, the lower first")]
    Ports(String),
    /// ICMP has no ports.
    #[error("`{0}` has ports, and ICMP has none")]
    IcmpPorts(String),
}

/// Reads a rule as people write it, `TO[:PORTS][/PROTOCOL]`: `10.0.0.0/8`, `192.0.2.1:5432/tcp`,
/// `*.example.org:80-443`, `[2001:db8::1]:443`, `*/icmp`.
///
/// ```
/// use client::protocol::network::RuleAction;
/// let rule = client::parse_rule(RuleAction::Allow, "*.example.org:443/tcp")?;
/// assert_eq!(rule.ports, (443, 443));
/// assert_eq!(client::rule_text(&rule), "*.example.org:443/tcp");
/// # Ok::<(), client::RuleError>(())
/// ```
pub fn parse_rule(action: RuleAction, text: &str) -> Result<Rule, RuleError> {
    let (rest, protocol) = [
        ("/tcp", RuleProtocol::Tcp),
        ("/udp", RuleProtocol::Udp),
        ("/icmp", RuleProtocol::Icmp),
    ]
    .into_iter()
    .find_map(|(ending, protocol)| Some((text.strip_suffix(ending)?, protocol)))
    .unwrap_or((text, RuleProtocol::Any));
    // An IPv6 address has colons of its own: it is one as it stands, or has brackets.
    let (to, ports) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((to, "")) => (to, None),
        Some((to, behind)) => match behind.strip_prefix(':') {
            Some(ports) => (to, Some(ports)),
            None => return Err(RuleError::Ports(behind.to_owned())),
        },
        None if rest.parse::<Destination>().is_ok() => (rest, None),
        None => match rest.rsplit_once(':') {
            Some((to, ports)) => (to, Some(ports)),
            None => (rest, None),
        },
    };
    let rule = Rule {
        action,
        to: to.parse()?,
        protocol,
        ports: ports.map_or(Ok(ALL_PORTS), parse_ports)?,
    };
    if protocol == RuleProtocol::Icmp && rule.ports != ALL_PORTS {
        return Err(RuleError::IcmpPorts(text.to_owned()));
    }
    Ok(rule)
}

const ALL_PORTS: (u16, u16) = (0, u16::MAX);

fn parse_ports(text: &str) -> Result<(u16, u16), RuleError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err(RuleError::Ports(text.to_owned())),
    }
}

/// Writes a rule's destination, ports and protocol as [`parse_rule`] reads them.
pub fn rule_text(rule: &Rule) -> String {
    let mut text = rule.to.to_string();
    let (first, last) = rule.ports;
    if rule.ports != ALL_PORTS {
        if matches!(&rule.to, Destination::Network { address, .. } if address.is_ipv6()) {
            text = format!("[{text}]");
        }
        text = match first == last {
            true => format!("{text}:{first}"),
            false => format!("{text}:{first}-{last}"),
        };
    }
    let protocol = match rule.protocol {
        RuleProtocol::Any => return text,
        RuleProtocol::Tcp => "tcp".to_owned(),
        RuleProtocol::Udp => "udp".to_owned(),
        RuleProtocol::Icmp => "icmp".to_owned(),
        other => format!("protocol-{}", other.to_wire()),
    };
    format!("{text}/{protocol}")
}

/// What an appliance keeps of the token that requests at a VM's public address must show
/// ([`Publication::token`](protocol::network::Publication::token)).
pub fn url_token_hash(token: &str) -> [u8; 32] {
    *blake3::hash(token.as_bytes()).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_as_it_is_written() {
        for (text, to, protocol, ports) in [
            ("*", "*", RuleProtocol::Any, ALL_PORTS),
            ("*/icmp", "*", RuleProtocol::Icmp, ALL_PORTS),
            ("10.0.0.0/8", "10.0.0.0/8", RuleProtocol::Any, ALL_PORTS),
            ("10.0.0.0/8/udp", "10.0.0.0/8", RuleProtocol::Udp, ALL_PORTS),
            (
                "10.0.0.0/8:53/udp",
                "10.0.0.0/8",
                RuleProtocol::Udp,
                (53, 53),
            ),
            (
                "*.example.org:80-443",
                "*.example.org",
                RuleProtocol::Any,
                (80, 443),
            ),
            (
                "2001:db8::/32",
                "2001:db8::/32",
                RuleProtocol::Any,
                ALL_PORTS,
            ),
            (
                "[2001:db8::/32]:443/tcp",
                "2001:db8::/32",
                RuleProtocol::Tcp,
                (443, 443),
            ),
        ] {
            let rule = parse_rule(RuleAction::Deny, text).unwrap();
            assert_eq!(rule.to.to_string(), to, "{text}");
            assert_eq!((rule.protocol, rule.ports), (protocol, ports), "{text}");
            assert_eq!(rule_text(&rule), text);
        }
        let rule = parse_rule(RuleAction::Allow, "[2001:db8::1]").unwrap();
        assert_eq!(rule_text(&rule), "2001:db8::1/128");
        let rule = parse_rule(RuleAction::Allow, "192.0.2.1").unwrap();
        assert_eq!(rule_text(&rule), "192.0.2.1/32");
    }

    #[test]
    fn what_is_no_rule_is_refused_with_the_part_that_is_wrong() {
        for (text, expected) in [
            ("", "`` is no destination"),
            ("10.0.0.1/8", "the network is 10.0.0.0/8"),
            ("example.org:", "`` are no ports"),
            ("example.org:443-80", "`443-80` are no ports"),
            ("example.org:70000", "`70000` are no ports"),
            ("[2001:db8::1]443", "`443` are no ports"),
            ("example.org:1/icmp", "ICMP has none"),
            ("example.org/sctp", "no destination"),
        ] {
            let error = parse_rule(RuleAction::Allow, text).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }
}
