//! What an agent reads before it does anything: frames that come before the configuration, requests
//! for processes as they are checked, and the guest's own lists of users and names.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((what, bytes)) = bytes.split_first() else {
        return;
    };
    match what % 4 {
        0 => fuzz::agent_stream(bytes),
        1 => fuzz::agent_command(bytes),
        2 => {
            let mut parts = bytes.splitn(3, |byte| *byte == 0xff);
            let mut part = || parts.next().unwrap_or_default();
            fuzz::users(part(), part(), part());
        }
        _ => fuzz::hosts(bytes),
    }
});
