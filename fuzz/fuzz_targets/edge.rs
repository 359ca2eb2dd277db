//! What a visitor sends by HTTP/1.1, through the shipped check, hyper and the way to the VM, to a
//! program that takes nothing but the strictest HTTP/1.1: it never reads two requests where the edge
//! sent one, and hyper never one that the check did not see.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    proxy::edge::fuzz::visitor(bytes);
});
