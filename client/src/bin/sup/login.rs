//! `sup login`: asks what is needed to reach an appliance, tries it, and keeps it in the config
//! file. A certificate that came from the appliance itself is trusted only by a person who compared
//! its hash, or by a script that was given the hash. The token is never shown.

use std::io::{self, BufRead, IsTerminal, Read};

use clap::Args;
use client::{Client, Endpoint, Trust, fetch_ca};

use crate::args::TargetArguments;
use crate::complaint::Complaint;
use crate::config::{self, given};
use crate::session::{INTERRUPTED, Interrupts};
use crate::terminal::Hidden;

/// The longest line that is read.
const LONGEST_LINE: u64 = 4096;

/// `sup login`.
#[derive(Debug, Args)]
pub(crate) struct Login {
    /// Where its API is: https://HOST:PORT or unix:/PATH
    #[arg(value_name = "ENDPOINT")]
    appliance: Endpoint,
    /// The SHA-256 of its CA certificate, as its console shows it; without this you are asked
    #[arg(long, value_name = "SHA-256")]
    fingerprint: Option<Fingerprint>,
}

/// A SHA-256, in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fingerprint(String);

impl std::str::FromStr for Fingerprint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // As the console writes it.
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let digits: String = digits.chars().filter(|letter| *letter != ':').collect();
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err("it has 64 hexadecimal digits");
        }
        Ok(Self(digits.to_ascii_lowercase()))
    }
}

pub(crate) async fn run(arguments: &TargetArguments, login: Login) -> Result<u8, Complaint> {
    let mut interrupts = Interrupts::new()?;
    let work = async {
        let ca = authority(arguments, &login).await?;
        let token = match given(arguments.token.as_ref()) {
            Some(token) => token,
            None => ask_token().await?,
        };
        try_out(&login.appliance, &token, ca.as_deref()).await?;
        let path = config::store(&login.appliance, &token, ca.as_deref())?;
        eprintln!(
            "sup: {} let us in; it is what commands use from now on, by {}",
            login.appliance,
            path.display()
        );
        Ok(0)
    };
    tokio::select! {
        result = work => result,
        () = interrupts.next() => Ok(INTERRUPTED),
    }
}

/// The certificates to trust, as PEM.
async fn authority(
    arguments: &TargetArguments,
    login: &Login,
) -> Result<Option<String>, Complaint> {
    if let Endpoint::Unix(_) = login.appliance {
        return Ok(None);
    }
    if let Some(path) = given(arguments.ca.as_ref()) {
        let pem = std::fs::read_to_string(&path)
            .map_err(|error| Complaint::new(&format!("reading {path}"), error.to_string()))?;
        return Ok(Some(pem));
    }
    let what = format!("fetching the CA certificate of {}", login.appliance);
    let fetched = fetch_ca(&login.appliance)
        .await
        .map_err(|error| Complaint::of(&what, &error))?;
    let trusted = match &login.fingerprint {
        Some(Fingerprint(expected)) if *expected == fetched.sha256 => true,
        Some(_) => {
            return Err(Complaint::new(
                &what,
                format!(
                    "its SHA-256 is {}, another one than was given",
                    fetched.sha256
                ),
            )
            .advice("look at the appliance's console; somebody may be in between"));
        }
        None if io::stdin().is_terminal() => {
            eprintln!(
                "{} shows a CA certificate with the SHA-256",
                login.appliance
            );
            eprintln!("  sha256:{}", fetched.sha256);
            let question = "Does the appliance's console show the same? [y/N] ";
            let answer = ask(question, false).await?.to_ascii_lowercase();
            answer == "y" || answer == "yes"
        }
        None => {
            return Err(
                Complaint::new(&what, "nobody can be asked whether it is the right one").advice(
                    "give --fingerprint with the SHA-256 that the appliance's console shows",
                ),
            );
        }
    };
    if !trusted {
        return Err(Complaint::new(&what, "it is not trusted; nothing was kept"));
    }
    Ok(Some(fetched.pem))
}

async fn ask_token() -> Result<String, Complaint> {
    let token = ask("Token: ", true).await?;
    if token.is_empty() {
        return Err(Complaint::new("reading the token", "there is none")
            .advice("type it, or give it as the first line of standard input"));
    }
    Ok(token)
}

/// A line of standard input, without blanks around it; at a terminal it is asked for.
async fn ask(question: &str, hidden: bool) -> Result<String, Complaint> {
    let wrong = |error: io::Error| Complaint::new("reading standard input", error.to_string());
    // Given back by whoever drops us, too: the reading itself cannot be ended.
    let hidden = if hidden {
        Hidden::enter().map_err(wrong)?
    } else {
        None
    };
    if io::stdin().is_terminal() {
        eprint!("{question}");
    }
    let reading = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().take(LONGEST_LINE).read_line(&mut line)?;
        Ok(line)
    });
    let line = reading.await.map_err(io::Error::other).flatten();
    if hidden.is_some() {
        drop(hidden);
        eprintln!();
    }
    Ok(line.map_err(wrong)?.trim().to_owned())
}

/// What cannot work is not kept.
async fn try_out(endpoint: &Endpoint, token: &str, ca: Option<&str>) -> Result<(), Complaint> {
    let trust = match ca {
        Some(pem) => Trust::from_pem(pem.as_bytes())
            .map_err(|error| Complaint::new("reading the CA certificate", error.to_string()))?,
        None => Trust::none(),
    };
    let client = Client::connect(endpoint.clone(), token.to_owned(), trust).await;
    let client = client.map_err(|error| {
        Complaint::of(&format!("connecting to {endpoint}"), &error).detail("nothing was kept")
    })?;
    client.close().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_as_the_console_or_another_program_writes_it() {
        let plain = "0a".repeat(32);
        let spread = vec!["0A"; 32].join(":");
        let parse = |text: &str| text.parse::<Fingerprint>();
        assert_eq!(parse(&spread), parse(&plain));
        assert_eq!(parse(&format!("sha256:{plain}")), parse(&plain));
        assert!(parse(&plain).is_ok());
        for text in ["", "0a", &"0x".repeat(32), &"0".repeat(65)] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
