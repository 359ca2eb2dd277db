//! Where an appliance's API is: `https://host:port` or `unix:/path`. Parsed once, here.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// An API endpoint.
///
/// ```
/// let endpoint: client::Endpoint = "https://supvm.localhost:7443".parse()?;
/// assert_eq!(endpoint.to_string(), "https://supvm.localhost:7443");
/// # Ok::<(), client::EndpointError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// TLS over TCP.
    Tls {
        /// A name or an address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text is no endpoint.
///
/// ```
/// let error = "http://example.org".parse::<client::Endpoint>().unwrap_err();
/// assert!(error.to_string().contains("give https://HOST:PORT or unix:/PATH"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no endpoint: {reason}; give https://HOST:PORT or unix:/PATH")]
pub struct EndpointError {
    text: String,
    reason: &'static str,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = |reason| EndpointError {
            text: text.to_owned(),
            reason,
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(wrong("the path of a Unix socket begins with /"));
            }
            return Ok(Self::Unix(path.into()));
        }
        let rest = text
            .strip_prefix("https://")
            .ok_or_else(|| wrong("it begins with neither https:// nor unix:"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = rest
            .rsplit_once(':')
            .ok_or_else(|| wrong("the port is missing"))?;
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| wrong("the port is no number from 1 to 65535"))?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => address,
            Some(_) => return Err(wrong("what is in brackets is no IPv6 address")),
            None if host.contains(':') => return Err(wrong("an IPv6 address goes in brackets")),
            None => host,
        };
        if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) {
            return Err(wrong("the host is missing or not a plain name"));
        }
        Ok(Self::Tls {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls { host, port } if host.contains(':') => {
                write!(formatter, "https://[{host}]:{port}")
            }
            Self::Tls { host, port } => write!(formatter, "https://{host}:{port}"),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_come_back_as_they_were_written() {
        for text in [
            "https://supvm.localhost:7443",
            "https://10.0.0.1:1",
            "https://[::1]:65535",
            "unix:/run/supvm/api.sock",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        let slash = "https://a:1/".parse::<Endpoint>().unwrap();
        assert_eq!(slash.to_string(), "https://a:1");
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_what_to_give() {
        for text in [
            "",
            "http://a:1",
            "https://a",
            "https://a:0",
            "https://a:99999",
            "https://:1",
            "https://::1:1",
            "https://[x]:1",
            "https://a/b:1",
            "https://u@a:1",
            "unix:relative",
            "unix:",
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("https://HOST:PORT"), "{text}: {error}");
        }
    }
}
