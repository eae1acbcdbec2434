//! Plans: what every tensor of an output is made of, as data, parsed ([`schema`]), laid out in files ([`layout`]) and
//! checked against the inputs ([`validate`]).

pub mod layout;
pub mod schema;
mod validate;

pub use validate::{Operand, Operation, OutputTensor, Plan, PlannedShard};
