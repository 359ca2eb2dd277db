//! A web server on this machine's loopback, where VMs reach it at the address that QEMU gives to
//! this machine. It serves files from memory and nothing else.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// This machine, as the appliance under QEMU sees it.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// How long a client may take for one request.
const PATIENCE: Duration = Duration::from_secs(60);

/// Longest line of a request.
const MAX_LINE: u64 = 8192;

/// Contents by path, without the first slash.
pub(crate) type Files = HashMap<String, Vec<u8>>;

/// The server; it ends with this.
pub(crate) struct Origin {
    port: u16,
    listener: Option<TcpListener>,
    accepting: Option<JoinHandle<()>>,
}

impl Origin {
    /// Takes a port; serves nothing yet.
    pub(crate) async fn bind() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        Ok(Self {
            port: listener.local_addr()?.port(),
            listener: Some(listener),
            accepting: None,
        })
    }

    /// Its address from inside a VM.
    pub(crate) fn url(&self) -> String {
        format!("http://{ADDRESS}:{}", self.port)
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Serves these from now on.
    pub(crate) fn serve(&mut self, files: Files) {
        let files = Arc::new(files);
        let Some(listener) = self.listener.take() else {
            return;
        };
        self.accepting = Some(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let files = Arc::clone(&files);
                tokio::spawn(async move {
                    // A client that went away is its own affair.
                    let _ = timeout(PATIENCE, answer(stream, &files)).await;
                });
            }
        }));
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(task) = self.accepting.take() {
            task.abort();
        }
    }
}

/// The regular files of a tar archive.
pub(crate) fn unpacked(archive: &[u8]) -> io::Result<Files> {
    let mut files = Files::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        if entry.header().entry_type().is_file() {
            let path = entry.path()?.to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            files.insert(path.trim_start_matches("./").to_owned(), content);
        }
    }
    Ok(files)
}

async fn answer(stream: TcpStream, files: &Files) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(tokio::io::AsyncReadExt::take(reader, MAX_LINE * 32));
    let mut request = String::new();
    reader.read_line(&mut request).await?;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).await? == 0 || header.trim_end().is_empty() {
            break;
        }
    }
    let mut words = request.split_whitespace();
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or("/"));
    // apt asks for `/apt/./Packages`.
    let path = target.split('?').next().unwrap_or("").replace("/./", "/");
    let mut path = path.trim_start_matches('/').to_owned();
    if path.is_empty() || path.ends_with('/') {
        path.push_str("index.html");
    }
    let (status, content): (_, &[u8]) = match files.get(&path) {
        Some(content) => ("200 OK", content),
        None => ("404 Not Found", b""),
    };
    let kind = if path.ends_with(".html") {
        "text/html"
    } else {
        "application/octet-stream"
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        content.len()
    );
    writer.write_all(head.as_bytes()).await?;
    if method != "HEAD" {
        writer.write_all(content).await?;
    }
    writer.shutdown().await
}
