//! QEMU's control socket: one JSON object per line, answers and events mixed. Used for the power
//! button, for the forwarded port's number and for the end; never for what a user of the appliance
//! could do through its API.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// How long QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The longest line that is read.
const MAX_LINE: u64 = 1 << 20;

/// Why QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// The socket failed, or QEMU is gone.
    #[error("QEMU's control socket: {0}")]
    Io(#[from] io::Error),
    /// A line is no JSON.
    #[error("QEMU's control socket said `{0}`, which is no JSON")]
    NotJson(String),
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {answer}")]
    Refused {
        /// What was asked.
        command: String,
        /// The error it gave.
        answer: String,
    },
    /// It did not answer in time.
    #[error("QEMU did not answer within {} s", PATIENCE.as_secs())]
    Deadline,
}

/// A connection. QEMU serves one at a time.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Qmp {
    /// Connects and takes the greeting.
    pub(crate) async fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).await?;
        Self::greet(stream).await
    }

    async fn greet(stream: UnixStream) -> Result<Self, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
        };
        qmp.line_in_time().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and gives its answer; events in between are skipped.
    pub(crate) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await?;
        loop {
            let mut answer = self.line_in_time().await?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    answer: error.to_string(),
                });
            }
        }
    }

    /// The host's port that is forwarded to `guest_port`.
    pub(crate) async fn forwarded_port(&mut self, guest_port: u16) -> Result<u16, QmpError> {
        let command = "human-monitor-command";
        let answer = self
            .execute(command, json!({ "command-line": "info usernet" }))
            .await?;
        let text = answer.as_str().unwrap_or_default();
        parse_forward(text, guest_port).ok_or_else(|| QmpError::Refused {
            command: "info usernet".into(),
            answer: text.to_owned(),
        })
    }

    async fn line_in_time(&mut self) -> Result<Value, QmpError> {
        timeout(PATIENCE, self.line())
            .await
            .map_err(|_| QmpError::Deadline)?
    }

    async fn line(&mut self) -> Result<Value, QmpError> {
        let mut line = String::new();
        let mut limited = (&mut self.reader).take(MAX_LINE);
        if limited.read_line(&mut line).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        serde_json::from_str(&line).map_err(|_| QmpError::NotJson(line))
    }
}

/// Reads the table of `info usernet`: protocol, descriptor, source address and port, destination
/// address and port, two queue lengths.
fn parse_forward(table: &str, guest_port: u16) -> Option<u16> {
    table.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        match columns.as_slice() {
            ["TCP[HOST_FORWARD]", _, _, host, _, guest, ..] if guest.parse() == Ok(guest_port) => {
                host.parse().ok()
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forwarded_port_is_found_in_the_table() {
        let table = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  TCP[HOST_FORWARD]  13       127.0.0.1 40123       10.0.2.15  7443     0     0\r\n";
        assert_eq!(parse_forward(table, 7443), Some(40123));
        assert_eq!(parse_forward(table, 443), None);
    }

    #[tokio::test]
    async fn events_between_question_and_answer_are_skipped_and_refusals_are_told() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(async move {
            let (reader, mut writer) = theirs.into_split();
            let mut lines = BufReader::new(reader).lines();
            let mut say = async |text: &str| writer.write_all(text.as_bytes()).await.unwrap();
            say("{\"QMP\": {}}\n").await;
            lines.next_line().await.unwrap();
            say("{\"return\": {}}\n").await;
            lines.next_line().await.unwrap();
            say("{\"event\": \"RESUME\"}\n{\"return\": {\"running\": true}}\n").await;
            lines.next_line().await.unwrap();
            say("{\"error\": {\"class\": \"CommandNotFound\"}}\n").await;
        });
        let mut qmp = Qmp::greet(ours).await.unwrap();
        let answer = qmp.execute("query-status", json!({})).await.unwrap();
        assert_eq!(answer, json!({ "running": true }));
        let refused = qmp.execute("nonsense", json!({})).await;
        assert!(matches!(refused, Err(QmpError::Refused { .. })));
        qemu.await.unwrap();
        let gone = qmp.execute("query-status", json!({})).await;
        assert!(matches!(gone, Err(QmpError::Io(_))));
    }
}
