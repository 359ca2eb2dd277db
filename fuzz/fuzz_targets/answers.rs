//! What a program in a VM answers by HTTP/1.1, through hyper and the edge, to a visitor who takes
//! nothing but the strictest HTTP/1.1: one whole answer for each request, or an end.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    proxy::edge::fuzz::answers(bytes);
});
