//! Parameters of methods: declared once, as the fields of a struct, from which the table's entries and the parser come.
//!
//! A method reads `given.shared.lambda`; a name that is not declared does not compile, and one that is declared and
//! never read is a warning.

use serde_json::{Map, Value};
use std::marker::PhantomData;

/// Values that a parameter may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A finite number, from the first to the second.
    Number(f64, f64),
    /// A whole number, from the first to the second.
    Integer(u64, u64),
    /// True or false.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// A default value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Default {
    /// There is none: the parameter must be given.
    Required,
    /// A number.
    Number(f64),
    /// A whole number.
    Integer(u64),
    /// True or false.
    Flag(bool),
    /// A word.
    Choice(&'static str),
}

impl Default {
    /// As JSON; `None` if there is none.
    #[must_use]
    pub fn to_json(self) -> Option<Value> {
        match self {
            Self::Required => None,
            Self::Number(number) => Some(number.into()),
            Self::Integer(number) => Some(number.into()),
            Self::Flag(flag) => Some(flag.into()),
            Self::Choice(word) => Some(word.into()),
        }
    }
}

/// A parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name in plans, as mergekit has it.
    pub name: &'static str,
    /// What values it may have.
    pub kind: Kind,
    /// The value where none is given.
    pub default: Default,
    /// One sentence for a person.
    pub help: &'static str,
}

impl Parameter {
    /// Checks that the value is one that the parameter may have.
    fn check(&self, value: &Value) -> Result<(), String> {
        let (fits, expected) = match self.kind {
            Kind::Number(least, most) => (
                value.as_f64().is_some_and(|number| (least..=most).contains(&number)),
                match (least.is_finite(), most.is_finite()) {
                    (true, true) => format!("a number from {least} to {most}"),
                    (true, false) => format!("a number of at least {least}"),
                    _ => "a finite number".to_owned(),
                },
            ),
            Kind::Integer(least, most) => (
                value.as_u64().is_some_and(|number| (least..=most).contains(&number)),
                format!("a whole number from {least} to {most}"),
            ),
            Kind::Flag => (value.is_boolean(), "true or false".to_owned()),
            Kind::Choice(words) => (
                value.as_str().is_some_and(|word| words.contains(&word)),
                format!("one of {}", words.join(", ")),
            ),
        };
        if fits {
            return Ok(());
        }
        Err(format!("`{}` should be {expected}, not {value}", self.name))
    }
}

/// What a parameter's value becomes in Rust.
pub(super) trait Field: Sized {
    /// The value, if it has the type.
    fn of(value: &Value) -> Option<Self>;
}

impl Field for f64 {
    fn of(value: &Value) -> Option<Self> {
        value.as_f64()
    }
}

impl Field for u64 {
    fn of(value: &Value) -> Option<Self> {
        value.as_u64()
    }
}

impl Field for bool {
    fn of(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

/// All of a parameter but its name, which is that of the struct's field.
#[derive(Debug)]
pub(super) struct Spec<T> {
    kind: Kind,
    default: Default,
    help: &'static str,
    value: PhantomData<fn() -> T>,
}

impl<T> Spec<T> {
    const fn new(kind: Kind, default: Default, help: &'static str) -> Self {
        Self { kind, default, help, value: PhantomData }
    }

    /// The parameter of this name.
    pub(super) const fn named(&self, name: &'static str) -> Parameter {
        Parameter { name, kind: self.kind, default: self.default, help: self.help }
    }
}

/// Any number that is finite.
pub(super) const FINITE: [f64; 2] = [f64::NEG_INFINITY, f64::INFINITY];
/// Any number that is finite and not negative.
pub(super) const NOT_NEGATIVE: [f64; 2] = [0.0, f64::INFINITY];
/// A share.
pub(super) const SHARE: [f64; 2] = [0.0, 1.0];

impl Spec<f64> {
    /// A number in a range.
    pub(super) const fn number(range: [f64; 2], default: f64, help: &'static str) -> Self {
        Self::new(Kind::Number(range[0], range[1]), Default::Number(default), help)
    }

    /// A number in a range that must be given.
    pub(super) const fn required(range: [f64; 2], help: &'static str) -> Self {
        Self::new(Kind::Number(range[0], range[1]), Default::Required, help)
    }
}

impl Spec<u64> {
    /// A whole number in a range.
    pub(super) const fn integer(range: [u64; 2], default: u64, help: &'static str) -> Self {
        Self::new(Kind::Integer(range[0], range[1]), Default::Integer(default), help)
    }
}

impl Spec<bool> {
    /// True or false.
    pub(super) const fn flag(default: bool, help: &'static str) -> Self {
        Self::new(Kind::Flag, Default::Flag(default), help)
    }
}

/// An enum that `choice!` made.
pub(super) trait Choice {
    /// What its values are called; the first is the default.
    const WORDS: &'static [&'static str];
}

impl<T: Choice> Spec<T> {
    /// One of the type's words.
    pub(super) const fn choice(help: &'static str) -> Self {
        Self::new(Kind::Choice(T::WORDS), Default::Choice(T::WORDS[0]), help)
    }
}

/// Parameters of one scope.
pub(super) trait Parameters: Sized {
    /// As the table lists them.
    const LIST: &'static [Parameter];

