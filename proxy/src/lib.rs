//! The process that talks to the world. Today it listens for the API and relays agent streams; it
//! holds no token, no record and no key that control did not hand it, and decides nothing about VMs.

pub mod channel;
