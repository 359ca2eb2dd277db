//! What of the network the settings say: where the VMs' public addresses are served, and by what and
//! under which rules VMs reach the world.

use std::net::{IpAddr, SocketAddr};

use protocol::host::proxy::{ServeEdge, ServeGateway};
use protocol::id::Subdomain;
use protocol::network::{Destination, MAX_CONNECTIONS, Rule, RuleAction, RuleProtocol};
use serde::{Deserialize, Deserializer};

use super::{Domain, Port, optional_address};

/// Most rules for all VMs: they go to proxy in one packet.
const MAX_RULES: usize = 128;

/// Most name servers.
const MAX_NAME_SERVERS: usize = 8;

/// Most names beside the domain: they go to proxy in one packet, with their certificates.
pub(super) const MAX_DOMAINS: usize = 8;

/// A name beside the domain that leads to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomDomain {
    /// The name; its DNS has to lead here.
    #[serde(deserialize_with = "name")]
    pub name: Domain,
    /// The label of the VM's public address.
    #[serde(deserialize_with = "label")]
    pub vm: Subdomain,
    /// The port in the VM.
    #[serde(default = "web")]
    pub port: Port,
}

fn name<'de, D: Deserializer<'de>>(from: D) -> Result<Domain, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

fn label<'de, D: Deserializer<'de>>(from: D) -> Result<Subdomain, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

fn web() -> Port {
    Port::WEB
}

/// Where VMs have their public addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Edge {
    /// Address and port for HTTPS; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub listen: Option<SocketAddr>,
    /// Address and port for HTTP, which is redirected; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub http: Option<SocketAddr>,
}

impl Default for Edge {
    fn default() -> Self {
        let at = |port| Some(SocketAddr::from(([0_u16; 8], port)));
        Self {
            listen: at(443),
            http: at(80),
        }
    }
}

impl Edge {
    /// What proxy is told.
    pub fn serve(&self, domain: &str, public_port: u16) -> ServeEdge {
        let text = |address: Option<SocketAddr>| {
            address.map_or_else(String::new, |address| address.to_string())
        };
        ServeEdge {
            https_address: text(self.listen),
            http_address: text(self.http),
            domain: domain.to_owned(),
            public_port,
            ..ServeEdge::default()
        }
    }
}

/// By what and under which rules VMs reach the world.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gateway {
    /// Whom the VMs' names are asked for, in the order of preference; none for those of the host.
    #[serde(deserialize_with = "name_servers")]
    pub name_servers: Vec<SocketAddr>,
    /// Tried before the rules of each VM.
    #[serde(deserialize_with = "rules")]
    pub rules: Vec<Rule>,
    /// Connections and flows of one VM at the same time, where it has no limit of its own.
    #[serde(deserialize_with = "connections")]
    pub max_connections: u32,
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            name_servers: Vec::new(),
            rules: Vec::new(),
            max_connections: 1024,
        }
    }
}

impl Gateway {
    /// What proxy is told; `found` are the host's name servers.
    pub fn serve(&self, found: &[SocketAddr]) -> ServeGateway {
        let servers = match self.name_servers.as_slice() {
            [] => found,
            given => given,
        };
        let servers = servers.iter().take(MAX_NAME_SERVERS);
        ServeGateway {
            name_servers: servers.map(SocketAddr::to_string).collect(),
            rules: self.rules.clone(),
            max_connections: self.max_connections,
        }
    }
}

fn name_servers<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SocketAddr>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    if texts.len() > MAX_NAME_SERVERS {
        return Err(serde::de::Error::custom(format!(
            "{} name servers are too many; at most {MAX_NAME_SERVERS}",
            texts.len()
        )));
    }
    let servers = texts.iter().map(|text| {
        let address = text.parse::<SocketAddr>();
        address.or_else(|_| text.parse().map(|address: IpAddr| (address, 53).into()))
    });
    let servers: Result<Vec<SocketAddr>, _> = servers.collect();
    servers.map_err(|_| {
        serde::de::Error::custom(format!(
            "{texts:?} are no name servers: give addresses with ports, such as \"192.0.2.1:53\""
        ))
    })
}

fn connections<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    super::within(from, 1..=MAX_CONNECTIONS, "max_connections")
}

/// A rule as it is written down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    action: Action,
    to: Destination,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    ports: Ports,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Allow,
    Deny,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    #[default]
    Any,
    Tcp,
    Udp,
    Icmp,
}

struct Ports(u16, u16);

impl Default for Ports {
    fn default() -> Self {
        Self(0, u16::MAX)
    }
}

impl<'de> Deserialize<'de> for Ports {
    /// A number, or the first and the last as text.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "ports are a number such as 443 or a text such as \"80-443\""
        )]
        enum Form {
            One(u16),
            Text(String),
        }
        let text = match Form::deserialize(from)? {
            Form::One(port) => return Ok(Self(port, port)),
            Form::Text(text) => text,
        };
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self(first, last)),
            _ => Err(serde::de::Error::custom(format!(
                "`{text}` are no ports; give a number such as 443 or \"80-443\", the lower first"
            ))),
        }
    }
}

