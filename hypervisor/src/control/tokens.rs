//! Who a client is. Only hashes of tokens are known here; every comparison takes the same time, and
//! a wrong token learns nothing.

use protocol::hello::MAX_TOKEN;
use protocol::id::Owner;

use crate::settings::Token;

/// The tokens that are accepted.
#[derive(Debug)]
pub(crate) struct Tokens(Vec<Token>);

impl Tokens {
    pub(crate) fn new(tokens: Vec<Token>) -> Self {
        if tokens.is_empty() {
            tracing::warn!(
                "no [[tokens]] in the settings: nobody can use the API; `supvm token` makes one"
            );
        }
        Self(tokens)
    }

    /// Whose token this is; none when it is nobody's.
    pub(crate) fn owner(&self, token: &str) -> Option<&Owner> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return None;
        }
        let hash = blake3::hash(token.as_bytes());
        let mut found = None;
        // Every hash is compared, each in constant time: blake3's equality is.
        for known in &self.0 {
            if known.hash == hash {
                found = Some(&known.owner);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_owner_and_nothing_else_does() {
        let token = |owner: &str, text: &str| Token {
            owner: owner.parse().unwrap(),
            hash: blake3::hash(text.as_bytes()),
        };
        let tokens = Tokens::new(vec![
            token("me", "one"),
            token("you", "two"),
            token("me", "three"),
        ]);
        assert_eq!(tokens.owner("one").unwrap().as_str(), "me");
        assert_eq!(tokens.owner("two").unwrap().as_str(), "you");
        assert_eq!(tokens.owner("three").unwrap().as_str(), "me");
        let long = "x".repeat(MAX_TOKEN + 1);
        for wrong in ["", "on", "one ", long.as_str()] {
            assert_eq!(tokens.owner(wrong), None, "{wrong:?}");
        }
    }
}
