//! `supvm token`: a fresh token for a client and the lines of `supvm.toml` that let it in. Only the
//! hash belongs on the appliance; the token is shown once and kept nowhere.

use data_encoding::HEXLOWER;
use protocol::id::Owner;

/// Arguments of `supvm token`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct TokenArgs {
    /// Whom the token belongs to.
    #[arg(long, default_value = "admin")]
    pub owner: Owner,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The system has no random bytes.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

/// Makes a token of 256 random bits and says what to do with it.
pub fn make(arguments: &TokenArgs) -> Result<String, TokenError> {
    let mut random = [0; 32];
    getrandom::fill(&mut random)?;
    let token = HEXLOWER.encode(&random);
    let hash = blake3::hash(token.as_bytes()).to_hex();
    let owner = &arguments.owner;
    Ok(format!(
        "# for the client, shown only now:\nSUP_TOKEN={token}\n\
         # for supvm.toml on the appliance:\n[[tokens]]\nowner = \"{owner}\"\nblake3 = \"{hash}\"\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_lines_let_the_printed_token_in() {
        let owner: Owner = "me".parse().unwrap();
        let text = make(&TokenArgs { owner }).unwrap();
        let token = text
            .lines()
            .find_map(|line| line.strip_prefix("SUP_TOKEN="))
            .unwrap();
        assert_eq!(token.len(), 64);
        let settings = text.split_once("[[tokens]]").unwrap().1;
        let settings: toml::Table = settings.parse().unwrap();
        let hash = blake3::hash(token.as_bytes()).to_hex();
        assert_eq!(settings["blake3"].as_str(), Some(hash.as_str()));
        assert_eq!(settings["owner"].as_str(), Some("me"));
    }
}
