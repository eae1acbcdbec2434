//! Plans: what every tensor of an output is made of, as data, parsed ([`schema`]), laid out in files ([`layout`]) and
//! checked against the inputs (`sources`, `resolve`, `plan`).

mod encoded;
mod inputs;
pub mod layout;
#[expect(clippy::module_inception, reason = "the stage is named after what it makes")]
mod plan;
mod resolve;
pub mod schema;
mod sources;
mod view;

pub use encoded::{Change, Changes, Encoded, EncodedRows, EncodedTarget};
pub use inputs::{
    Assembly, Computation, FloatInput, Input, LowRank, Magnitude, Operand, Operation, OutputTensor,
    Piece, Rows, Stored, Target,
};
pub use plan::{Plan, PlannedShard};
pub use resolve::resolve_sum;
pub use schema::EncodedPart;
pub use sources::GivenSources;
pub use view::{Order, Region, View};
