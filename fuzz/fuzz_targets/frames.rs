//! A stream's bytes, cut anywhere: the frames are the same however they are cut, and none is longer
//! than a frame may be.

#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::frame::{Frame, FrameError, FrameReader, MAX_BODY};

fn frames(bytes: &[u8], cut: usize) -> (Vec<Frame>, Option<FrameError>) {
    let mut reader = FrameReader::new();
    let mut seen = Vec::new();
    for piece in bytes.chunks(cut) {
        let mut rest = piece;
        loop {
            match reader.push(&mut rest) {
                Ok(Some(frame)) => {
                    assert!(frame.body.len() <= MAX_BODY);
                    seen.push(frame);
                }
                Ok(None) => break,
                Err(error) => return (seen, Some(error)),
            }
        }
    }
    (seen, reader.finish().err())
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = frames(bytes, usize::MAX);
    assert_eq!(frames(bytes, usize::from(*cut).max(1)), whole);
});
