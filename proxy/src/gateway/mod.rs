//! What VMs reach the world by: the names they may ask for and the addresses they may connect to.
//! Every byte of a guest or of a name server is taken for an attacker's.

pub mod dns;
pub mod policy;
