//! The appliance's own certificate authority and the certificate that its API shows. The authority
//! is made once, at first start; its private key is readable for nobody else and never leaves this
//! process. The leaf is made anew at each start and before it expires, and is not kept.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};

use super::store::{Store, StoreError, read_if_there, write_replacing};
use crate::settings::Domain;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a leaf is valid.
const LEAF_LIFE: Duration = DAY.saturating_mul(90);

/// How long a leaf is shown before the next one is made.
pub(crate) const LEAF_RENEWAL: Duration = DAY.saturating_mul(30);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    /// A key or certificate cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A certificate without its key, or one that is not valid.
    #[error(
        "the certificate authority in {} cannot be used: {rule}; restore the files from a backup, \
         or remove both and give clients the new authority", path.display()
    )]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        rule: String,
    },
    /// A key or certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// The authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Vec<u8>,
}

/// What a server shows.
pub(crate) struct Leaf {
    /// Leaf first, then the authority, each in DER.
    pub(crate) chain: Vec<Vec<u8>>,
    /// The leaf's private key, PKCS #8 in DER.
    pub(crate) key: Vec<u8>,
}

impl Authority {
    /// Reads the authority, or makes it at the first start.
    pub(crate) fn open(store: &Store) -> Result<Self, KeyError> {
        let directory = store.keys();
        let key_path = directory.join("authority.key");
        let certificate_path = directory.join("authority.der");
        let unusable = |rule: String| KeyError::Unusable {
            path: directory.clone(),
            rule,
        };
        let key = match read_if_there(&key_path)? {
            Some(pem) => KeyPair::from_pem(&String::from_utf8_lossy(&pem))
                .map_err(|error| unusable(format!("authority.key: {error}")))?,
            None if certificate_path.exists() => {
                return Err(unusable("authority.key is missing".into()));
            }
            None => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                // The key first: a certificate is shown to clients only when its key is kept.
                write_replacing(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
                key
            }
        };
        let certificate = match read_if_there(&certificate_path)? {
            Some(der) => der,
            None => {
                let der = authority_parameters().self_signed(&key)?.der().to_vec();
                write_replacing(&certificate_path, &der, 0o644)?;
                der
            }
        };
        let issuer = Issuer::from_ca_cert_der(&certificate.as_slice().into(), key)
            .map_err(|error| unusable(format!("authority.der: {error}")))?;
        Ok(Self {
            issuer,
            certificate,
        })
    }

    /// Its certificate in DER.
    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// SHA-256 of the authority's certificate in DER, as people compare it.
    pub(crate) fn fingerprint(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, &self.certificate);
        let hex = data_encoding::HEXLOWER.encode(digest.as_ref());
        format!("sha256:{hex}")
    }

    /// Makes a certificate for the domain, its subdomains, this machine, and `addresses`.
    pub(crate) fn leaf(&self, domain: &Domain, addresses: &[IpAddr]) -> Result<Leaf, KeyError> {
        let mut names = vec![
            domain.as_str().to_owned(),
            format!("*.{}", domain.as_str()),
            "localhost".to_owned(),
            "127.0.0.1".to_owned(),
            "::1".to_owned(),
        ];
        names.extend(addresses.iter().map(IpAddr::to_string));
        names.sort();
        names.dedup();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut parameters = CertificateParams::new(names)?;
        parameters
            .distinguished_name
            .push(DnType::CommonName, domain.as_str());
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.use_authority_key_identifier_extension = true;
        parameters.not_before = beginning().into();
        parameters.not_after = expiry(LEAF_LIFE).into();
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        Ok(Leaf {
            chain: vec![certificate.der().to_vec(), self.certificate.clone()],
            key: key.serialize_der(),
        })
    }
}

fn authority_parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters
        .distinguished_name
        .push(DnType::CommonName, "supvm certificate authority");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.not_before = beginning().into();
    parameters.not_after = expiry(DAY.saturating_mul(20 * 365)).into();
    parameters
}

/// A fixed day in the past, the first of 2025: the clock may not be set yet when a certificate is
/// made.
fn beginning() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_689_600)
}

/// A clock that is behind the beginning is not set: the life is then counted from there.
fn expiry(life: Duration) -> SystemTime {
    SystemTime::now().max(beginning()) + life
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        (directory, store)
    }

    #[test]
    fn the_authority_is_made_once_and_its_key_is_private() {
        let (_directory, store) = store();
        let first = Authority::open(&store).unwrap().fingerprint();
        let second = Authority::open(&store).unwrap().fingerprint();
        assert_eq!(first, second);
        assert_eq!(first.len(), "sha256:".len() + 64);
        let key = store.keys().join("authority.key");
        let mode = std::fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // A crash between key and certificate: the next start goes on with that key.
        std::fs::remove_file(store.keys().join("authority.der")).unwrap();
        Authority::open(&store).unwrap();
        std::fs::remove_file(key).unwrap();
        assert!(matches!(
            Authority::open(&store),
            Err(KeyError::Unusable { .. })
        ));
    }

    #[test]
    fn a_client_that_trusts_the_authority_accepts_the_leaf_for_each_name() {
        let (_directory, store) = store();
        Authority::open(&store).unwrap();
        let authority = Authority::open(&store).unwrap();
        let leaf = authority
            .leaf(&Domain::default(), &["192.0.2.7".parse().unwrap()])
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(leaf.chain[1].clone().into()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .unwrap();
        let verify = |name: &str| {
            use rustls::client::danger::ServerCertVerifier;
            verifier.verify_server_cert(
                &leaf.chain[0].clone().into(),
                &[leaf.chain[1].clone().into()],
                &name.to_owned().try_into().unwrap(),
                &[],
                rustls::pki_types::UnixTime::now(),
            )
        };
        for name in [
            "supvm.localhost",
            "abc.supvm.localhost",
            "localhost",
            "127.0.0.1",
            "::1",
            "192.0.2.7",
        ] {
            assert!(verify(name).is_ok(), "{name}: {:?}", verify(name));
        }
        assert!(verify("example.org").is_err());
    }
}
