//! A create's arguments, checked once: each field is either something that can be made or an error
//! that names the field, the value and the limit.

use protocol::id::{IdempotencyKey, TemplateName, VmId, VmName};
use protocol::network::{
    Egress, MAX_CONNECTIONS, MAX_RULES, Publication, RuleAction, RuleProtocol,
};
use protocol::vm::{CreateVm, MAX_ENV, MAX_LABEL_LEN, MAX_LABELS};
use protocol::{ErrorBody, ErrorCode};

use super::store::templates::Template;
use crate::settings::Settings;

/// The machine model that new VMs get.
pub(crate) const MACHINE_MODEL: u32 = 1;

const DEFAULT_CPUS: u16 = 2;
const DEFAULT_MEMORY_MIB: u32 = 1024;
const DEFAULT_DISK_MIB: u32 = 10_240;

/// The least memory that a guest comes up with.
const MIN_MEMORY_MIB: u32 = 128;

/// What a create asks for, defaults filled in.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) key: IdempotencyKey,
    /// Hash over all arguments.
    pub(crate) arguments: [u8; 32],
    pub(crate) template: TemplateName,
    pub(crate) name: Option<VmName>,
    pub(crate) cpus: u16,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: Option<u32>,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) egress: Egress,
    pub(crate) publication: Publication,
}

/// The same with its template.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) wanted: Wanted,
    pub(crate) template: Template,
    pub(crate) disk_mib: u32,
}

impl Wanted {
    pub(crate) fn check(create: CreateVm, settings: &Settings) -> Result<Self, ErrorBody> {
        let arguments = postcard::to_allocvec(&create)
            .map_err(|error| invalid(format!("the arguments cannot be encoded: {error}")))?;
        let arguments = *blake3::hash(&arguments).as_bytes();
        if let Some(name) = &create.name
            && name.as_str().parse::<VmId>().is_ok()
        {
            return Err(invalid(format!(
                "name: `{name}` has the form of a VM id; choose another"
            )));
        }
        let limits = settings.limits;
        let cpus = create.cpus.unwrap_or(DEFAULT_CPUS.min(limits.max_cpus));
        range("cpus", cpus, 1, limits.max_cpus)?;
        let memory_mib = create
            .memory_mib
            .unwrap_or(DEFAULT_MEMORY_MIB.min(limits.max_memory_mib));
        range(
            "memory_mib",
            memory_mib,
            MIN_MEMORY_MIB,
            limits.max_memory_mib,
        )?;
        if let Some(disk) = create.disk_mib {
            range("disk_mib", disk, 1, limits.max_disk_mib)?;
        }
        check_labels(&create.labels)?;
        check_env(&create.env)?;
        check_egress(&create.egress)?;
        Ok(Self {
            key: create.key,
            arguments,
            template: create
                .template
                .unwrap_or_else(|| settings.default_template.0.clone()),
            name: create.name,
            cpus,
            memory_mib,
            disk_mib: create.disk_mib,
            labels: create.labels,
            env: create.env,
            egress: create.egress,
            publication: create.publication,
        })
    }

    pub(crate) fn with_template(
        self,
        template: Template,
        settings: &Settings,
    ) -> Result<Plan, ErrorBody> {
        let least = template.disk_mib();
        let most = settings.limits.max_disk_mib;
        let disk_mib = match self.disk_mib {
            Some(disk) if disk < least => {
                return Err(invalid(format!(
                    "disk_mib: {disk} is too small; the template `{}` needs at least {least}",
                    template.name
                )));
            }
            Some(disk) => disk,
            None => DEFAULT_DISK_MIB.min(most).max(least),
        };
        Ok(Plan {
            wanted: self,
            template,
            disk_mib,
        })
    }
}

fn invalid(message: String) -> ErrorBody {
    ErrorBody::caller(ErrorCode::InvalidArgument, message)
}

fn range<N: PartialOrd + std::fmt::Display>(
    field: &str,
    value: N,
    least: N,
    most: N,
) -> Result<(), ErrorBody> {
    if value < least || value > most {
        return Err(invalid(format!(
            "{field}: {value} is out of range; give {least} to {most}"
        )));
    }
    Ok(())
}

