//! The devices' face, driven natively over their own registers and queues: by a mock driver that
//! breaks every rule a guest can break, and by the `virtio-drivers` crate that breaks none. No KVM.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod block;
mod drivers;
mod guest;
mod hostile;
mod net;
mod net_hostile;
mod net_rig;
mod rig;
mod rng;
mod storm;
mod transport;
mod vsock;
mod vsock_close;
mod vsock_flow;
