//! Placeholder: filled in by the next commits.
pub mod virtio;
