//! Merge methods: what must hold of all of them however the work is cut, and the parts that decide which elements stay.
//! The values themselves are compared from Python, with mergekit and with formulas in float64.

mod interruption;
mod invariance;
mod masked;
mod quantile;
mod random;
mod refusals;
mod scene;
mod table;
