//! A mask over what any method makes: `K + m·(x - K)` for each element, with K the tensor that is kept where m is 0.
//!
//! It is no method of the table: a plan lays it over one. Where m is 0 or 1 the result is K or x, bit for bit.

use super::{Facts, Finding, Method, Request, Slice, Tally};
use crate::kernels::Kernels;

/// Operands that it reads before the method's own: what is kept, and the mask.
const OWN: usize = 2;

/// A method under a mask.
#[derive(Debug)]
pub struct Masked {
    inner: Box<dyn Method>,
}

impl Masked {
    /// Lays a mask over a method. Its operands are what is kept, the mask, and then the method's.
    #[must_use]
    pub fn over(inner: Box<dyn Method>) -> Self {
        Self { inner }
    }

    fn inner<'a>(slice: &Slice<'a>) -> Slice<'a> {
        Slice { operands: &slice.operands[OWN..], ..*slice }
    }
}

impl Method for Masked {
    fn passes(&self) -> usize {
        self.inner.passes()
    }

    fn row(&self) -> Option<usize> {
        self.inner.row()
    }

    fn leaves_out(&self) -> bool {
        true
    }

    fn start(&self) -> Facts {
        self.inner.start()
    }

    fn request(&self, facts: &Facts) -> Request {
        self.inner.request(facts)
    }

    fn observe(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        tally: &mut Tally<'_, '_>,
    ) {
        self.inner.observe(kernels, facts, &Self::inner(slice), tally);
    }

    fn conclude(&self, facts: &Facts, sums: &[f64], counts: &[u32]) -> Result<Finding, String> {
        self.inner.conclude(facts, sums, counts)
    }

    fn blend(
        &self,
        kernels: &Kernels,
        facts: &Facts,
        slice: &Slice<'_>,
        out: &mut [f32],
    ) -> Result<(), String> {
        self.inner.blend(kernels, facts, &Self::inner(slice), out)?;
        let (kept, mask) = (slice.operands[0], slice.operands[1]);
        let within = kernels.run(
            #[inline(always)]
            || {
                let mut within = true;
                for ((value, &kept), &share) in out.iter_mut().zip(kept).zip(mask) {
                    // NaN is not within.
                    within &= (0.0..=1.0).contains(&share);
                    let between = kept + share * (*value - kept);
                    let one_or_between = if share == 1.0 { *value } else { between };
                    *value = if share == 0.0 { kept } else { one_or_between };
                }
                within
            },
        );
        if within {
            return Ok(());
        }
        Err("its mask holds numbers outside of 0 to 1, or NaN; scale the mask into that range"
            .to_owned())
    }
}
