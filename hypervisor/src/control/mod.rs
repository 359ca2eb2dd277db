//! Control: lifecycle, disks, registry.

use crate::descriptors::{DescriptorError, Descriptors};
use crate::role::ControlArgs;

/// Why control ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It was not started with what it needs.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
}

/// Runs until the supervisor says to stop. The descriptors hold `supervisor`.
pub fn run(mut descriptors: Descriptors, _arguments: ControlArgs) -> Result<(), ControlError> {
    let _supervisor = descriptors.take("supervisor")?;
    Ok(())
}
