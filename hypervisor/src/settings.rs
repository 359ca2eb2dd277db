//! Settings: `supvm.toml`, parsed into typed values.
