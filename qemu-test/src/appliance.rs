//! A booted appliance, reached as its owner reaches it: certificate authority compared with the
//! console, token, API. It also knows how to go down, up again and lose its power.

use std::path::{Path, PathBuf};
use std::time::Duration;

use client::{Client, ClientError, Endpoint, Trust, TrustError, fetch_ca};
use data_encoding::{BASE32_NOPAD, HEXLOWER};
use nix::fcntl::Flock;
use tokio::time::{Instant, sleep, timeout};

use crate::busybox::{self, BusyboxError};
use crate::console::{self, ConsoleError};
use crate::cpio::{CpioError, pad};
use crate::instance::{self, Home, Instance, InstanceError, Start};
use crate::probe::Probe;
use crate::qemu::{Accelerator, file};
use crate::settings::{self, Options};

/// How long the appliance may take from power to a working API.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// How long one attempt to reach the API may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Why there is no working appliance.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplianceError {
    /// The emulated server.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// Its console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The probe's shell.
    #[error(transparent)]
    Busybox(#[from] BusyboxError),
    /// The initramfs.
    #[error(transparent)]
    Cpio(#[from] CpioError),
    /// The settings cannot be written.
    #[error("settings: {0}")]
    Settings(#[from] toml::ser::Error),
    /// An image is missing.
    #[error("cannot read {}: {cause}; `make images` builds it", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The API.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The certificate authority.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Somebody else answers.
    #[error(
        "the API shows a certificate authority with SHA-256 {shown}, the console says {console}"
    )]
    WrongAuthority {
        /// What the connection showed.
        shown: String,
        /// What the console showed.
        console: String,
    },
    /// The API's address makes no sense.
    #[error("endpoint {0}")]
    Endpoint(String),
    /// It did not come up.
    #[error("the API did not answer within {} s: {last}", BOOT_PATIENCE.as_secs())]
    Deadline {
        /// What the last attempt met.
        last: String,
    },
    /// No random numbers.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// Where images and instances are.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The images that image-builder left.
    pub(crate) image: PathBuf,
    /// The instance's directory.
    pub(crate) home: PathBuf,
    /// One more archive for the appliance's first root.
    pub(crate) extra: Option<PathBuf>,
}

/// How to boot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boot {
    /// The appliance's settings.
    pub(crate) options: Options,
    /// Keep the data disk of an earlier boot.
    pub(crate) keep_data: bool,
    /// After so long QEMU is ended in any case.
    pub(crate) deadline: Duration,
    /// QEMU ends when this process does.
    pub(crate) attached: bool,
}

/// A booted appliance.
#[derive(Debug)]
pub(crate) struct Appliance {
    home: Home,
    layout: Layout,
    boot: Boot,
    instance: Instance,
    token: String,
    other_token: String,
    edge_port: u16,
    trust: Trust,
    endpoint: Endpoint,
    /// From power to a working API.
    pub(crate) boot_time: Duration,
    _lock: Flock<std::fs::File>,
}

impl Appliance {
    /// Boots and waits until the API answers. On failure nothing is left running.
    pub(crate) async fn boot(layout: &Layout, boot: Boot) -> Result<Self, ApplianceError> {
        let home = Home::open(&layout.home)?;
        let lock = home.lock()?;
        let token = token(&home, "token")?;
        let other_token = self::token(&home, "token.other")?;
        let read = |path: PathBuf| {
            std::fs::read(&path).map_err(|cause| ApplianceError::Image { path, cause })
        };
        let mut image = read(layout.image.join("initramfs.cpio"))?;
        if let Some(extra) = &layout.extra {
            pad(&mut image);
            image.extend_from_slice(&read(extra.clone())?);
        }
        // In the settings before QEMU runs, because VMs' addresses carry it.
        let edge_port = free_port().map_err(InstanceError::from)?;
        let settings = settings::settings(boot.options, edge_port, &token, &other_token)?;
        let initramfs = settings::initramfs(image, &settings, &busybox::load()?)?;
        home.write_private(file::INITRAMFS, &initramfs)?;
        // An overlay in use must not be replaced under the one who uses it.
        if let Some(stale) = home.running() {
            stale.end().await.map_err(InstanceError::from)?;
        }
        home.overlay(&layout.image.join("data.qcow2"), boot.keep_data)
            .await?;
        let (instance, trust, endpoint, boot_time) =
            power_on(&home, layout, boot, edge_port, &token).await?;
        Ok(Self {
            home,
            layout: layout.clone(),
            boot,
            instance,
            token,
            other_token,
            edge_port,
            trust,
            endpoint,
            boot_time,
            _lock: lock,
        })
    }

    /// Boots again on the same data disk after [`Home::power_off`] or [`Home::cut_power`].
    pub(crate) async fn boot_again(&mut self) -> Result<(), ApplianceError> {
        let on = power_on(
            &self.home,
            &self.layout,
            self.boot,
            self.edge_port,
            &self.token,
        )
        .await?;
        (self.instance, self.trust, self.endpoint, self.boot_time) = on;
        Ok(())
    }

    /// Its directory.
    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// A new connection, let in by the token.
    pub(crate) async fn client(&self) -> Result<Client, ClientError> {
        self.client_with(&self.token).await
    }