fn check_labels(labels: &[(String, String)]) -> Result<(), ErrorBody> {
    if labels.len() > MAX_LABELS {
        return Err(invalid(format!(
            "labels: {} are too many; at most {MAX_LABELS}",
            labels.len()
        )));
    }
    for (key, value) in labels {
        if key.is_empty() {
            return Err(invalid("labels: a key is empty".into()));
        }
        if key.len() > MAX_LABEL_LEN || value.len() > MAX_LABEL_LEN {
            return Err(invalid(format!(
                "labels: `{}` is too long; a key or value has at most {MAX_LABEL_LEN} bytes",
                short(key)
            )));
        }
    }
    unique("labels", labels)
}

fn check_env(env: &[(String, String)]) -> Result<(), ErrorBody> {
    if env.len() > MAX_ENV {
        return Err(invalid(format!(
            "env: {} variables are too many; at most {MAX_ENV}",
            env.len()
        )));
    }
    for (key, value) in env {
        if key.is_empty() || key.contains(['=', '\0']) {
            return Err(invalid(format!(
                "env: `{}` is no name of a variable; it is not empty and has no = or NUL",
                short(key)
            )));
        }
        if value.contains('\0') {
            return Err(invalid(format!(
                "env: the value of `{}` has a NUL",
                short(key)
            )));
        }
    }
    unique("env", env)
}

/// What a VM may reach, from a create or a later change.
pub(crate) fn check_egress(egress: &Egress) -> Result<(), ErrorBody> {
    if egress.rules.len() > MAX_RULES {
        return Err(invalid(format!(
            "egress: {} rules are too many; at most {MAX_RULES}",
            egress.rules.len()
        )));
    }
    if egress.max_connections > MAX_CONNECTIONS {
        return Err(invalid(format!(
            "egress: {} connections are too many; at most {MAX_CONNECTIONS}",
            egress.max_connections
        )));
    }
    for (number, rule) in (1_u32..).zip(&egress.rules) {
        let (first, last) = rule.ports;
        if let RuleAction::Other(action) = rule.action {
            return Err(invalid(format!(
                "egress: rule {number} has action {action}, which is not known here; give {} to \
                 allow or {} to deny",
                RuleAction::Allow.to_wire(),
                RuleAction::Deny.to_wire()
            )));
        }
        if let RuleProtocol::Other(protocol) = rule.protocol {
            return Err(invalid(format!(
                "egress: rule {number} has protocol {protocol}, which is not known here; give {} \
                 (any), {} (TCP), {} (UDP) or {} (ICMP)",
                RuleProtocol::Any.to_wire(),
                RuleProtocol::Tcp.to_wire(),
                RuleProtocol::Udp.to_wire(),
                RuleProtocol::Icmp.to_wire()
            )));
        }
        if first > last {
            return Err(invalid(format!(
                "egress: rule {number} has ports {first} to {last}; give the lower one first"
            )));
        }
        if rule.protocol == RuleProtocol::Icmp && rule.ports != (0, u16::MAX) {
            return Err(invalid(format!(
                "egress: rule {number} has ports {first} to {last}, and ICMP has none; give 0 to {}",
                u16::MAX
            )));
        }
    }
    Ok(())
}