fn rules<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Rule>, D::Error> {
    let written = Vec::<Written>::deserialize(from)?;
    if written.len() > MAX_RULES {
        return Err(serde::de::Error::custom(format!(
            "{} rules are too many; at most {MAX_RULES}",
            written.len()
        )));
    }
    let rules = written.into_iter().map(|rule| Rule {
        action: match rule.action {
            Action::Allow => RuleAction::Allow,
            Action::Deny => RuleAction::Deny,
        },
        to: rule.to,
        protocol: match rule.protocol {
            Protocol::Any => RuleProtocol::Any,
            Protocol::Tcp => RuleProtocol::Tcp,
            Protocol::Udp => RuleProtocol::Udp,
            Protocol::Icmp => RuleProtocol::Icmp,
        },
        ports: (rule.ports.0, rule.ports.1),
    });
    let rules: Vec<Rule> = rules.collect();
    let with_ports =
        |rule: &&Rule| rule.protocol == RuleProtocol::Icmp && rule.ports != (0, u16::MAX);
    match rules.iter().find(with_ports) {
        Some(rule) => Err(serde::de::Error::custom(format!(
            "the rule to `{}` has ports, and ICMP has none",
            rule.to
        ))),
        None => Ok(rules),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Settings;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(text, Path::new("/etc/supvm.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_serve_https_and_http_and_leave_the_names_to_the_host() {
        let settings = parse("").unwrap();
        let edge = settings.edge.serve("d", 443);
        assert_eq!(
            (edge.https_address.as_str(), edge.http_address.as_str()),
            ("[::]:443", "[::]:80")
        );
        let found = ["192.0.2.53:53".parse().unwrap()];
        let gateway = settings.gateway.serve(&found);
        assert_eq!(gateway.name_servers, ["192.0.2.53:53"]);
        assert_eq!(gateway.max_connections, 1024);
    }

    #[test]
    fn every_setting_of_the_network_can_be_given() {
        let settings = parse(
            r#"
            edge = { listen = "", http = "127.0.0.1:8080" }
            [gateway]
            name_servers = ["192.0.2.1:5353", "2001:db8::1"]
            max_connections = 10
            [[gateway.rules]]
            action = "allow"
            to = "10.0.0.0/8"
            protocol = "tcp"
            ports = "80-443"
            [[gateway.rules]]
            action = "deny"
            to = "*.example.org"
            [[gateway.rules]]
            action = "allow"
            to = "192.0.2.7"
            ports = 22
            "#,
        )
        .unwrap();
        let edge = settings.edge.serve("d", 8443);
        assert_eq!(
            (edge.https_address.as_str(), edge.http_address.as_str()),
            ("", "127.0.0.1:8080")
        );
        assert_eq!((edge.domain.as_str(), edge.public_port), ("d", 8443));
        let gateway = settings.gateway.serve(&["192.0.2.53:53".parse().unwrap()]);
        assert_eq!(gateway.name_servers, ["192.0.2.1:5353", "[2001:db8::1]:53"]);
        assert_eq!(gateway.max_connections, 10);
        let rules: Vec<String> = gateway
            .rules
            .iter()
            .map(|rule| {
                format!(
                    "{:?} {} {:?} {:?}",
                    rule.action, rule.to, rule.protocol, rule.ports
                )
            })
            .collect();
        assert_eq!(
            rules,
            [
                "Allow 10.0.0.0/8 Tcp (80, 443)",
                "Deny *.example.org Any (0, 65535)",
                "Allow 192.0.2.7/32 Any (22, 22)",
            ]
        );
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        let rule = |rest: &str| format!("[[gateway.rules]]\naction = \"allow\"\n{rest}");
        let many = rule("to = \"*\"\n").repeat(129);
        for (text, expected) in [
            ("edge = { listen = \"443\" }", "`443` is no address"),
            ("edge = { https = \"\" }", "https"),
            ("gateway = { name_servers = [\"dns\"] }", "no name servers"),
            ("gateway = { max_connections = 0 }", "max_connections is 0"),
            (
                "gateway = { max_connections = 16385 }",
                "max_connections is 16385",
            ),
            (&rule("to = \"10.0.0.1/8\""), "the network is 10.0.0.0/8"),
            (&rule("to = \"*\"\nports = \"443-80\""), "`443-80`"),
            (&rule("to = \"*\"\nports = 70000"), "ports are a number"),
            (&rule("to = \"*\"\nprotocol = \"sctp\""), "sctp"),
            (
                &rule("to = \"*\"\nprotocol = \"icmp\"\nports = 1"),
                "ICMP has none",
            ),
            ("[[gateway.rules]]\naction = \"allow\"", "to"),
            (&many, "129 rules are too many"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
