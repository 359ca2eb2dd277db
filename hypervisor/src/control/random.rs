//! Random bytes for what is secret: identifiers, public addresses, links.

/// Random bytes. A kernel without any is a host that cannot go on.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::error!(%error, "no random bytes from the kernel");
        std::process::abort();
    }
    bytes
}
