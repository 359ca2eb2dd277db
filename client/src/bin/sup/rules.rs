//! `sup network`, and what a create says of the network: rules on the command line keep the order in
//! which they are given, whichever option each comes with.

use std::io::BufRead;

use clap::{ArgAction, ArgMatches, Args};
use client::protocol::network::{Egress, NetworkInfo, Publication, Rule, RuleAction};
use client::protocol::vm::VmRef;
use client::{Client, parse_rule, rule_text, url_token_hash};
use serde_json::{Value, json as object};

use crate::complaint::Complaint;

/// `--allow` and `--deny`, in the order of the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules(pub(crate) Vec<Rule>);

const OPTIONS: [(&str, RuleAction, &str); 2] = [
    (
        "allow",
        RuleAction::Allow,
        "Let the VM reach this: an address, a network, a name, *.name or *; the first rule that matches decides",
    ),
    ("deny", RuleAction::Deny, "Do not let the VM reach this"),
];

impl Args for Rules {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        for (name, action, help) in OPTIONS {
            let option = clap::Arg::new(name)
                .long(name)
                .value_name("TO[:PORTS][/PROTOCOL]")
                .help(help)
                .action(ArgAction::Append)
                .value_parser(move |text: &str| parse_rule(action, text));
            command = command.arg(option);
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Rules {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut rules: Vec<(usize, Rule)> = Vec::new();
        for (name, _, _) in OPTIONS {
            let places = matches.indices_of(name).into_iter().flatten();
            let given = matches.get_many::<Rule>(name).into_iter().flatten();
            rules.extend(places.zip(given.cloned()));
        }
        rules.sort_by_key(|(place, _)| *place);
        Ok(Self(rules.into_iter().map(|(_, rule)| rule).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Limits, which a create and a change have in common.
#[derive(Debug, Args)]
pub(crate) struct Limits {
    /// Bytes per second in each direction, or with a unit (500K, 10M); 0 for no limit
    #[arg(long, value_name = "RATE", value_parser = bytes)]
    pub(crate) bandwidth: Option<u64>,
    /// Packets per second in each direction; 0 for no limit
    #[arg(long, value_name = "RATE")]
    pub(crate) packets: Option<u64>,
    /// Connections to the world at the same time; 0 for the appliance's own limit
    #[arg(long, value_name = "COUNT")]
    pub(crate) max_connections: Option<u32>,
}

impl Limits {
    fn change(&self, egress: &mut Egress) -> bool {
        if let Some(rate) = self.bandwidth {
            egress.bytes_per_second = rate;
        }
        if let Some(rate) = self.packets {
            egress.packets_per_second = rate;
        }
        if let Some(count) = self.max_connections {
            egress.max_connections = count;
        }
        self.bandwidth.is_some() || self.packets.is_some() || self.max_connections.is_some()
    }
}

/// What a create says of the network.
#[derive(Debug, Args)]
pub(crate) struct Connected {
    #[command(flatten)]
    pub(crate) rules: Rules,
    /// Let the VM reach nothing; its own address works all the same
    #[arg(long)]
    pub(crate) offline: bool,
    /// Leave the VM off when somebody asks for its address or works in it while it is stopped
    #[arg(long)]
    pub(crate) no_autostart: bool,
    /// A token that requests at the VM's address must show; `-` reads it from standard input
    #[arg(long, value_name = "TOKEN")]
    pub(crate) url_token: Option<String>,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

impl Connected {
    /// As the appliance is asked for it.
    pub(crate) fn wanted(self) -> Result<(Egress, Publication), Complaint> {
        let mut egress = Egress {
            offline: self.offline,
            rules: self.rules.0,
            ..Egress::default()
        };
        self.limits.change(&mut egress);
        let publication = Publication {
            autostart: !self.no_autostart,
            token: self.url_token.map(token).transpose()?,
        };
        Ok((egress, publication))
    }
}

#[derive(Debug, Args)]
pub(crate) struct Network {
    /// The VM's id or name
    vm: VmRef,
    /// As a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    rules: Rules,
    /// Take the VM's rules away; those given with this take their place, without it they come first
    #[arg(long)]
    clear: bool,
    /// Let the VM reach nothing, which ends its connections; its own address works all the same
    #[arg(long, conflicts_with = "online")]
    offline: bool,
    /// Let the VM reach what the rules say again
    #[arg(long)]
    online: bool,
    /// Leave the VM off when somebody asks for its address or works in it while it is stopped
    #[arg(long, conflicts_with = "autostart")]
    no_autostart: bool,
    /// Start the VM then
    #[arg(long)]
    autostart: bool,
    /// A token that requests at the VM's address must show; `-` reads it from standard input
    #[arg(long, value_name = "TOKEN", conflicts_with = "no_url_token")]
    url_token: Option<String>,
    /// Let everybody in who knows the address
    #[arg(long)]
    no_url_token: bool,
    #[command(flatten)]
    limits: Limits,
}

impl Network {
    /// What the VM may reach after the change; none changes nothing.
    fn egress(&self, mut egress: Egress) -> Option<Egress> {
        let mut is_change = self.limits.change(&mut egress);
        is_change |= self.clear || self.offline || self.online || !self.rules.0.is_empty();
        let kept = if self.clear { Vec::new() } else { egress.rules };
        egress.rules = [self.rules.0.clone(), kept].concat();
        egress.offline = (egress.offline || self.offline) && !self.online;
        is_change.then_some(egress)
    }

    fn publication(
        &mut self,
        mut publication: Publication,
    ) -> Result<Option<Publication>, Complaint> {
        let mut is_change = self.autostart || self.no_autostart || self.no_url_token;
        publication.autostart = (publication.autostart || self.autostart) && !self.no_autostart;
        if self.no_url_token {
            publication.token = None;
        }
        if let Some(given) = self.url_token.take() {
            publication.token = Some(token(given)?);
            is_change = true;
        }
        Ok(is_change.then_some(publication))
    }
}

/// Shows how a VM is connected, after the changes asked for.
pub(crate) async fn run(client: &Client, mut asked: Network) -> Result<String, Complaint> {
    let vm = client.vm(asked.vm.clone());
    let what = format!("asking for the network of {}", asked.vm);
    let mut info = vm
        .network()
        .await
        .map_err(|error| Complaint::of(&what, &error))?;
    let egress = asked.egress(info.egress.clone());
    let publication = asked.publication(info.publication.clone())?;
    if egress.is_some() || publication.is_some() {
        let what = format!("changing the network of {}", asked.vm);
        info = vm
            .set_network(egress, publication)
            .await
            .map_err(|error| Complaint::of(&what, &error))?;
    }
    Ok(match asked.json {
        true => format!("{:#}\n", json(&info)),
        false => text(&info),
    })
}

/// The hash of a token, which is read from standard input when it is `-`.
fn token(given: String) -> Result<[u8; 32], Complaint> {
    let mut token = given;
    if token == "-" {
        token.clear();
        std::io::stdin()
            .lock()
            .read_line(&mut token)
            .map_err(|error| Complaint::new("reading the token", error.to_string()))?;
        token.truncate(token.trim_end_matches(['\r', '\n']).len());
    }
    match token.is_empty() {
        true => Err(Complaint::new("reading the token", "it is empty").usage()),
        false => Ok(url_token_hash(&token)),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let (number, factor) = [("K", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)]
        .into_iter()
        .find_map(|(unit, factor)| Some((upper.strip_suffix(unit)?, factor)))
        .unwrap_or((&upper, 1));
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "write bytes per second, or with a unit: 500K, 10M, 1G".into())
}

fn action(action: RuleAction) -> String {
    match action {
        RuleAction::Allow => "allow".into(),
        RuleAction::Deny => "deny".into(),
        other => format!("action-{}", other.to_wire()),
    }
}

fn limit(number: u64) -> String {
    match number {
        0 => "none".into(),
        number => number.to_string(),
    }
}

fn text(info: &NetworkInfo) -> String {
    let (egress, publication, counted) = (&info.egress, &info.publication, &info.counters);
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let mut lines = vec![
        ("online", yes(!egress.offline)),
        ("autostart", yes(publication.autostart)),
        ("url token", yes(publication.token.is_some())),
        ("bytes/s", limit(egress.bytes_per_second)),
        ("packets/s", limit(egress.packets_per_second)),
    ];
    let most = match egress.max_connections {
        0 => "the appliance's".to_owned(),
        most => most.to_string(),
    };
    lines.push(("connections", format!("{} of {most}", counted.open)));
    for rule in &egress.rules {
        lines.push((
            "rule",
            format!("{} {}", action(rule.action), rule_text(rule)),
        ));
    }
    lines.extend([
        (
            "sent",
            format!(
                "{} bytes in {} frames",
                counted.bytes_out, counted.frames_out
            ),
        ),
        (
            "received",
            format!("{} bytes in {} frames", counted.bytes_in, counted.frames_in),
        ),
        ("made", format!("{} connections", counted.connections)),
        ("asked for", format!("{} names", counted.names)),
        ("served", format!("{} requests", counted.requests)),
        (
            "refused",
            format!(
                "{} by rules, {} by limits, {} frames",
                counted.denied, counted.limited, counted.dropped
            ),
        ),
    ]);
    lines
        .iter()
        .map(|(name, value)| format!("{name:12} {value}\n"))
        .collect()
}

fn json(info: &NetworkInfo) -> Value {
    let (egress, publication, counted) = (&info.egress, &info.publication, &info.counters);
    let rules = egress.rules.iter().map(|rule| {
        let (first, last) = rule.ports;
        object!({
            "action": action(rule.action),
            "to": rule.to.to_string(),
            "rule": rule_text(rule),
            "firstPort": first,
            "lastPort": last,
        })
    });
    object!({
        "offline": egress.offline,
        "rules": Value::from_iter(rules),
        "bytesPerSecond": egress.bytes_per_second,
        "packetsPerSecond": egress.packets_per_second,
        "maxConnections": egress.max_connections,
        "autostart": publication.autostart,
        "urlToken": publication.token.is_some(),
        "counters": {
            "framesOut": counted.frames_out,
            "bytesOut": counted.bytes_out,
            "framesIn": counted.frames_in,
            "bytesIn": counted.bytes_in,
            "dropped": counted.dropped,
            "connections": counted.connections,
            "open": counted.open,
            "denied": counted.denied,
            "limited": counted.limited,
            "names": counted.names,
            "requests": counted.requests,
        },
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        network: Network,
    }

    fn network(arguments: &[&str]) -> Network {
        let line = ["network", "web"].iter().chain(arguments);
        Line::try_parse_from(line).unwrap().network
    }

    fn texts(rules: &[Rule]) -> Vec<String> {
        let text = |rule: &Rule| format!("{} {}", action(rule.action), rule_text(rule));
        rules.iter().map(text).collect()
    }

    #[test]
    fn rules_keep_their_order_and_come_before_those_that_are_there() {
        let old = Egress {
            rules: network(&["--allow", "192.0.2.7"]).rules.0,
            offline: true,
            ..Egress::default()
        };
        let line = [
            "--deny",
            "10.1.0.0/16",
            "--allow",
            "10.0.0.0/8:443/tcp",
            "--deny",
            "*",
        ];
        let new = ["deny 10.1.0.0/16", "allow 10.0.0.0/8:443/tcp", "deny *"];
        let after = network(&line).egress(old.clone()).unwrap();
        assert_eq!(texts(&after.rules)[..3], new);
        assert_eq!(texts(&after.rules)[3..], ["allow 192.0.2.7/32"]);
        assert!(after.offline);
        let line = [&line[..], &["--clear", "--online"]].concat();
        let after = network(&line).egress(old.clone()).unwrap();
        assert_eq!(texts(&after.rules), new);
        assert!(!after.offline);
        assert_eq!(network(&[]).egress(old), None);
    }

    #[test]
    fn only_what_is_said_of_an_address_changes() {
        let old = Publication {
            autostart: false,
            token: Some([7; 32]),
        };
        assert_eq!(network(&[]).publication(old.clone()).unwrap(), None);
        let on = network(&["--autostart"]).publication(old.clone()).unwrap();
        let on = on.unwrap();
        assert_eq!((on.autostart, on.token), (true, Some([7; 32])));
        let line = ["--url-token", "secret", "--no-autostart"];
        let other = network(&line).publication(old.clone()).unwrap().unwrap();
        assert_eq!(other.token, Some(url_token_hash("secret")));
        let open = network(&["--no-url-token"]).publication(old).unwrap();
        assert_eq!(open.unwrap().token, None);
    }

    #[test]
    fn a_rate_has_a_unit_or_none() {
        assert_eq!(bytes("500"), Ok(500));
        assert_eq!(bytes("500k"), Ok(500_000));
        assert_eq!(bytes("2G"), Ok(2_000_000_000));
        for text in ["", "k", "-1", "1.5M", "99999999999999G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
