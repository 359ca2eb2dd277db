//! What the edge itself answers: HTML for browsers, JSON for programs. A page names no VM, loads
//! nothing, and tells nothing about addresses but that this one leads nowhere.

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, RETRY_AFTER,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use super::body::Answer;
use super::guests::{ConnectError, Refusal};
use super::root::{PATH, Root};

/// An answer of the edge's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// The domain itself.
    Landing(Option<Root>),
    /// The request could not be understood without doubt.
    BadRequest(&'static str),
    /// A token is needed.
    Unauthorized,
    /// The token is wrong.
    Forbidden,
    /// The link was opened before, or is too old.
    LinkSpent,
    /// Too many wrong tokens.
    TooManyTries,
    /// No VM has this name.
    NotFound,
    /// TRACE, or CONNECT.
    MethodNotAllowed,
    /// The name is not the one of the TLS connection.
    Misdirected,
    /// The head is larger than the limit.
    HeadTooLarge,
    /// The head took longer than the limit.
    HeadTooSlow,
    /// An extended CONNECT for something that is no WebSocket.
    NotImplemented,
    /// The port is closed.
    NothingListens(u16),
    /// The connection ended before the answer.
    ClosedEarly,
    /// The answer is no HTTP.
    BadAnswer,
    /// The VM does not answer on the network.
    NoAnswer,
    /// The VM is stopped.
    Stopped,
    /// The VM did not start.
    StartFailed,
    /// The VM did not start in time.
    StartTimeout,
    /// Too many requests or connections.
    TooMany,
    /// The appliance is not ready.
    Unavailable,
}

impl From<Refusal> for Page {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unknown => Self::NotFound,
            Refusal::Stopped => Self::Stopped,
            Refusal::StartFailed => Self::StartFailed,
            Refusal::StartTimeout => Self::StartTimeout,
            Refusal::Busy => Self::TooMany,
            Refusal::Unavailable => Self::Unavailable,
        }
    }
}

impl Page {
    /// The page for a connection to `port` that was not made.
    pub(crate) fn not_connected(error: ConnectError, port: u16) -> Self {
        match error {
            ConnectError::Refused => Self::NothingListens(port),
            ConnectError::TimedOut => Self::NoAnswer,
            ConnectError::TooMany => Self::TooMany,
            ConnectError::Gone => Self::ClosedEarly,
        }
    }

