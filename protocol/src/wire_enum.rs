//! Enumerations that travel as one integer. A number that this build does not know survives as
//! `Other`, so that a newer peer's value can be shown and passed on instead of breaking a message.

macro_rules! wire_enum {
    (
        $(#[$doc:meta])*
        $name:ident: $int:ty {
            $($(#[$variant_doc:meta])* $variant:ident = $value:literal,)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// A number that this build does not know.
            Other($int),
        }

        impl $name {
            /// The number on the wire.
            pub const fn to_wire(self) -> $int {
                match self {
                    $(Self::$variant => $value,)*
                    Self::Other(number) => number,
                }
            }

            /// The value that a number on the wire stands for.
            pub const fn from_wire(number: $int) -> Self {
                match number {
                    $($value => Self::$variant,)*
                    other => Self::Other(other),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serde::Serialize::serialize(&self.to_wire(), serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                <$int as serde::Deserialize>::deserialize(deserializer).map(Self::from_wire)
            }
        }
    };
}

pub(crate) use wire_enum;
