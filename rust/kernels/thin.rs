//! Products with thin matrices: the inner loop of a sketch, where a matrix meets a few dozen columns.
//!
//! Every element of a result is one chain of fused multiply-adds in the order of the sum, so all levels give the same
//! bits; a vector holds adjacent columns.

/// A product to add: `out[i][j] += Σ_t left(i, t) · right[t][j]`, for `rows` of `out`, all `columns` and `terms` of the
/// sum. All matrices lie row by row; a row of `out` and of `right` may be longer than what is used.
#[derive(Debug)]
pub struct Thin<'a> {
    /// The matrix that is not thin.
    pub left: &'a [f32],
    /// Distance of two elements of it that belong to adjacent rows of `out`.
    pub row_step: usize,
    /// Distance of two elements of it that belong to adjacent terms.
    pub term_step: usize,
    /// One row a term.
    pub right: &'a [f32],
    /// Distance of its rows.
    pub right_step: usize,
    /// What is added to.
    pub out: &'a mut [f32],
    /// Distance of its rows.
    pub out_step: usize,
    /// Rows of `out`.
    pub rows: usize,
    /// Columns of `out` and `right`.
    pub columns: usize,
    /// Terms of each sum.
    pub terms: usize,
}

impl Thin<'_> {
    /// Whether all that [`add`] touches lies within the slices.
    pub(super) fn fits(&self) -> bool {
        if self.rows == 0 || self.columns == 0 || self.terms == 0 {
            return true;
        }
        let last = |steps: [(usize, usize); 2], width: usize| {
            steps.iter().try_fold(width, |end, &(count, step)| {
                (count - 1).checked_mul(step).and_then(|distance| end.checked_add(distance))
            })
        };
        let within = |end: Option<usize>, length: usize| end.is_some_and(|end| end <= length);
        within(last([(self.rows, self.row_step), (self.terms, self.term_step)], 1), self.left.len())
            && within(last([(self.terms, self.right_step), (1, 0)], self.columns), self.right.len())
            && within(last([(self.rows, self.out_step), (1, 0)], self.columns), self.out.len())
    }
}

/// A vector of f32.
///
/// # Safety
/// `load` and `store` touch exactly `LANES` adjacent elements.
pub(super) unsafe trait Vector: Copy {
    const LANES: usize;

    /// # Safety
    /// The processor has the vectors' features, and `LANES` elements can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// The processor has the vectors' features, and `LANES` elements can be written.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// The processor has the vectors' features.
    unsafe fn splat(value: f32) -> Self;
    /// `self + left · right`, rounded once.
    ///
    /// # Safety
    /// The processor has the vectors' features.
    unsafe fn plus_product(self, left: Self, right: Self) -> Self;
}

/// What every processor has: one element, or what the compiler makes of it.
// SAFETY: one element is read or written.
unsafe impl Vector for f32 {
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { *to = self }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn plus_product(self, left: Self, right: Self) -> Self {
        left.mul_add(right, self)
    }
}

/// Adds a product by vectors of one kind: tiles of `ROWS` rows and up to `WIDE` vectors stay in registers.
///
/// # Safety
/// The processor has the vectors' features, and [`Thin::fits`].
#[inline(always)]
pub(super) unsafe fn add<V: Vector, const ROWS: usize, const WIDE: usize>(product: &mut Thin<'_>) {
    let vectors = product.columns / V::LANES;
    // Strips of equal widths rather than a thin last one: 7 vectors are 3, 2 and 2.
    let strips = vectors.div_ceil(WIDE).max(1);
    let mut vector = 0;
    for strip in 0..strips {
        let wide = (vectors - vector).div_ceil(strips - strip);
        // SAFETY: the caller's; the strips' columns are some of those of the product.
        unsafe {
            match wide {
                0 => {}
                1 => strip_of::<V, ROWS, 1>(product, vector * V::LANES),
                2 if WIDE > 2 => strip_of::<V, ROWS, 2>(product, vector * V::LANES),
                _ => strip_of::<V, ROWS, WIDE>(product, vector * V::LANES),
            }
        }
        vector += wide;
    }
    let rest = vectors * V::LANES;
    for column in rest..product.columns {
        // SAFETY: as above.
        unsafe { strip_of::<f32, ROWS, 1>(product, column) }
    }
}

