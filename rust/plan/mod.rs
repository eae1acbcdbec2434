//! Plans: what every tensor of an output is made of, as data, parsed ([`schema`]), laid out in files ([`layout`]) and
//! checked against the inputs (`validate`, `operand`).

pub mod layout;
mod operand;
pub mod schema;
mod validate;

pub use operand::{FloatInput, Input, LowRank, Magnitude, Operand, Rows};
pub use validate::{Operation, OutputTensor, Plan, PlannedShard};
