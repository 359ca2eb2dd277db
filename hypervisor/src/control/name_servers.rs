//! The host's name servers, by which proxy's gateway finds out names where the settings name none:
//! those in resolv.conf, which init writes in the appliance from what DHCP gave. The kernel tells of
//! changes; nothing here looks by itself.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Where a host keeps them.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Most that are used.
const MOST: usize = 8;

/// The longest file that is read.
const LONGEST: u64 = 64 << 10;

/// Where the host has none.
const PUBLIC: [&str; 3] = ["1.1.1.1:53", "8.8.8.8:53", "[2606:4700:4700::1111]:53"];

/// The file and news of it.
pub(crate) struct NameServers {
    path: PathBuf,
    /// None where the kernel tells nothing.
    news: Option<AsyncFd<Watch>>,
}

struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl NameServers {
    /// Follows the file from now on. It need not be there; without its directory nothing is told.
    pub(crate) fn follow(path: &Path) -> Self {
        // A link is replaced less often than what it leads to.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let news = watch(&path);
        if let Err(error) = &news {
            tracing::warn!(path = %path.display(), %error, "changes of the name servers are not followed");
        }
        let news = news.ok();
        Self { path, news }
    }

    /// What the file says now, or public ones where it says nothing.
    pub(crate) fn now(&self) -> Vec<SocketAddr> {
        let read = || -> io::Result<String> {
            let mut text = String::new();
            let file = std::fs::File::open(&self.path)?;
            io::Read::read_to_string(&mut io::Read::take(file, LONGEST), &mut text)?;
            Ok(text)
        };
        let found = read().map_or_else(|_| Vec::new(), |text| parse(&text));
        match found.is_empty() {
            true => PUBLIC.iter().filter_map(|text| text.parse().ok()).collect(),
            false => found,
        }
    }

    /// Waits until the file may have changed.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        let Some(news) = &self.news else {
            return std::future::pending().await;
        };
        loop {
            let mut guard = news.readable().await?;
            let mut some = false;
            loop {
                match news.get_ref().0.read_events() {
                    Ok(events) => {
                        some |= events
                            .iter()
                            .any(|event| event.name.as_deref() == self.path.file_name());
                    }
                    Err(nix::Error::EINTR) => {}
                    Err(nix::Error::EAGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            guard.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}

fn watch(path: &Path) -> io::Result<AsyncFd<Watch>> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    inotify.add_watch(
        directory,
        AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_DELETE,
    )?;
    // SAFETY: the descriptor is owned, and neither closed nor replaced before the AsyncFd is
    // dropped: nothing here takes it out again.
    unsafe { AsyncFd::register(Watch(inotify)) }.map_err(io::Error::from)
}

/// The name servers in a resolv.conf (resolv.conf(5)), in order.
fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        let word = words.next()?;
        if let Ok(address) = word.parse::<IpAddr>() {
            return Some(SocketAddr::new(address, 53));
        }
        // A link-local one names its interface.
        let (address, interface) = word.split_once('%')?;
        let scope = nix::net::if_::if_nametoindex(interface).ok()?;
        Some(SocketAddrV6::new(address.parse().ok()?, 53, 0, scope).into())
    };
    text.lines().filter_map(server).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(servers: &[SocketAddr]) -> Vec<String> {
        servers.iter().map(SocketAddr::to_string).collect()
    }

    #[tokio::test]
    async fn the_hosts_name_servers_are_read_and_their_change_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let servers = NameServers::follow(&path);
        assert_eq!(texts(&servers.now()), PUBLIC);
        let other = directory.path().join("other");
        let text = "# by hand\nsearch example.org\nnameserver 192.0.2.53\n\tnameserver 2001:db8::1 \n\
                    nameserver dns.example.org\nnameserver\n";
        std::fs::write(&other, text).unwrap();
        std::fs::rename(&other, &path).unwrap();
        servers.changed().await.unwrap();
        assert_eq!(texts(&servers.now()), ["192.0.2.53:53", "[2001:db8::1]:53"]);
        std::fs::remove_file(&path).unwrap();
        servers.changed().await.unwrap();
        assert_eq!(texts(&servers.now()), PUBLIC);
    }

    #[test]
    fn a_file_without_end_gives_few() {
        let text = "nameserver 192.0.2.1\n".repeat(1000);
        assert_eq!(parse(&text).len(), MOST);
    }
}