/// Adds to `WIDE` vectors of columns from `column` on.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
unsafe fn strip_of<V: Vector, const ROWS: usize, const WIDE: usize>(
    product: &mut Thin<'_>,
    column: usize,
) {
    let whole = product.rows / ROWS * ROWS;
    // SAFETY: the caller's; the rows are those of the product.
    unsafe {
        for row in (0..whole).step_by(ROWS) {
            tile::<V, ROWS, WIDE>(product, row, column);
        }
        for row in whole..product.rows {
            tile::<V, 1, WIDE>(product, row, column);
        }
    }
}

/// Adds to `ROWS` rows of `WIDE` vectors of columns.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const WIDE: usize>(
    product: &mut Thin<'_>,
    row: usize,
    column: usize,
) {
    let (row_step, term_step) = (product.row_step, product.term_step);
    let (right_step, out_step) = (product.right_step, product.out_step);
    // SAFETY: the caller says that rows `row..row + ROWS`, these columns and all terms lie within the slices.
    unsafe {
        let left = product.left.as_ptr().add(row * row_step);
        let right = product.right.as_ptr().add(column);
        let out = product.out.as_mut_ptr().add(row * out_step + column);
        let mut sums = [[V::splat(0.0); WIDE]; ROWS];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (q, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(out.add(i * out_step + q * V::LANES));
            }
        }
        for term in 0..product.terms {
            let mut values = [V::splat(0.0); WIDE];
            for (q, value) in values.iter_mut().enumerate() {
                *value = V::load(right.add(term * right_step + q * V::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*left.add(i * row_step + term * term_step));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = sum.plus_product(factor, value);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (q, sum) in sums.iter().enumerate() {
                sum.store(out.add(i * out_step + q * V::LANES));
            }
        }
    }
}

/// The product without vectors; the reference for the others.
pub(super) fn add_scalar(product: &mut Thin<'_>) {
    // SAFETY: `Kernels::add_thin` checks that the product fits, and single elements need no features.
    unsafe { add::<f32, 4, 1>(product) }
}

/// A product of the columns of two matrices that lie row by row: `out[i][j] += Σ_r left[r][i] · right[r][j]`, exact products
/// summed in f64.
#[derive(Debug)]
pub struct Cross<'a> {
    /// Rows, of which the first `left_columns` elements are used.
    pub left: &'a [f32],
    /// Columns of it that are used.
    pub left_columns: usize,
    /// Distance of its rows.
    pub left_step: usize,
    /// As many rows as of `left`.
    pub right: &'a [f32],
    /// Columns of it that are used.
    pub right_columns: usize,
    /// Distance of its rows.
    pub right_step: usize,
    /// (left columns, right columns).
    pub out: &'a mut [f64],
}

/// Adds a product of columns.
#[inline(always)]
pub(super) fn add_cross(product: &mut Cross<'_>) {
    let lefts = product.left.chunks(product.left_step);
    for (left, right) in lefts.zip(product.right.chunks(product.right_step)) {
        let right = &right[..product.right_columns];
        let outs = product.out.chunks_exact_mut(product.right_columns);
        for (&factor, out) in left[..product.left_columns].iter().zip(outs) {
            let factor = f64::from(factor);
            for (sum, &value) in out.iter_mut().zip(right) {
                // The product is exact, so that a fused addition would give the same bits.
                *sum += factor * f64::from(value);
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod neon {
    use super::{Thin, Vector, add};
    use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_f32, vst1q_f32};

    // SAFETY: the intrinsics read and write four elements.
    unsafe impl Vector for float32x4_t {
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's.
            unsafe { vld1q_f32(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller's.
            unsafe { vst1q_f32(to, self) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller's.
            unsafe { vdupq_n_f32(value) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, left: Self, right: Self) -> Self {
            // SAFETY: the caller's.
            unsafe { vfmaq_f32(self, left, right) }
        }
    }

    /// NEON belongs to every processor of this architecture.
    pub(in crate::kernels) fn add_thin(product: &mut Thin<'_>) {
        // SAFETY: `Kernels::add_thin` checks that the product fits, and NEON is there.
        unsafe { add::<float32x4_t, 8, 3>(product) }
    }
}