    /// Status, code for programs, title.
    fn head(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            Self::Landing(_) => (S::OK, "ok", "This is a supvm appliance"),
            Self::BadRequest(_) => (S::BAD_REQUEST, "bad_request", "Malformed request"),
            Self::Unauthorized => (S::UNAUTHORIZED, "token_required", "A token is needed"),
            Self::Forbidden => (S::FORBIDDEN, "wrong_token", "The token is wrong"),
            Self::LinkSpent => (
                S::FORBIDDEN,
                "link_spent",
                "This link does not open any more",
            ),
            Self::TooManyTries => (
                S::TOO_MANY_REQUESTS,
                "too_many_tries",
                "Too many wrong tokens",
            ),
            Self::NotFound => (S::NOT_FOUND, "not_found", "Nothing is here"),
            Self::MethodNotAllowed => (
                S::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "Method not allowed",
            ),
            Self::Misdirected => (S::MISDIRECTED_REQUEST, "misdirected", "Wrong connection"),
            Self::HeadTooLarge => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "head_too_large",
                "Request header too large",
            ),
            Self::HeadTooSlow => (S::REQUEST_TIMEOUT, "head_too_slow", "Request too slow"),
            Self::NotImplemented => (S::NOT_IMPLEMENTED, "not_implemented", "Not implemented"),
            Self::NothingListens(_) => (
                S::BAD_GATEWAY,
                "nothing_listens",
                "Nothing listens on this port",
            ),
            Self::ClosedEarly => (S::BAD_GATEWAY, "closed_early", "No answer came"),
            Self::BadAnswer => (S::BAD_GATEWAY, "bad_answer", "The answer is no HTTP"),
            Self::NoAnswer => (S::GATEWAY_TIMEOUT, "no_answer", "The VM does not answer"),
            Self::Stopped => (S::SERVICE_UNAVAILABLE, "stopped", "This VM is stopped"),
            Self::StartFailed => (
                S::SERVICE_UNAVAILABLE,
                "start_failed",
                "This VM did not start",
            ),
            Self::StartTimeout => (
                S::GATEWAY_TIMEOUT,
                "start_timeout",
                "This VM takes too long to start",
            ),
            Self::TooMany => (S::SERVICE_UNAVAILABLE, "too_many", "Too many connections"),
            Self::Unavailable => (
                S::SERVICE_UNAVAILABLE,
                "unavailable",
                "The appliance is not ready",
            ),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Landing(_) => "VMs have their addresses below this name.".into(),
            Self::BadRequest(why) => format!("The request is refused: {why}."),
            Self::Unauthorized => "Send the VM's token as `X-Supvm-Token` or `Authorization: \
                 Bearer`, or ask its owner for a link (`sup url --link`)."
                .into(),
            Self::Forbidden => "Ask the VM's owner for the current token.".into(),
            Self::LinkSpent => {
                "A link opens once, within a day, while the token is the same. Ask the \
                 VM's owner for a new one (`sup url --link`)."
                    .into()
            }
            Self::TooManyTries => "Wait a minute before the next try.".into(),
            Self::NotFound => "Check the address: no VM has this name.".into(),
            Self::MethodNotAllowed => "Use another method.".into(),
            Self::Misdirected => {
                "The request's name is not the one of its TLS connection; connect anew.".into()
            }
            Self::HeadTooLarge => "Send fewer or shorter header fields, such as cookies.".into(),
            Self::HeadTooSlow => "The request's header took too long; connect anew.".into(),
            Self::NotImplemented => "Only WebSocket can be asked for by CONNECT.".into(),
            Self::NothingListens(port) => format!(
                "No program in the VM listens on port {port}. Start one there, for example with \
                 `python3 -m http.server {port}`, or ask for the port it listens on with \
                 `<port>-` before the name."
            ),
            Self::ClosedEarly => {
                "The program in the VM closed the connection before it answered. Look at its \
                 output, then try again."
                    .into()
            }
            Self::BadAnswer => {
                "The program in the VM answered with something that is no HTTP. Is it the right \
                 port?"
                    .into()
            }
            Self::NoAnswer => "Look at the VM's load and its firewall, then try again.".into(),
            Self::Stopped => "Its owner has to start it: `sup start`.".into(),
            Self::StartFailed => "`sup start` tells its owner why.".into(),
            Self::StartTimeout => "Try again in a moment.".into(),
            Self::TooMany => {
                "The VM, or your network, has all the connections it may have. Try again soon."
                    .into()
            }
            Self::Unavailable => "Try again in a moment.".into(),
        }
    }

    /// The status code.
    pub(crate) fn status(&self) -> StatusCode {
        self.head().0
    }

    /// The answer, in the form that a request with these header fields accepts.
    pub(crate) fn answer(&self, html: bool) -> Response<Answer> {
        let (status, code, title) = self.head();
        let message = self.message();
        let (kind, body) = if html {
            ("text/html; charset=utf-8", self.html(title, &message))
        } else {
            let body = match self {
                Self::Landing(None) => serde_json::json!({ "message": message }),
                Self::Landing(Some(root)) => serde_json::json!({
                    "message": message,
                    "authority": { "path": PATH, "fingerprint": root.fingerprint() },
                }),
                _ => serde_json::json!({ "error": code, "message": message }),
            };
            ("application/json", format!("{body}\n"))
        };
        let mut response = Response::new(Answer::whole(Bytes::from(body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        let text = HeaderValue::from_static;
        headers.insert(CONTENT_TYPE, text(kind));
        headers.insert(CACHE_CONTROL, text("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, text("nosniff"));
        headers.insert(REFERRER_POLICY, text("no-referrer"));
        if html {
            let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
            headers.insert(CONTENT_SECURITY_POLICY, text(policy));
        }
        match self {
            Self::TooMany | Self::StartTimeout | Self::Unavailable => {
                headers.insert(RETRY_AFTER, text("2"));
            }
            Self::TooManyTries => {
                headers.insert(RETRY_AFTER, text("60"));
            }
            Self::Unauthorized => {
                headers.insert(WWW_AUTHENTICATE, text("Bearer realm=\"supvm\""));
            }
            Self::MethodNotAllowed => {
                let methods = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
                headers.insert(ALLOW, text(methods));
            }
            _ => {}
        }
        response
    }

    fn html(&self, title: &str, message: &str) -> String {
        let status = match self {
            Self::Landing(_) => String::new(),
            _ => format!("<p>{}</p>", self.status().as_u16()),
        };
        let more = match self {
            Self::Landing(Some(root)) => format!(
                "<p>Certificates here come from the appliance's own authority. Download \
                 <a href=\"{PATH}\">its root certificate</a> to trust them, after you have compared \
                 its digest with the one on the appliance's console:</p>\
                 <p><code style=\"overflow-wrap:anywhere\">{}</code></p>",
                root.fingerprint()
            ),
            _ => String::new(),
        };
        let (title, message) = (escape(title), escape(message));
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <meta name=\"robots\" content=\"noindex\"><title>{title}</title>\
             <style>body{{font:1.1em/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;\
             padding:0 1em;color:#222;background:#fff}}h1{{font-size:1.5em}}\
             @media(prefers-color-scheme:dark){{body{{color:#ddd;background:#111}}}}</style>\
             </head><body>{status}<h1>{title}</h1><p>{message}</p>{more}</body></html>\n"
        )
    }
}

/// Whether the visitor prefers HTML: only browsers name it.
pub(crate) fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get_all(http::header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| {
            let kind = part.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case("text/html")
        })
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_page_says_is_escaped() {
        let html = Page::BadAnswer.html("a", "<script>alert('&\"')</script>");
        assert!(!html.contains("<script>"), "{html}");
        assert!(
            html.contains("&lt;script&gt;alert(&#39;&amp;&quot;&#39;)"),
            "{html}"
        );
    }

    #[test]
    fn only_who_names_html_gets_it() {
        let with = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("accept", HeaderValue::from_static(accept));
            wants_html(&headers)
        };
        assert!(with("application/xhtml+xml,Text/HTML;q=0.9,*/*;q=0.8"));
        assert!(!with("*/*"));
        assert!(!with("application/json"));
        assert!(!wants_html(&HeaderMap::new()));
    }
}
