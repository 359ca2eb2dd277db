//! What control itself says to a guest's agent: identity at the start of a run, the wish to power
//! off at its end. The agent's bytes are an attacker's: they are bounded by the frame reader, and
//! the caller sets the deadline.

use std::io;
use std::os::fd::OwnedFd;

use protocol::agent::{Configure, Configured, PowerOff, PoweringOff};
use protocol::message::MessageError;
use protocol::{ErrorCode, Frame, FrameError, FrameReader, Message, decode, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Characters that are kept of a text that an agent sent.
const MOST_TEXT: usize = 512;

/// Why the agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The stream failed.
    #[error("the stream to the VM's agent failed: {0}")]
    Io(#[from] io::Error),
    /// The agent closed the stream without an answer.
    #[error("the VM's agent closed the stream without an answer")]
    Closed,
    /// What it sent is no frame.
    #[error("the VM's agent sent no frame: {0}")]
    Frame(#[from] FrameError),
    /// What it sent is not the answer.
    #[error("the VM's agent did not answer as it should: {0}")]
    Message(#[from] MessageError),
}

/// Gives the VM its identity; none means that it has one already, from before control was started.
pub(crate) async fn configure(
    stream: OwnedFd,
    configure: &Configure,
) -> Result<Option<Configured>, AgentError> {
    match ask::<_, Configured>(stream, configure).await {
        Ok(configured) => Ok(Some(Configured {
            agent_version: short(&configured.agent_version),
            boot_id: short(&configured.boot_id),
            ..configured
        })),
        Err(AgentError::Message(MessageError::Refused(error)))
            if error.code == ErrorCode::AlreadyConfigured =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Asks the VM to power off; it says that it will.
pub(crate) async fn power_off(stream: OwnedFd, grace_ms: u32) -> Result<(), AgentError> {
    let PoweringOff {} = ask(stream, &PowerOff { grace_ms }).await?;
    Ok(())
}

async fn ask<Q: Message, A: Message>(stream: OwnedFd, question: &Q) -> Result<A, AgentError> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    stream.write_all(&encode(question)?).await?;
    decode(&read_frame(&mut stream).await?).map_err(|error| AgentError::Message(harmless(error)))
}

/// What the agent says goes into the log and into the VM's record: it is short and on one line.
fn harmless(error: MessageError) -> MessageError {
    match error {
        MessageError::Refused(mut body) => {
            body.message = short(&body.message);
            body.detail.clear();
            MessageError::Refused(body)
        }
        other => other,
    }
}

/// The beginning of a guest's text, as one line.
fn short(text: &str) -> String {
    let beginning: String = text.chars().take(MOST_TEXT).collect();
    beginning.escape_debug().to_string()
}

async fn read_frame(stream: &mut UnixStream) -> Result<Frame, AgentError> {
    let mut reader = FrameReader::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            reader.finish()?;
            return Err(AgentError::Closed);
        }
        let mut bytes = buffer.get(..length).unwrap_or_default();
        if let Some(frame) = reader.push(&mut bytes)? {
            return Ok(frame);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_agent_says_is_short_and_on_one_line() {
        let said = format!("a\nb\u{1b}[2J{}", "x".repeat(1 << 20));
        let kept = short(&said);
        assert!(kept.starts_with("a\\nb\\u{1b}[2Jxx"), "{kept}");
        assert!(kept.len() < MOST_TEXT + 20, "{}", kept.len());
        assert!(!kept.chars().any(char::is_control));
    }
}
