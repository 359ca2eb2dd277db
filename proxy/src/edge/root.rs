//! The built-in authority's certificate, for whoever wants to trust it. It can be downloaded at the
//! domain itself; the connection proves nothing before that, so its digest is shown to be compared
//! with the one on the appliance's console.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Response};

use super::body::Answer;

/// Where it can be downloaded.
pub(crate) const PATH: &str = "/ca.pem";

/// The certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    pem: Bytes,
    fingerprint: String,
}

impl Root {
    /// None when there is none.
    pub(crate) fn new(der: &[u8]) -> Option<Self> {
        if der.is_empty() {
            return None;
        }
        let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
        for line in der.chunks(48) {
            pem.push_str(&data_encoding::BASE64.encode(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        let hex = data_encoding::HEXLOWER.encode(digest.as_ref());
        Some(Self {
            pem: Bytes::from(pem),
            fingerprint: format!("sha256:{hex}"),
        })
    }

    /// Its digest, in the form in which the console shows it.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The download.
    pub(crate) fn answer(&self) -> Response<Answer> {
        let mut response = Response::new(Answer::whole(self.pem.clone()));
        let headers = response.headers_mut();
        let text = HeaderValue::from_static;
        headers.insert(CONTENT_TYPE, text("application/x-pem-file"));
        headers.insert(CACHE_CONTROL, text("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, text("nosniff"));
        response
    }
}
