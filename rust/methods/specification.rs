//! What a method is called, where it comes from, and which parameters it takes; and their values, checked.

use super::Method;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a method does with a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// It has none.
    None,
    /// Task vectors are taken against it if it is given.
    Optional,
    /// It must be given.
    Required,
}

impl Base {
    /// The name for callers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Optional => "optional",
            Self::Required => "required",
        }
    }
}

/// Whether a parameter has one value, or one for each operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One value.
    Shared,
    /// One for each operand.
    Operand,
}

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
    /// One value or one per operand.
    pub scope: Scope,
    /// What values it may have.
    pub kind: Kind,
    /// The value where none is given.
    pub default: Default,
    /// One sentence for a person.
    pub help: &'static str,
}

/// A method as the table lists it.
#[derive(Debug, Clone, Copy)]
pub struct Specification {
    /// Its name in plans, as mergekit has it.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// One sentence on what it does.
    pub summary: &'static str,
    /// The paper or page that describes it.
    pub reference: &'static str,
    /// What it does with a base.
    pub base: Base,
    /// Fewest and most operands, the base not counted.
    pub operands: (usize, Option<usize>),
    /// Times that inputs are read at most before they are blended.
    pub passes: usize,
    /// Its parameters.
    pub parameters: &'static [&'static [Parameter]],
    /// Makes it.
    pub make: fn(&Settings) -> Result<Box<dyn Method>, String>,
}

/// Checked values for one tensor; every parameter of the method is there.
#[derive(Debug, Clone)]
pub struct Settings {
    shared: BTreeMap<&'static str, Value>,
    operands: Vec<BTreeMap<&'static str, Value>>,
    /// Whether there is a base.
    pub base: bool,
    /// The tensor's dimensions.
    pub shape: Vec<usize>,
    /// Key of the tensor's random numbers; differs from tensor to tensor.
    pub key: [u32; 2],
}

impl Settings {
    /// Number of operands.
    #[must_use]
    pub fn operands(&self) -> usize {
        self.operands.len()
    }

    /// Number of elements of the tensor.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Length of the last dimension.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// A shared number.
    #[must_use]
    pub fn number(&self, name: &str) -> f64 {
        self.shared.get(name).and_then(Value::as_f64).unwrap_or_default()
    }

    /// A shared whole number.
    #[must_use]
    pub fn integer(&self, name: &str) -> u64 {
        self.shared.get(name).and_then(Value::as_u64).unwrap_or_default()
    }

    /// A shared flag.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.shared.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    /// A shared word.
    #[must_use]
    pub fn choice(&self, name: &str) -> &str {
        self.shared.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// A number of every operand; `otherwise` if the method has no such parameter.
    #[must_use]
    pub fn numbers(&self, name: &str, otherwise: f64) -> Vec<f64> {
        let values = self.operands.iter().map(|operand| operand.get(name).and_then(Value::as_f64));
        values.map(|value| value.unwrap_or(otherwise)).collect()
    }

    /// The weights, in f32.
    ///
    /// # Errors
    /// A sentence if one is not finite in f32.
    pub fn weights(&self) -> Result<Vec<f32>, String> {
        let weights = self.numbers("weight", 1.0).into_iter().map(crate::dtype::f64_to_f32);
        weights
            .map(|weight| {
                weight.is_finite().then_some(weight).ok_or_else(|| {
                    "a weight is too large for f32, in which merges are computed".to_owned()
                })
            })
            .collect()
    }
}

impl Specification {
    /// All its parameters.
    pub fn all_parameters(&self) -> impl Iterator<Item = &'static Parameter> {
        self.parameters.iter().flat_map(|group| group.iter())
    }

    /// Checks values and fills in defaults.
    ///
    /// # Errors
    /// A sentence that names the parameter.
    pub(super) fn settle(
        &self,
        shared: &Map<String, Value>,
        operands: &[Map<String, Value>],
        base: bool,
        shape: &[usize],
        key: [u32; 2],
    ) -> Result<Settings, String> {
        let (least, most) = self.operands;
        if operands.len() < least || most.is_some_and(|most| operands.len() > most) {
            let expected = match most {
                Some(most) if most == least => format!("{least}"),
                Some(most) => format!("{least} to {most}"),
                None => format!("at least {least}"),
            };
            return Err(format!(
                "`{}` takes {expected} operands, found {}",
                self.name,
                operands.len()
            ));
        }
        match (self.base, base) {
            (Base::None, true) => return Err(format!("`{}` has no base", self.name)),
            (Base::Required, false) => return Err(format!("`{}` needs a base", self.name)),
            _ => {}
        }
        Ok(Settings {
            shared: self.check(Scope::Shared, shared)?,
            operands: operands
                .iter()
                .map(|operand| self.check(Scope::Operand, operand))
                .collect::<Result<_, _>>()?,
            base,
            shape: shape.to_vec(),
            key,
        })
    }

    fn check(
        &self,
        scope: Scope,
        given: &Map<String, Value>,
    ) -> Result<BTreeMap<&'static str, Value>, String> {
        let known = || self.all_parameters().filter(|parameter| parameter.scope == scope);
        if let Some(unknown) = given.keys().find(|name| known().all(|known| known.name != *name)) {
            let place = match scope {
                Scope::Shared => "",
                Scope::Operand => " of an operand",
            };
            let names: Vec<_> = known().map(|parameter| parameter.name).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(format!(
                "`{}` has no parameter `{unknown}`{place}; it has {names}",
                self.name
            ));
        }
        known()
            .map(|parameter| {
                let value = match given.get(parameter.name) {
                    Some(value) => parameter.check(value)?,
                    None => parameter
                        .default
                        .to_json()
                        .ok_or_else(|| format!("`{}` needs `{}`", self.name, parameter.name))?,
                };
                Ok((parameter.name, value))
            })
            .collect()
    }
}

impl Parameter {
    /// The value, if it is one that the parameter may have.
    fn check(&self, value: &Value) -> Result<Value, String> {
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
            return Ok(value.clone());
        }
        Err(format!("`{}` should be {expected}, not {value}", self.name))
    }
}
