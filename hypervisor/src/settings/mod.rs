//! Settings: `supvm.toml`, parsed once into typed values. Every setting has a default, so an absent
//! file is a working one; an unknown name or a value that cannot be served is an error that says
//! where it stands. Nothing here is secret: of a token only its hash is kept.

mod certificates;
mod values;
mod world;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use protocol::host::proxy::{CustomDomain as ServedDomain, ServeEdge};
use protocol::id::{Owner, TemplateName};
use serde::{Deserialize, Deserializer};

pub use certificates::{Acme, CertificateFiles, DnsProof};
pub use values::{Domain, Ipv4Network, Port};
pub use world::{CustomDomain, Edge, Gateway};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the settings in {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The file is not valid. The cause names line, column and key.
    #[error("the settings in {} are not valid: {cause}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was found, and where.
        cause: Box<toml::de::Error>,
    },
    /// Two values do not go together.
    #[error("the settings in {} are not valid: {rule}", path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// What is expected.
        rule: String,
    },
}

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The domain under which VMs have their public addresses.
    pub domain: Domain,
    /// The port that clients use for public addresses; URLs carry it when it is not 443.
    pub public_port: Port,
    /// The template of a create that names none.
    pub default_template: DefaultTemplate,
    /// Where and for how many the API is served.
    pub api: Api,
    /// Where VMs have their public addresses.
    pub edge: Edge,
    /// By what and under which rules VMs reach the world.
    pub gateway: Gateway,
    /// What to show in place of certificates of the built-in authority.
    pub certificates: Option<CertificateFiles>,
    /// An authority to order certificates from.
    pub acme: Option<Acme>,
    /// Names beside the domain that lead to VMs.
    pub domains: Vec<CustomDomain>,
    /// Who may use the API.
    pub tokens: Vec<Token>,
    /// How VMs come up.
    pub boot: Boot,
    /// What VMs may use.
    pub limits: VmLimits,
    /// What VMs boot from.
    pub guest: Guest,
    /// How the host gets its addresses.
    pub network: Network,
    /// Looking inside a running appliance.
    pub debug: Debug,
    /// How much is logged.
    pub log: Log,
}

/// Where and for how many the API is served.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// Address and port of the API over TLS; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub listen: Option<SocketAddr>,
    /// Streams that one connection may have open, 2 to 256.
    #[serde(deserialize_with = "streams")]
    pub max_streams: u32,
    /// Connections at the same time.
    pub max_connections: u32,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: Some(SocketAddr::from(([0_u16; 8], 7443))),
            max_streams: 256,
            max_connections: 1024,
        }
    }
}

/// One token. Several may have the same owner.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Whom it belongs to.
    pub owner: Owner,
    /// The BLAKE3 hash of the token's text, 64 hexadecimal digits.
    #[serde(rename = "blake3", deserialize_with = "hash")]
    pub hash: blake3::Hash,
}

/// How VMs come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boot {
    /// Seconds from start to ready, 1 to 3600.
    #[serde(deserialize_with = "boot_deadline")]
    pub deadline_s: u32,
}

impl Default for Boot {
    fn default() -> Self {
        Self { deadline_s: 60 }
    }
}

/// What VMs may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmLimits {
    /// Virtual CPUs of one VM.
    pub max_cpus: u16,
    /// Memory of one VM in MiB.
    pub max_memory_mib: u32,
    /// Disk of one VM in MiB.
    pub max_disk_mib: u32,
    /// Memory of all running VMs in MiB; zero means what the host has, less a reserve.
    pub total_memory_mib: u64,
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            max_cpus: 32,
            max_memory_mib: 64 << 10,
            max_disk_mib: 1 << 20,
            total_memory_mib: 0,
        }
    }
}

/// What VMs boot from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guest {
    /// The guest kernel, an ELF vmlinux.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// The device that makes virtual machines.
    pub kvm: PathBuf,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            kernel: "/usr/lib/supvm/guest/vmlinux".into(),
            initramfs: "/usr/lib/supvm/guest/initramfs.cpio".into(),
            kvm: "/dev/kvm".into(),
        }
    }
}

/// How the host gets its addresses. Only the appliance uses this; `serve` leaves the network alone.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Ask by DHCP on every interface that is not listed in `static`.
    pub dhcp: bool,
    /// Interfaces with fixed addresses.
    #[serde(rename = "static")]
    pub fixed: Vec<StaticInterface>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            dhcp: true,
            fixed: Vec::new(),
        }
    }
}

/// An interface with a fixed address.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticInterface {
    /// Its name or its hardware address.
    pub interface: String,
    /// Address and prefix length, such as `192.0.2.10/24`.
    pub address: Ipv4Network,
    /// Default gateway.
    pub gateway: Option<Ipv4Addr>,
}

/// Looking inside a running appliance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Debug {
    /// A program and its arguments that init keeps running on [`tty`](Self::tty); empty for none.
    pub shell: Vec<String>,
    /// The terminal, such as `ttyS1`.
    pub tty: String,
}

/// How much is logged.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    #[serde(deserialize_with = "level")]
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
        }
    }
}

