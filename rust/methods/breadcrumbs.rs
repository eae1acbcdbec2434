//! `breadcrumbs`: task vectors lose their largest and their smallest elements (Davari and Belilovsky,
//! arXiv 2312.06795).
//!
//! Of `n` elements `⌊density·n⌋` stay: those below the `⌊gamma·n⌋` largest, or as many fewer as would leave too few.

use super::Method;
use super::quantile;
use super::random::floor;
use super::specification::{Base, Default, Kind, Parameter, Scope, Settings, Specification};
use super::task_vectors::{COMMON, KEEP_SCALE, RESCALE, SEED, TaskVectors};
use super::ties::{Band, check_size};

const GAMMA: Parameter = Parameter {
    name: "gamma",
    scope: Scope::Operand,
    kind: Kind::Number(0.0, 1.0),
    default: Default::Number(0.01),
    help: "Share of the task vector's largest elements that are dropped.",
};

/// `breadcrumbs` in the table of methods.
pub(super) const BREADCRUMBS: Specification = Specification {
    name: "breadcrumbs",
    title: "Breadcrumbs",
    summary: "Drops the largest and the smallest elements of each task vector, then adds them.",
    reference: "https://arxiv.org/abs/2312.06795",
    base: Base::Required,
    operands: (1, None),
    passes: quantile::PASSES + 1,
    parameters: &[COMMON, &[GAMMA, KEEP_SCALE, RESCALE, SEED]],
    make: |settings| make(settings, false),
};

/// `breadcrumbs_ties` in the table of methods.
pub(super) const BREADCRUMBS_TIES: Specification = Specification {
    name: "breadcrumbs_ties",
    title: "Breadcrumbs with TIES",
    summary: "Drops the largest and the smallest elements of each task vector, then adds those that agree on the sign.",
    make: |settings| make(settings, true),
    ..BREADCRUMBS
};

fn make(settings: &Settings, consensus: bool) -> Result<Box<dyn Method>, String> {
    check_size(settings)?;
    let elements = settings.elements();
    let gammas = settings.numbers("gamma", 0.0);
    TaskVectors::make(settings, consensus, None, |number, density| {
        let kept = floor(density, elements);
        let dropped = floor(gammas[number], elements).min(elements - kept);
        Ok(Box::new(Band::new(settings, number, kept + dropped, dropped)))
    })
}
