//! The machine as the agent changes it: kernel settings, files on the user's disk, the size of the
//! root file system. The disk belongs to the user, so every file on it may be anything.

pub(crate) mod disk;
pub(crate) mod files;
pub(crate) mod identity;
pub(crate) mod kernel;
pub(crate) mod ptp;
