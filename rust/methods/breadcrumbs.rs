//! `breadcrumbs`: task vectors lose their largest and their smallest elements (Davari and Belilovsky,
//! arXiv 2312.06795).
//!
//! Of `n` elements `⌊density·n⌋` stay: those below the `⌊gamma·n⌋` largest, or as many fewer as would leave too few.

use super::Method;
use super::linear::WEIGHT;
use super::parameters::{SHARE, Spec, parameters};
use super::quantile;
use super::random::floor;
use super::specification::{Base, Description, Flag, Given, Rule, Target};
use super::task_vectors::{DENSITY, Family, KEEP_SCALE, LAMBDA, Rescale, SEED};
use super::ties::{Band, check_size};

parameters! {
    /// Of the sum.
    struct Shared {
        lambda: f64 = LAMBDA,
        normalize: bool = KEEP_SCALE,
        rescale: Rescale = Rescale::SPEC,
        seed: u64 = SEED,
    }
}

parameters! {
    /// Of each model.
    struct Operand {
        weight: f64 = WEIGHT,
        density: f64 = DENSITY,
        gamma: f64 = Spec::number(
            SHARE,
            0.01,
            "Share of the task vector's largest elements that are dropped.",
        ),
    }
}

/// `breadcrumbs`, or `breadcrumbs_ties` where elements vote, with checked parameters.
#[derive(Debug)]
pub(super) struct Breadcrumbs<const VOTES: bool> {
    family: Family,
    gammas: Vec<f64>,
    seed: u64,
}

impl<const VOTES: bool> Rule for Breadcrumbs<VOTES> {
    type Shared = Shared;
    type Operand = Operand;
    const ABOUT: Description = {
        let alone = Description {
            name: "breadcrumbs",
            title: "Breadcrumbs",
            summary: "Drops the largest and the smallest elements of each task vector, then adds them.",
            reference: "https://arxiv.org/abs/2312.06795",
            base: Base::Required,
            operands: (1, None),
            passes: quantile::PASSES + 1,
            flags: &[],
            interpolates: None,
        };
        if VOTES {
            Description {
                name: "breadcrumbs_ties",
                title: "Breadcrumbs with TIES",
                summary: "Drops the largest and the smallest elements of each task vector, then adds those that agree on the sign.",
                flags: &[Flag::Votes],
                ..alone
            }
        } else {
            alone
        }
    };

    fn new(given: Given<Self>) -> Result<Self, String> {
        let Shared { lambda, normalize, rescale, seed } = given.shared;
        let operands = given.operands.iter().map(|operand| (operand.weight, operand.density));
        let family = Family::new(operands, lambda, normalize)?;
        let family = family.voting(VOTES).rescaled(rescale == Rescale::L1);
        let gammas = given.operands.iter().map(|operand| operand.gamma).collect();
        Ok(Self { family, gammas, seed })
    }

    fn method(&self, target: &Target<'_>) -> Result<Box<dyn Method>, String> {
        check_size(target)?;
        let elements = target.elements();
        let key = target.key(self.seed);
        self.family.method(None, |number, density| {
            let kept = floor(density, elements);
            let dropped = floor(self.gammas[number], elements).min(elements - kept);
            Ok(Box::new(Band::new(elements, key, number, kept + dropped, dropped)))
        })
    }
}
