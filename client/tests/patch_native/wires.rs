//! What a script meets outside of the VM: a connection to the appliance that breaks on demand, and web
//! servers that answer, stall, or serve without end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

/// Passes bytes on between `sup` and the appliance, until it is cut.
pub(crate) struct Wire(Arc<Mutex<Cuttable>>);

#[derive(Default)]
pub(crate) struct Cuttable {
    ends: Vec<UnixStream>,
    /// After so many bytes from `sup` it is cut.
    left: Option<usize>,
}

impl Cuttable {
    pub(crate) fn cut(&mut self) -> usize {
        let ends = std::mem::take(&mut self.ends);
        for end in &ends {
            let _ = end.shutdown(Shutdown::Both);
        }
        ends.len()
    }

    pub(crate) fn passes(&mut self, count: usize) {
        if let Some(left) = &mut self.left {
            if count > *left {
                self.left = None;
                self.cut();
            } else {
                *left -= count;
            }
        }
    }
}

impl Wire {
    pub(crate) fn new(near: &Path, far: String) -> Self {
        let listener = UnixListener::bind(near).unwrap();
        let made = Arc::new(Mutex::new(Cuttable::default()));
        let kept = Arc::clone(&made);
        std::thread::spawn(move || {
            let far = far.strip_prefix("unix:").unwrap();
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), UnixStream::connect(far).unwrap());
                for (from, to, counts) in [(&near, &far, true), (&far, &near, false)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let kept = Arc::clone(&kept);
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            if counts {
                                kept.lock().unwrap().passes(count);
                            }
                            if to.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                kept.lock().unwrap().ends.extend([near, far]);
            }
        });
        Self(made)
    }

    pub(crate) fn cut_behind(&self, bytes: usize) {
        self.0.lock().unwrap().left = Some(bytes);
    }

    pub(crate) fn was_cut(&self) -> bool {
        self.0.lock().unwrap().left.is_none()
    }

    /// Says how many ends there were.
    pub(crate) fn cut(&self) -> usize {
        self.0.lock().unwrap().cut()
    }
}

/// A web server whose content is so long, and word of every request.
pub(crate) fn serves(length: usize) -> (String, mpsc::Receiver<()>) {
    let (tell, asked) = mpsc::channel();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let (mut connection, tell) = (connection.unwrap(), tell.clone());
            std::thread::spawn(move || {
                let _ = connection.read(&mut [0; 4096]);
                let _ = tell.send(());
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                );
                let _ = connection.write_all(head.as_bytes());
                // Whoever asks again leaves the first answer where it is.
                let _ = connection.write_all(&vec![b'x'; length]);
            });
        }
    });
    (format!("http://{address}/"), asked)
}

/// A web server that answers with this and then says nothing more; and when it has.
pub(crate) fn stalls(answer: &'static str) -> (String, mpsc::Receiver<()>) {
    let (tell, answered) = mpsc::channel();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let _ = connection.read(&mut [0; 4096]);
            connection.write_all(answer.as_bytes()).unwrap();
            kept.push(connection);
            let _ = tell.send(());
        }
    });
    (format!("http://{address}/x"), answered)
}

/// A web server that gives every connection this answer.
pub(crate) fn answers(status: &'static str, body: &'static str) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let _ = connection.read(&mut [0; 4096]);
            let length = body.len();
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            let _ = connection.write_all(format!("{head}{body}").as_bytes());
        }
    });
    format!("http://{address}")
}
