//! Control as a whole.
