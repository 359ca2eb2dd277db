//! The `supvm.toml` of an appliance under test, and the archive that carries it together with the
//! probe's shell. Of the token only a hash goes in.

use serde::Serialize;

use crate::cpio::{Archive, CpioError, pad};

/// What a scenario may want otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Seconds a VM has to come up.
    pub(crate) boot_deadline_s: u32,
    /// VMs get a first root that says [`STUCK`] and never comes up.
    pub(crate) stuck_guest: bool,
    /// VMs have one CPU also when nobody says how many.
    pub(crate) one_cpu: bool,
}

/// What a guest that never comes up says on its console.
pub(crate) const STUCK: &str = "this guest is stuck on purpose";

/// Where the first root of such a guest lies in the appliance.
const STUCK_INITRAMFS: &str = "debug/stuck.cpio";

impl Options {
    /// What nothing special needs.
    pub(crate) const DEFAULT: Self = Self {
        boot_deadline_s: 180,
        stuck_guest: false,
        one_cpu: false,
    };
}

#[derive(Serialize)]
struct Settings {
    public_port: u16,
    tokens: [Token; 2],
    boot: Boot,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<Guest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
    debug: Debug,
}

#[derive(Serialize)]
struct Guest {
    initramfs: String,
}

#[derive(Serialize)]
struct Limits {
    max_cpus: u16,
}

#[derive(Serialize)]
struct Token {
    owner: &'static str,
    blake3: String,
}

#[derive(Serialize)]
struct Boot {
    deadline_s: u32,
}

#[derive(Serialize)]
struct Debug {
    shell: [&'static str; 2],
    tty: &'static str,
}

/// The tools of busybox that the probe's commands use.
const APPLETS: [&str; 42] = [
    "ash", "awk", "basename", "cat", "chmod", "cut", "date", "dd", "df", "dmesg", "du", "env",
    "find", "free", "grep", "head", "hexdump", "id", "ifconfig", "kill", "ls", "lsmod", "mount",
    "netstat", "od", "pidof", "ps", "readlink", "rm", "sed", "seq", "sh", "sleep", "sort", "stat",
    "stty", "sync", "tail", "tr", "uname", "wc", "xargs",
];

/// The text of `supvm.toml`. The second token belongs to somebody else; `public_port` of this host
/// leads to the edge.
pub(crate) fn settings(
    options: Options,
    public_port: u16,
    token: &str,
    other: &str,
) -> Result<String, toml::ser::Error> {
    let hash = |token: &str| blake3::hash(token.as_bytes()).to_hex().to_string();
    toml::to_string(&Settings {
        public_port,
        tokens: [
            Token {
                owner: "qemu-test",
                blake3: hash(token),
            },
            Token {
                owner: "somebody-else",
                blake3: hash(other),
            },
        ],
        boot: Boot {
            deadline_s: options.boot_deadline_s,
        },
        guest: options.stuck_guest.then(|| Guest {
            initramfs: format!("/{STUCK_INITRAMFS}"),
        }),
        limits: options.one_cpu.then_some(Limits { max_cpus: 1 }),
        debug: Debug {
            shell: ["/debug/bin/sh", "-i"],
            tty: "ttyS1",
        },
    })
}

/// The image's initramfs with a second archive behind it.
pub(crate) fn initramfs(
    mut image: Vec<u8>,
    settings: &str,
    busybox: &[u8],
) -> Result<Vec<u8>, CpioError> {
    let mut archive = Archive::new();
    archive.directory("etc")?;
    archive.file("etc/supvm.toml", 0o600, settings.as_bytes())?;
    archive.directory("debug")?;
    archive.directory("debug/bin")?;
    archive.file("debug/busybox", 0o755, busybox)?;
    for applet in APPLETS {
        archive.symlink(&format!("debug/bin/{applet}"), "../busybox")?;
    }
    archive.file(STUCK_INITRAMFS, 0o644, &stuck(busybox)?)?;
    pad(&mut image);
    image.extend_from_slice(&archive.finish()?);
    Ok(image)
}

/// A guest's first root whose PID 1 sleeps for ever.
fn stuck(busybox: &[u8]) -> Result<Vec<u8>, CpioError> {
    let script = format!(
        "#!/busybox sh\n/busybox mount -t devtmpfs dev /dev\necho {STUCK} > /dev/console\nexec /busybox sleep 1000000\n"
    );
    let mut archive = Archive::new();
    archive.directory("dev")?;
    archive.file("busybox", 0o755, busybox)?;
    archive.file("init", 0o755, script.as_bytes())?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_hold_the_hash_and_not_the_token() {
        let text = settings(Options::DEFAULT, 8443, "secret", "other").unwrap();
        assert!(!text.contains("secret"));
        let parsed: toml::Table = text.parse().unwrap();
        let hash = parsed["tokens"][0]["blake3"].as_str().unwrap();
        assert_eq!(hash, blake3::hash(b"secret").to_hex().as_str());
        assert_eq!(parsed["public_port"].as_integer(), Some(8443));
        assert_eq!(parsed["boot"]["deadline_s"].as_integer(), Some(180));
    }

    #[test]
    fn the_second_archive_begins_on_a_boundary_and_the_first_is_unchanged() {
        let image = b"070701 first".to_vec();
        let odd = [image.clone(), vec![7]].concat();
        let joined = initramfs(odd, "x", b"y").unwrap();
        assert!(joined.starts_with(&image));
        assert_eq!(&joined[12..16], [7, 0, 0, 0]);
        assert_eq!(&joined[16..22], b"070701");
    }
}
