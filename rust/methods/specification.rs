//! What a method is called, where it comes from, what it takes and what holds of it; and what a method's file declares.

use super::Method;
use super::parameters::{Parameter, Parameters, Reader};
use serde_json::{Map, Value};
use std::fmt::Debug;

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

/// What holds of a method, so that callers need not know it by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    /// Elements vote on their sign, so that a lone update always wins.
    Votes,
    /// Asked to merge one model only, mergekit gives that model's tensor as it is.
    Sole,
    /// With default parameters it gives its one operand unchanged.
    Copies,
    /// It is a weighted sum, so that operands that share a tensor may be combined by adding their weights.
    Sums,
}

/// Whether a parameter has one value, or one for each operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One value.
    Shared,
    /// One for each operand.
    Operand,
}

/// A method in words.
#[derive(Debug, Clone, Copy)]
pub struct Description {
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
    /// What else holds of it.
    pub flags: &'static [Flag],
    /// The shared parameter that leads from the base (0) to the one operand (1), if it interpolates between the two.
    pub interpolates: Option<&'static str>,
}

/// A method as the table lists it.
#[derive(Debug, Clone, Copy)]
pub struct Specification {
    /// What it is.
    pub about: Description,
    /// Parameters that have a value for each operand.
    pub operand_parameters: &'static [Parameter],
    /// Parameters that have one value.
    pub shared_parameters: &'static [Parameter],
    pub(super) prepare: fn(&Asked<'_>) -> Result<Box<dyn AnyRule>, String>,
}

/// What a plan asks of a method, not yet checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub shared: &'a Map<String, Value>,
    pub operands: &'a [Map<String, Value>],
    pub base: bool,
}

/// Checked parameters of a method.
#[derive(Debug)]
pub(super) struct Given<R: Rule> {
    pub shared: R::Shared,
    /// One for each operand, as many as the method takes.
    pub operands: Vec<R::Operand>,
    /// Whether there is a base.
    pub base: bool,
}

/// The tensor that a method is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    /// Its name in the output, which together with a seed decides random numbers.
    pub name: &'a str,
    /// Its dimensions.
    pub shape: &'a [usize],
}

impl Target<'_> {
    /// Number of elements.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Length of the last dimension.
    pub(super) fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Key of its random numbers; differs from tensor to tensor.
    pub(super) fn key(&self, seed: u64) -> [u32; 2] {
        super::random::key(seed, self.name)
    }
}

/// What the file of a method declares: the method with checked parameters, not yet for a certain tensor.
pub(super) trait Rule: Debug + Send + Sync + Sized + 'static {
    /// Parameters with one value.
    type Shared: Parameters + Debug;
    /// Parameters with a value for each operand.
    type Operand: Parameters + Debug;
    /// The method in words.
    const ABOUT: Description;

    /// Takes the parameters.
    ///
    /// # Errors
    /// A sentence if they do not fit each other.
    fn new(given: Given<Self>) -> Result<Self, String>;

    /// The method for a tensor.
    ///
    /// # Errors
    /// A sentence if tensors of this shape cannot be merged this way.
    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String>;
}

/// A [`Rule`] of any type.
pub(super) trait AnyRule: Debug + Send + Sync {
    /// As [`Rule::method`].
    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String>;
}

impl<R: Rule> AnyRule for R {
    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        Rule::method(self, target)
    }
}

impl Specification {
    /// What the table says of a rule.
    pub(super) const fn of<R: Rule>() -> Self {
        Self {
            about: R::ABOUT,
            operand_parameters: R::Operand::LIST,
            shared_parameters: R::Shared::LIST,
            prepare: prepare::<R>,
        }
    }

    /// Whether this holds of it.
    #[must_use]
    pub fn has(&self, flag: Flag) -> bool {
        self.about.flags.contains(&flag)
    }

    /// Whether it weighs models against each other: by a weight of each, or by interpolation.
    #[must_use]
    pub fn weighs(&self) -> bool {
        let weight = |parameter: &Parameter| parameter.name == "weight";
        self.about.interpolates.is_some() || self.operand_parameters.iter().any(weight)
    }

    /// All its parameters, those of operands first.
    pub fn parameters(&self) -> impl Iterator<Item = (Scope, &'static Parameter)> {
        let operand = self.operand_parameters.iter().map(|parameter| (Scope::Operand, parameter));
        operand.chain(self.shared_parameters.iter().map(|parameter| (Scope::Shared, parameter)))
    }
}

/// Checks what a plan asks of a rule.
fn prepare<R: Rule>(asked: &Asked<'_>) -> Result<Box<dyn AnyRule>, String> {
    let Description { name: method, base, operands: (least, most), .. } = R::ABOUT;
    let count = asked.operands.len();
    if count < least || most.is_some_and(|most| count > most) {
        let expected = match most {
            Some(most) if most == least => format!("{least}"),
            Some(most) => format!("{least} to {most}"),
            None => format!("at least {least}"),
        };
        return Err(format!("`{method}` takes {expected} operands, found {count}"));
    }
    match (base, asked.base) {
        (Base::None, true) => return Err(format!("`{method}` has no base")),
        (Base::Required, false) => return Err(format!("`{method}` needs a base")),
        _ => {}
    }
    let shared = Reader { method, place: "", given: asked.shared }.read_all()?;
    let operand = |given| Reader { method, place: " of an operand", given }.read_all();
    let operands = asked.operands.iter().map(operand).collect::<Result<_, _>>()?;
    Ok(Box::new(R::new(Given { shared, operands, base: asked.base })?))
}
