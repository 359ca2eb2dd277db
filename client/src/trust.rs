//! Whom to believe to be the appliance: the certificate authority that the user gives. For first
//! contact, [`fetch_ca`] gets the authority's certificate and its hash from the appliance itself,
//! for a person to compare with the hash on the console; it proves nothing by itself.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::{BASE64, HEXLOWER};
use protocol::hello::ALPN;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CipherSuite, DigitallySignedStruct, SignatureScheme, SupportedCipherSuite};

use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::transport;

/// Which certificate authorities vouch for an appliance.
///
/// ```no_run
/// # fn example() -> Result<(), client::TrustError> {
/// let trust = client::Trust::from_pem_file("ca.pem".as_ref())?;
/// # let _ = trust;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Trust {
    authorities: Vec<CertificateDer<'static>>,
}

/// Why a file gives no trust.
///
/// ```
/// let error = client::Trust::from_pem(b"no certificate").unwrap_err();
/// assert!(matches!(error, client::TrustError::NotPem(_)));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read.
    #[error("cannot read the CA certificate {}: {cause}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It holds no certificate.
    #[error("no certificate in the CA file: {0}; it begins with -----BEGIN CERTIFICATE-----")]
    NotPem(String),
}

impl Trust {
    /// Nobody: good for Unix sockets, which need none.
    pub fn none() -> Self {
        Self {
            authorities: Vec::new(),
        }
    }

    /// The certificates of a PEM text.
    pub fn from_pem(pem: &[u8]) -> Result<Self, TrustError> {
        let authorities = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| TrustError::NotPem(error.to_string()))?;
        if authorities.is_empty() {
            return Err(TrustError::NotPem("there is none".into()));
        }
        let mut roots = rustls::RootCertStore::empty();
        for authority in &authorities {
            roots
                .add(authority.clone())
                .map_err(|error| TrustError::NotPem(error.to_string()))?;
        }
        Ok(Self { authorities })
    }

    /// The certificates of a PEM file.
    pub fn from_pem_file(path: &Path) -> Result<Self, TrustError> {
        let pem = std::fs::read(path).map_err(|cause| TrustError::Unreadable {
            path: path.to_owned(),
            cause,
        })?;
        Self::from_pem(&pem)
    }

    /// TLS towards `endpoint`; an error that says what to give when nobody is trusted.
    pub(crate) fn config(
        &self,
        endpoint: &Endpoint,
    ) -> Result<Arc<rustls::ClientConfig>, ClientError> {
        let mut roots = rustls::RootCertStore::empty();
        let (_, _) = roots.add_parsable_certificates(self.authorities.iter().cloned());
        if roots.is_empty() {
            return Err(ClientError::NoCa {
                endpoint: endpoint.clone(),
            });
        }
        let builder = builder(endpoint)?.with_root_certificates(roots);
        Ok(finish(builder.with_no_client_auth()))
    }
}

/// What an appliance says its certificate authority is.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let fetched = client::fetch_ca(&"https://supvm.localhost:7443".parse()?).await?;
/// println!("does the console show {}?", fetched.sha256);
/// let trust = client::Trust::from_pem(fetched.pem.as_bytes())?;
/// # let _ = trust;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The certificate, as the text of a PEM file.
    pub pem: String,
    /// The SHA-256 of its DER form, in lower-case hexadecimal.
    pub sha256: String,
}

/// Gets the last certificate of the chain that the appliance shows, trusting nobody. Compare the
/// hash with the one on the appliance's console before you trust the certificate.
pub async fn fetch_ca(endpoint: &Endpoint) -> Result<Fetched, ClientError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Anybody(Arc::clone(&provider)));
    let config = builder(endpoint)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let stream = transport::connect_tls(endpoint, finish(config)).await?;
    let (_, session) = stream.get_ref();
    let last = session
        .peer_certificates()
        .and_then(<[_]>::last)
        .ok_or_else(|| ClientError::Broken("the appliance showed no certificate".into()))?;
    let sha256 = sha256(&provider, last)
        .ok_or_else(|| ClientError::Broken("this build has no SHA-256".into()))?;
    Ok(Fetched {
        pem: pem(last),
        sha256,
    })
}

fn builder(
    endpoint: &Endpoint,
) -> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::WantsVerifier>, ClientError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ClientError::Tls {
            endpoint: endpoint.clone(),
            cause: io::Error::other(error),
        })
}

fn finish(mut config: rustls::ClientConfig) -> Arc<rustls::ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// The hash that the provider's own TLS 1.3 cipher suite uses: no second implementation is needed.
fn sha256(provider: &CryptoProvider, bytes: &[u8]) -> Option<String> {
    provider.cipher_suites.iter().find_map(|suite| match suite {
        SupportedCipherSuite::Tls13(suite)
            if suite.common.suite == CipherSuite::TLS13_AES_128_GCM_SHA256 =>
        {
            let hash = suite.common.hash_provider.hash(bytes);
            Some(HEXLOWER.encode(hash.as_ref()))
        }
        _ => None,
    })
}

fn pem(der: &[u8]) -> String {
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in der.chunks(48) {
        text.push_str(&BASE64.encode(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// Believes every certificate, but not a peer that does not hold its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pem_text_comes_back_as_the_same_certificate() {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["a".into()]).unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let trust = Trust::from_pem(pem(certificate.der()).as_bytes()).unwrap();
        assert_eq!(&trust.authorities, &[certificate.der().clone()]);
    }

    #[test]
    fn a_file_without_a_certificate_is_refused() {
        assert!(Trust::from_pem(b"").is_err());
        assert!(Trust::from_pem(b"hello").is_err());
        assert!(Trust::from_pem(pem(b"no DER").as_bytes()).is_err());
    }

    #[test]
    fn the_hash_is_sha_256() {
        let provider = rustls::crypto::ring::default_provider();
        assert_eq!(
            sha256(&provider, b"abc").unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
