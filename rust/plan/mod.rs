//! Plans: what every tensor of an output is made of, as data, parsed ([`schema`]), laid out in files ([`layout`]) and
//! checked against the inputs (`sources`, `resolve`, `plan`).

mod encoded;
mod float_input;
mod input;
pub mod layout;
mod operand;
mod operation;
#[expect(clippy::module_inception, reason = "the stage is named after what it makes")]
mod plan;
mod resolve;
pub mod schema;
mod shard;
mod sources;
mod sum;
mod target;
mod view;

pub use encoded::{Change, Changes, Encoded};
pub use float_input::{FloatInput, Stored};
pub use input::Input;
pub use operand::{LowRank, Magnitude, Operand, Rows};
pub use operation::{Assembly, Computation, Operation, OutputTensor, Piece, Target};
pub use plan::Plan;
pub use schema::EncodedPart;
pub use shard::PlannedShard;
pub use sources::GivenSources;
pub use sum::resolve_sum;
pub use target::{EncodedRows, EncodedTarget};
pub use view::{Order, Region, View};
