//! A VM's name server: queries of a guest, and what comes from a name server's address, by one who
//! guesses at the question and by one who knows it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use proxy::gateway::dns::fuzz;

/// A query's header and question, so that what follows them is reached.
const SOUND: [u8; 12] = [7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];

fuzz_target!(|bytes: &[u8]| {
    let Some((what, bytes)) = bytes.split_first() else {
        return;
    };
    match what % 8 {
        0 => fuzz::query(bytes),
        1 => fuzz::query(&[&SOUND, bytes].concat()),
        2 => fuzz::answer(bytes, false, false),
        odd => fuzz::answer(bytes, true, odd % 2 == 0),
    }
});