    /// A new connection of another owner's.
    pub(crate) async fn other_client(&self) -> Result<Client, ClientError> {
        self.client_with(&self.other_token).await
    }

    /// A new connection with any token.
    pub(crate) async fn client_with(&self, token: &str) -> Result<Client, ClientError> {
        Client::connect(self.endpoint.clone(), token.to_owned(), self.trust.clone()).await
    }

    /// The token, for those who speak the protocol themselves.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// The API's port on this host's loopback.
    pub(crate) fn port(&self) -> u16 {
        self.instance.api_port()
    }

    /// The port of this host's loopback that leads to the edge.
    pub(crate) fn edge_port(&self) -> u16 {
        self.edge_port
    }

    /// The shell inside.
    pub(crate) async fn probe(&self) -> Result<Probe, InstanceError> {
        instance::probe(&self.home).await
    }

    /// Waits until the API answers again after something inside was restarted.
    pub(crate) async fn client_again(&self) -> Result<Client, ApplianceError> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        answer(&self.endpoint, &self.token, &self.trust, deadline).await
    }
}

async fn power_on(
    home: &Home,
    layout: &Layout,
    boot: Boot,
    edge_port: u16,
    token: &str,
) -> Result<(Instance, Trust, Endpoint, Duration), ApplianceError> {
    let begun = Instant::now();
    let start = Start {
        accelerator: Accelerator::detect(),
        deadline: boot.deadline,
        attached: boot.attached,
        edge_port,
    };
    let mut instance = Instance::start(home, &layout.image, start).await?;
    let port = instance.api_port();
    let ready = tokio::select! {
        ready = become_ready(home, port, token, begun + BOOT_PATIENCE) => ready,
        _ = instance.ended() => {
            Err(InstanceError::Ended("the appliance went down while booting".into()).into())
        }
    };
    match ready {
        Ok((trust, endpoint)) => Ok((instance, trust, endpoint, begun.elapsed())),
        Err(error) => {
            if let Some(identity) = home.running() {
                identity.end().await.map_err(InstanceError::from)?;
            }
            Err(error)
        }
    }
}

async fn become_ready(
    home: &Home,
    port: u16,
    token: &str,
    deadline: Instant,
) -> Result<(Trust, Endpoint), ApplianceError> {
    let text = format!("https://127.0.0.1:{port}");
    let endpoint: Endpoint = text
        .parse()
        .map_err(|error| ApplianceError::Endpoint(format!("{text}: {error}")))?;
    let fingerprint = home
        .console()
        .wait_for(
            "the certificate authority's fingerprint",
            deadline,
            console::authority_fingerprint,
        )
        .await?;
    let fingerprint = HEXLOWER.encode(&fingerprint);
    let fetched = retry(deadline, || fetch_ca(&endpoint)).await?;
    if fetched.sha256 != fingerprint {
        return Err(ApplianceError::WrongAuthority {
            shown: fetched.sha256,
            console: fingerprint,
        });
    }
    let trust = Trust::from_pem(fetched.pem.as_bytes())?;
    answer(&endpoint, token, &trust, deadline).await?;
    home.write_private("ca.pem", fetched.pem.as_bytes())?;
    let env = format!(
        "export SUP_ENDPOINT={text}\nexport SUP_TOKEN={token}\nexport SUP_CA='{}'\n",
        home.join("ca.pem").display()
    );
    home.write_private("env", env.as_bytes())?;
    Ok((trust, endpoint))
}

async fn answer(
    endpoint: &Endpoint,
    token: &str,
    trust: &Trust,
    deadline: Instant,
) -> Result<Client, ApplianceError> {
    let connect = || Client::connect(endpoint.clone(), token.to_owned(), trust.clone());
    retry(deadline, connect).await
}

/// Tries until it works or the deadline is over. QEMU takes connections whether or not somebody
/// listens inside, so no event tells when the API does; the pause between attempts grows.
async fn retry<T, F: Future<Output = Result<T, ClientError>>>(
    deadline: Instant,
    attempt: impl Fn() -> F,
) -> Result<T, ApplianceError> {
    let mut pause = Duration::from_millis(50);
    loop {
        let last = match timeout(ATTEMPT, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            // A wrong token stays wrong.
            Ok(Err(error @ ClientError::Refused(_))) => return Err(error.into()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", ATTEMPT.as_secs()),
        };
        if Instant::now() + pause > deadline {
            return Err(ApplianceError::Deadline { last });
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

/// A port of the loopback that nobody has now. Another may take it before QEMU does; then QEMU says
/// so and ends.
fn free_port() -> std::io::Result<u16> {
    let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// The token kept in the directory, made when it is not there yet.
fn token(home: &Home, name: &str) -> Result<String, ApplianceError> {
    let path = home.join(name);
    if let Some(token) = read_token(&path) {
        return Ok(token);
    }
    let mut random = [0; 32];
    getrandom::fill(&mut random)?;
    let token = BASE32_NOPAD.encode(&random).to_lowercase();
    home.write_private(name, token.as_bytes())?;
    Ok(token)
}

fn read_token(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let token = text.trim();
    (token.len() == 52 && token.bytes().all(|b| b.is_ascii_alphanumeric()))
        .then(|| token.to_owned())
}
