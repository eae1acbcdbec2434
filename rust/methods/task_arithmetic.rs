//! `task_arithmetic`: the base plus a weighted sum of task vectors (Ilharco et al., arXiv 2212.04089).

use super::Method;
use super::specification::{Base, Settings, Specification};
use super::task_vectors::{COMMON, KEEP_SCALE, KeepAll, TaskVectors};

/// `task_arithmetic` in the table of methods.
pub(super) const TASK_ARITHMETIC: Specification = Specification {
    name: "task_arithmetic",
    title: "Task arithmetic",
    summary: "Base plus the weighted sum of task vectors.",
    reference: "https://arxiv.org/abs/2212.04089",
    base: Base::Required,
    operands: (1, None),
    passes: 0,
    // Without a sparsifier there is no density.
    parameters: &[&[COMMON[0], COMMON[2], KEEP_SCALE]],
    make,
};

fn make(settings: &Settings) -> Result<Box<dyn Method>, String> {
    TaskVectors::make(settings, false, None, |_, _| Ok(Box::new(KeepAll)))
}
