//! Private keys in the older forms that tools write (PKCS #1 for RSA, SEC 1 for ECDSA), brought
//! into PKCS #8, the only form that proxy is handed.

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// AlgorithmIdentifiers in DER (RFC 3279, RFC 5480).
const RSA: &[u8] = &[
    0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00,
];
const P256: &[u8] = &[
    0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
    0xce, 0x3d, 0x03, 0x01, 0x07,
];
const P384: &[u8] = &[
    0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04,
    0x00, 0x22,
];

/// The key in PKCS #8; none for a kind that rustls with ring does not sign with.
pub(super) fn pkcs8(key: &PrivateKeyDer<'_>) -> Option<Vec<u8>> {
    match key {
        PrivateKeyDer::Pkcs8(key) => Some(key.secret_pkcs8_der().to_vec()),
        PrivateKeyDer::Pkcs1(key) => Some(wrap(RSA, key.secret_pkcs1_der())),
        // The curve may be left out of the key: whichever makes a key of it is the one.
        PrivateKeyDer::Sec1(key) => [P256, P384]
            .into_iter()
            .map(|algorithm| wrap(algorithm, key.secret_sec1_der()))
            .find(|der| {
                let key = PrivatePkcs8KeyDer::from(der.as_slice()).into();
                rustls::crypto::ring::sign::any_ecdsa_type(&key).is_ok()
            }),
        _ => None,
    }
}

/// `PrivateKeyInfo` (RFC 5208).
fn wrap(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let mut inner = vec![0x02, 0x01, 0x00];
    inner.extend_from_slice(algorithm);
    inner.extend(element(0x04, key));
    element(0x30, &inner)
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short) if short < 0x80 => der.push(short),
        _ => {
            let length = content.len().to_be_bytes();
            let length: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
            der.push(0x80 | u8::try_from(length.len()).unwrap_or(8));
            der.extend(length);
        }
    }
    der.extend_from_slice(content);
    der
}