fn unique(field: &str, pairs: &[(String, String)]) -> Result<(), ErrorBody> {
    let mut keys: Vec<&str> = pairs.iter().map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    let twice = keys.windows(2).find_map(|pair| match pair {
        [one, other] if one == other => Some(*one),
        _ => None,
    });
    match twice {
        Some(key) => Err(invalid(format!("{field}: `{}` is given twice", short(key)))),
        None => Ok(()),
    }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use protocol::network::Rule;

    use super::*;

    fn create() -> CreateVm {
        CreateVm {
            key: IdempotencyKey([1; 16]),
            template: None,
            name: None,
            cpus: None,
            memory_mib: None,
            disk_mib: None,
            labels: Vec::new(),
            env: Vec::new(),
            egress: Egress::default(),
            publication: Publication::default(),
        }
    }

    #[test]
    fn defaults_are_filled_in() {
        let wanted = Wanted::check(create(), &Settings::default()).unwrap();
        assert_eq!((wanted.cpus, wanted.memory_mib), (2, 1024));
        assert_eq!(wanted.template.as_str(), "debian");
    }

    #[test]
    fn every_bad_field_is_named_with_its_value() {
        let pair = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
        let many = |count: usize| (0..count).map(|n| (n.to_string(), String::new())).collect();
        let twice = vec![
            ("a".to_owned(), "1".to_owned()),
            ("a".to_owned(), "2".to_owned()),
        ];
        for (bad, expected) in [
            (
                CreateVm {
                    cpus: Some(0),
                    ..create()
                },
                "cpus: 0",
            ),
            (
                CreateVm {
                    cpus: Some(33),
                    ..create()
                },
                "cpus: 33",
            ),
            (
                CreateVm {
                    memory_mib: Some(64),
                    ..create()
                },
                "memory_mib: 64",
            ),
            (
                CreateVm {
                    memory_mib: Some(u32::MAX),
                    ..create()
                },
                "memory_mib: 4294967295",
            ),
            (
                CreateVm {
                    disk_mib: Some(0),
                    ..create()
                },
                "disk_mib: 0",
            ),
            (
                CreateVm {
                    disk_mib: Some(2 << 20),
                    ..create()
                },
                "disk_mib: 2097152",
            ),
            (
                CreateVm {
                    name: Some("vm-12345678".parse().unwrap()),
                    ..create()
                },
                "form of a VM id",
            ),
            (
                CreateVm {
                    labels: many(65),
                    ..create()
                },
                "labels: 65",
            ),
            (
                CreateVm {
                    labels: pair("", "x"),
                    ..create()
                },
                "key is empty",
            ),
            (
                CreateVm {
                    labels: pair("a", &"x".repeat(257)),
                    ..create()
                },
                "`a` is too long",
            ),
            (
                CreateVm {
                    labels: twice.clone(),
                    ..create()
                },
                "labels: `a` is given twice",
            ),
            (
                CreateVm {
                    env: many(257),
                    ..create()
                },
                "env: 257",
            ),
            (
                CreateVm {
                    env: pair("A=B", "x"),
                    ..create()
                },
                "`A=B`",
            ),
            (
                CreateVm {
                    env: pair("A\0", "x"),
                    ..create()
                },
                "no name of a variable",
            ),
            (
                CreateVm {
                    env: pair("A", "\0"),
                    ..create()
                },
                "`A` has a NUL",
            ),
            (
                CreateVm {
                    env: twice,
                    ..create()
                },
                "env: `a` is given twice",
            ),
        ] {
            let error = Wanted::check(bad, &Settings::default()).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains(expected), "{}", error.message);
        }
    }

    #[test]
    fn a_rule_that_cannot_be_kept_is_named_with_what_is_wrong() {
        let good = Rule {
            action: RuleAction::Allow,
            to: "*".parse().unwrap(),
            protocol: RuleProtocol::Any,
            ports: (0, u16::MAX),
        };
        let with = |rules: Vec<Rule>| {
            let egress = Egress {
                rules,
                ..Egress::default()
            };
            let create = CreateVm { egress, ..create() };
            Wanted::check(create, &Settings::default())
        };
        let kept = with(vec![good.clone(); MAX_RULES]).unwrap();
        assert_eq!(kept.egress.rules.len(), MAX_RULES);
        let second = |bad: Rule| vec![good.clone(), bad];
        for (rules, expected) in [
            (vec![good.clone(); MAX_RULES + 1], "257 rules are too many"),
            (
                second(Rule {
                    action: RuleAction::Other(9),
                    ..good.clone()
                }),
                "rule 2 has action 9",
            ),
            (
                second(Rule {
                    protocol: RuleProtocol::Other(9),
                    ..good.clone()
                }),
                "rule 2 has protocol 9",
            ),
            (
                second(Rule {
                    ports: (443, 80),
                    ..good.clone()
                }),
                "ports 443 to 80",
            ),
            (
                second(Rule {
                    protocol: RuleProtocol::Icmp,
                    ports: (1, 1),
                    ..good.clone()
                }),
                "ICMP has none",
            ),
        ] {
            let error = with(rules).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains(expected), "{}", error.message);
        }
    }

    #[test]
    fn a_disk_is_never_smaller_than_its_template() {
        let template = Template {
            name: "debian".parse().unwrap(),
            version: "1".parse().unwrap(),
            disk_bytes: (3000 << 20) + 1,
            disk: "/x".into(),
        };
        let settings = Settings::default();
        let with = |disk_mib| {
            Wanted::check(
                CreateVm {
                    disk_mib,
                    ..create()
                },
                &settings,
            )
            .unwrap()
            .with_template(template.clone(), &settings)
        };
        assert_eq!(with(None).unwrap().disk_mib, 10_240);
        assert_eq!(with(Some(3001)).unwrap().disk_mib, 3001);
        assert!(
            with(Some(3000))
                .unwrap_err()
                .message
                .contains("at least 3001")
        );
    }
}