/// The template of a create that names none.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct DefaultTemplate(pub TemplateName);

impl Default for DefaultTemplate {
    fn default() -> Self {
        // A constant that the test below parses; the fallback cannot be reached.
        match "debian".parse() {
            Ok(name) => Self(name),
            Err(_) => unreachable!("`debian` is a template name"),
        }
    }
}

fn optional_address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        serde::de::Error::custom(format!(
            "`{text}` is no address and port, such as [::]:7443"
        ))
    })
}

fn hash<'de, D: Deserializer<'de>>(from: D) -> Result<blake3::Hash, D::Error> {
    let text = String::deserialize(from)?;
    blake3::Hash::from_hex(&text).map_err(|_| {
        serde::de::Error::custom(
            "a token's hash is 64 hexadecimal digits; `supvm token` makes a token and its hash",
        )
    })
}

fn streams<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    within(from, 2..=256, "max_streams")
}

fn boot_deadline<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    within(from, 1..=3600, "deadline_s")
}

fn within<'de, D: Deserializer<'de>>(
    from: D,
    range: std::ops::RangeInclusive<u32>,
    what: &str,
) -> Result<u32, D::Error> {
    let number = u32::deserialize(from)?;
    if range.contains(&number) {
        Ok(number)
    } else {
        Err(serde::de::Error::custom(format!(
            "{what} is {number}; give {} to {}",
            range.start(),
            range.end()
        )))
    }
}

fn level<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if ["error", "warn", "info", "debug", "trace"].contains(&text.as_str()) {
        Ok(text)
    } else {
        Err(serde::de::Error::custom(format!(
            "`{text}` is no level: error, warn, info, debug or trace"
        )))
    }
}

