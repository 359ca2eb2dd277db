//! From a host name to a VM's label and port. Only the form of the name is looked at: whether there
//! is such a VM, nobody learns here.

use protocol::id::Subdomain;

/// The guest port of a name without one.
const DEFAULT_PORT: u16 = 3000;

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// To a port of a VM.
    Guest {
        /// The VM's label.
        subdomain: Subdomain,
        /// The port.
        port: u16,
    },
    /// To the appliance itself.
    Base,
    /// Nowhere.
    Nothing,
}

/// The host name of an authority: in lower case, without port and final dot.
pub(crate) fn host_name(authority: &str) -> Option<String> {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) => {
            port.parse::<u16>().ok()?;
            host
        }
        None => authority,
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let valid = (1..=253).contains(&host.len())
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    valid.then(|| host.to_ascii_lowercase())
}

/// Where the name `host`, as [`host_name`] gives it, leads below `domain`.
pub(crate) fn route(host: &str, domain: &str) -> Route {
    if host == domain {
        return Route::Base;
    }
    let label = host
        .strip_suffix(domain)
        .and_then(|rest| rest.strip_suffix('.'));
    let Some(label) = label else {
        return Route::Nothing;
    };
    let (port, subdomain) = match label.split_once('-') {
        Some((port, subdomain)) => match guest_port(port) {
            Some(port) => (port, subdomain),
            None => return Route::Nothing,
        },
        None => (DEFAULT_PORT, label),
    };
    match subdomain.parse() {
        Ok(subdomain) => Route::Guest { subdomain, port },
        Err(_) => Route::Nothing,
    }
}

fn guest_port(text: &str) -> Option<u16> {
    let plain = !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "abcdefghijklmnopqrst";

    #[test]
    fn a_name_leads_to_the_default_port_or_to_the_one_in_front() {
        let to = |host: &str| route(&host_name(host).unwrap(), "vm.example");
        let guest = |port| Route::Guest {
            subdomain: LABEL.parse().unwrap(),
            port,
        };
        assert_eq!(to(&format!("{LABEL}.vm.example")), guest(3000));
        assert_eq!(to(&format!("{LABEL}.vm.example:8443")), guest(3000));
        assert_eq!(to(&format!("{LABEL}.VM.example.")), guest(3000));
        assert_eq!(to(&format!("{LABEL}.vm.example.:443")), guest(3000));
        assert_eq!(
            to(&format!("8080-{LABEL}.vm.example").to_uppercase()),
            guest(8080)
        );
        assert_eq!(to(&format!("1-{LABEL}.vm.example")), guest(1));
        assert_eq!(to(&format!("65535-{LABEL}.vm.example")), guest(65535));
        assert_eq!(to("vm.example"), Route::Base);
        for nothing in [
            "example".into(),
            "xvm.example".into(),
            ".vm.example".into(),
            LABEL.into(),
            format!("{LABEL}.other.example"),
            format!("a.{LABEL}.vm.example"),
            format!("{LABEL}xvm.example"),
            format!("0-{LABEL}.vm.example"),
            format!("080-{LABEL}.vm.example"),
            format!("65536-{LABEL}.vm.example"),
            format!("-{LABEL}.vm.example"),
            format!("x-{LABEL}.vm.example"),
            format!("1-2-{LABEL}.vm.example"),
            "short.vm.example".into(),
        ] {
            assert_eq!(to(&nothing), Route::Nothing, "{nothing}");
        }
    }

    #[test]
    fn what_is_no_host_name_is_refused() {
        for text in [
            "",
            ".",
            ":80",
            "a:b",
            "a:99999",
            "[::1]:80",
            "a b",
            "user@host",
            "a/b",
            "ä",
        ] {
            assert_eq!(host_name(text), None, "{text}");
        }
        assert_eq!(host_name("A.Example.:80").unwrap(), "a.example");
    }
}
