//! Numbered places for what a stack has open. A number is never valid for a later tenant of the
//! same place, so an event that comes too late finds nothing.

/// The number of an entry: its place and which tenant of the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Token(u64);

impl Token {
    /// As the kernel keeps it in an epoll event.
    pub(super) fn to_u64(self) -> u64 {
        self.0
    }

    pub(super) fn from_u64(number: u64) -> Self {
        Self(number)
    }

    fn new(place: u32, tenant: u32) -> Self {
        Self(u64::from(tenant) << 32 | u64::from(place))
    }

    fn place(self) -> usize {
        usize::try_from(self.0 & 0xffff_ffff).unwrap_or(usize::MAX)
    }

    fn tenant(self) -> u32 {
        u32::try_from(self.0 >> 32).unwrap_or(u32::MAX)
    }
}

#[derive(Debug)]
struct Place<T> {
    tenant: u32,
    entry: Option<T>,
}

/// The places.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Takes an entry in that is made with its own number.
    pub(super) fn insert(&mut self, entry: impl FnOnce(Token) -> T) -> Token {
        if let Some(number) = self.free.pop()
            && let Some(place) = usize::try_from(number)
                .ok()
                .and_then(|index| self.places.get_mut(index))
        {
            place.tenant = place.tenant.wrapping_add(1);
            let token = Token::new(number, place.tenant);
            place.entry = Some(entry(token));
            return token;
        }
        let number = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
        let token = Token::new(number, 0);
        self.places.push(Place {
            tenant: 0,
            entry: Some(entry(token)),
        });
        token
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        self.places
            .get_mut(token.place())
            .filter(|place| place.tenant == token.tenant())
            .and_then(|place| place.entry.as_mut())
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        let place = self
            .places
            .get_mut(token.place())
            .filter(|place| place.tenant == token.tenant())?;
        let entry = place.entry.take()?;
        self.free
            .push(u32::try_from(token.place()).unwrap_or(u32::MAX));
        Some(entry)
    }

    /// The numbers of all entries.
    pub(super) fn tokens(&self) -> Vec<Token> {
        self.places
            .iter()
            .zip(0_u32..)
            .filter(|(place, _)| place.entry.is_some())
            .map(|(place, number)| Token::new(number, place.tenant))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_does_not_find_a_later_tenant() {
        let mut slab = Slab::new();
        let first = slab.insert(|_| 1);
        assert_eq!(slab.remove(first), Some(1));
        let second = slab.insert(|_| 2);
        assert!(slab.get_mut(first).is_none());
        assert!(slab.remove(first).is_none());
        assert_eq!(slab.get_mut(second), Some(&mut 2));
        assert_eq!(slab.tokens(), vec![second]);
    }
}