    /// Reads them; those that are not given have their defaults.
    ///
    /// # Errors
    /// A sentence that names the parameter.
    fn read(reader: &Reader<'_>) -> Result<Self, String>;
}

/// Reads parameters that were given to a method.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    /// The method's name.
    pub method: &'static str,
    /// Where the parameters stand, for messages: nothing, or " of an operand".
    pub place: &'static str,
    pub given: &'a Map<String, Value>,
}

impl Reader<'_> {
    /// Reads all parameters, and refuses unknown ones.
    pub(super) fn read_all<P: Parameters>(&self) -> Result<P, String> {
        let unknown = |name: &&String| P::LIST.iter().all(|known| known.name != *name);
        if let Some(unknown) = self.given.keys().find(unknown) {
            let names: Vec<_> = P::LIST.iter().map(|parameter| parameter.name).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(format!(
                "`{}` has no parameter `{unknown}`{}; it has {names}",
                self.method, self.place
            ));
        }
        P::read(self)
    }

    /// Reads one parameter.
    pub(super) fn read<T: Field>(&self, name: &'static str, spec: &Spec<T>) -> Result<T, String> {
        let parameter = spec.named(name);
        let value = match self.given.get(name) {
            Some(value) => {
                parameter.check(value)?;
                T::of(value)
            }
            None => parameter.default.to_json().as_ref().and_then(T::of),
        };
        value.ok_or_else(|| format!("`{}` needs `{name}`", self.method))
    }
}

/// Declares the parameters of one scope: `struct Name { field: type = spec, … }`.
macro_rules! parameters {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $type:ty = $spec:expr,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone)]
        pub(super) struct $name {
            $($field: $type,)*
        }

        impl $crate::methods::parameters::Parameters for $name {
            const LIST: &'static [$crate::methods::parameters::Parameter] = &[
                $($crate::methods::parameters::Spec::<$type>::named(&$spec, stringify!($field)),)*
            ];

            #[allow(unused_variables, clippy::unnecessary_wraps, reason = "there may be no field")]
            fn read(
                reader: &$crate::methods::parameters::Reader<'_>,
            ) -> Result<Self, String> {
                Ok(Self { $($field: reader.read::<$type>(stringify!($field), &$spec)?,)* })
            }
        }
    };
}

/// Declares an enum whose values have words; the first is the default.
macro_rules! choice {
    ($(#[$meta:meta])* enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum $name {
            $($(#[$variant_meta])* $variant,)*
        }

        impl $crate::methods::parameters::Choice for $name {
            const WORDS: &'static [&'static str] = &[$($word,)*];
        }

        impl $crate::methods::parameters::Field for $name {
            fn of(value: &serde_json::Value) -> Option<Self> {
                match value.as_str()? {
                    $($word => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

pub(super) use {choice, parameters};

parameters! {
    /// No parameters.
    struct Nothing {}
}