impl Settings {
    /// Reads the file; when there is none, the defaults hold.
    pub fn load(path: Option<&Path>) -> Result<Self, SettingsError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(SettingsError::Unreadable {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// Parses the text of `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SettingsError> {
        let settings: Self = toml::from_str(text).map_err(|cause| SettingsError::Invalid {
            path: path.to_owned(),
            cause: Box::new(cause),
        })?;
        let contradiction = |rule: &str| {
            Err(SettingsError::Contradiction {
                path: path.to_owned(),
                rule: rule.to_owned(),
            })
        };
        let limits = settings.limits;
        if limits.max_cpus == 0 || limits.max_memory_mib < 128 || limits.max_disk_mib == 0 {
            return contradiction(
                "[limits] must allow at least max_cpus = 1, max_memory_mib = 128 and max_disk_mib = 1",
            );
        }
        if settings.certificates.is_some() && settings.acme.is_some() {
            return contradiction("give [certificates] or [acme], not both");
        }
        if settings.domains.len() > world::MAX_DOMAINS {
            return contradiction("[[domains]] may be given at most 8 times");
        }
        let mut names = std::collections::BTreeSet::new();
        for custom in &settings.domains {
            let (name, domain) = (custom.name.as_str(), settings.domain.as_str());
            let below = name.strip_suffix(domain);
            if below.is_some_and(|rest| rest.is_empty() || rest.ends_with('.')) {
                return contradiction(&format!(
                    "[[domains]]: {name} is the domain itself or below it; those names are the \
                     appliance's to give"
                ));
            }
            if !names.insert(name) {
                return contradiction(&format!("[[domains]]: {name} is there twice"));
            }
        }
        if settings.debug.shell.is_empty() != settings.debug.tty.is_empty() {
            return contradiction("[debug] needs both `shell` and `tty`, or neither");
        }
        Ok(settings)
    }

    /// What proxy is told of the VMs' public addresses, but for certificates.
    pub fn serve_edge(&self) -> ServeEdge {
        let custom = self.domains.iter().map(|custom| ServedDomain {
            name: custom.name.as_str().to_owned(),
            subdomain: custom.vm.clone(),
            port: custom.port.get(),
        });
        ServeEdge {
            custom: custom.collect(),
            ..self
                .edge
                .serve(self.domain.as_str(), self.public_port.get())
        }
    }

    /// The public address of a VM, without a trailing slash.
    pub fn url(&self, subdomain: &protocol::id::Subdomain) -> String {
        match self.public_port.get() {
            443 => format!("https://{subdomain}.{}", self.domain.as_str()),
            port => format!("https://{subdomain}.{}:{port}", self.domain.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(text, Path::new("/etc/supvm.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_or_absent_file_is_the_defaults() {
        let settings = parse("").unwrap();
        assert_eq!(settings, Settings::default());
        assert_eq!(
            settings,
            Settings::load(Some(Path::new("/nonexistent/supvm.toml"))).unwrap()
        );
        assert_eq!(settings.domain.as_str(), "supvm.localhost");
        assert_eq!(settings.default_template.0.as_str(), "debian");
        assert_eq!(settings.boot.deadline_s, 60);
        assert_eq!(settings.api.listen.unwrap().to_string(), "[::]:7443");
    }

    #[test]
    fn every_setting_can_be_given() {
        let hash = blake3::hash(b"secret").to_hex();
        let settings = parse(&format!(
            r#"
            domain = "vms.example.org"
            public_port = 8443
            default_template = "alpine"
            api = {{ listen = "", max_streams = 100, max_connections = 10 }}
            tokens = [{{ owner = "me", blake3 = "{hash}" }}]
            boot = {{ deadline_s = 180 }}
            limits = {{ max_cpus = 4, max_memory_mib = 4096, max_disk_mib = 20480, total_memory_mib = 8192 }}
            guest = {{ kernel = "/k", initramfs = "/i", kvm = "/dev/null" }}
            debug = {{ shell = ["/debug/busybox", "sh"], tty = "ttyS1" }}
            log = {{ level = "debug" }}
            certificates = {{ chain = "/c.pem", key = "/k.pem" }}
            [network]
            dhcp = false
            [[network.static]]
            interface = "eth0"
            address = "192.0.2.10/24"
            gateway = "192.0.2.1"
            "#
        ))
        .unwrap();
        assert_eq!(settings.api.listen, None);
        assert_eq!(settings.tokens[0].hash, blake3::hash(b"secret"));
        assert_eq!(settings.network.fixed[0].address.prefix, 24);
        let subdomain = protocol::id::Subdomain::from_random([0; 20]);
        assert_eq!(
            settings.url(&subdomain),
            "https://aaaaaaaaaaaaaaaaaaaa.vms.example.org:8443"
        );
        assert_eq!(
            Settings::default().url(&subdomain),
            "https://aaaaaaaaaaaaaaaaaaaa.supvm.localhost"
        );
    }

    #[test]
    fn certificates_come_from_files_or_from_an_authority_and_not_from_both() {
        let acme = "acme = { server = \"192.0.2.53:53\", zone = \"a\", key_name = \"k\", key_file = \"/t\" }";
        let settings = parse(acme).unwrap();
        assert_eq!(settings.acme.unwrap().dns.unwrap().propagation_s, 30);
        let alone = parse("acme = {}").unwrap().acme.unwrap();
        assert_eq!(alone.dns, None);
        for half in ["server = \"192.0.2.53:53\"", "propagation_s = 3"] {
            let error = parse(&format!("acme = {{ {half} }}")).unwrap_err();
            assert!(error.contains("or none of them"), "{error}");
        }
        let both = format!("{acme}\ncertificates = {{ chain = \"/c\", key = \"/k\" }}");
        assert!(parse(&both).unwrap_err().contains("not both"));
    }

    #[test]
    fn names_of_the_operators_own_lead_to_vms_and_are_none_of_the_appliances() {
        let label = "abcdefghijklmnopqrst";
        let one = |name: &str| format!("[[domains]]\nname = \"{name}\"\nvm = \"{label}\"\n");
        let settings = parse(&format!("{}port = 80", one("app.example.com"))).unwrap();
        let custom = settings.serve_edge().custom.remove(0);
        assert_eq!((custom.name.as_str(), custom.port), ("app.example.com", 80));
        assert_eq!(custom.subdomain.as_str(), label);
        let domain = "domain = \"vms.example.org\"\n";
        let many: String = (0..9).map(|n| one(&format!("a{n}.example.com"))).collect();
        let twice = one("app.example.com").repeat(2);
        for (text, expected) in [
            (one("vms.example.org"), "the domain itself or below"),
            (one("a.vms.example.org"), "the domain itself or below"),
            (one("App.example.com"), "is no domain"),
            (twice, "there twice"),
            (many, "at most 8"),
            (
                "[[domains]]\nname = \"a.b\"\nvm = \"a\"".into(),
                "20 characters",
            ),
        ] {
            let error = parse(&format!("{domain}{text}")).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        // Ends in the same letters, and is another name.
        parse(&format!("{domain}{}", one("xvms.example.org"))).unwrap();
    }

    #[test]
    fn an_error_names_the_file_the_line_and_the_key() {
        for (text, expected) in [
            ("\nboot = { deadlines = 3 }", "deadlines"),
            ("\ncertificates = { chain = \"/c\" }", "missing field `key`"),
            ("\ndomain = \"Example\"", "`Example` is no domain"),
            ("\ndomain = \"a..b\"", "no domain"),
            ("\npublic_port = 0", "port 0"),
            ("\npublic_port = 70000", "public_port"),
            ("\nboot = { deadline_s = 0 }", "deadline_s is 0"),
            ("\napi = { max_streams = 500 }", "max_streams is 500"),
            ("\napi = { listen = \"7443\" }", "`7443` is no address"),
            (
                "\ntokens = [{ owner = \"me\", blake3 = \"12\" }]",
                "64 hexadecimal",
            ),
            ("\ntokens = [{ owner = \"Me\" }]", "`Me`"),
            ("\nlog = { level = \"loud\" }", "`loud`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("/etc/supvm.toml"), "{error}");
            assert!(error.contains("line 2"), "{error}");
            assert!(error.contains(expected), "{error}");
        }
        assert!(parse("debug = { tty = \"ttyS1\" }").is_err());
        assert!(parse("limits = { max_cpus = 0 }").is_err());
    }
}
