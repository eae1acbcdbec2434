//! The loops of [`super::generic`] compiled with AVX2 and with AVX-512, and half conversions by F16C.

use super::codes::{self, Groups};
use super::generic::{self, COLLECT_MARGIN, Half, Portable, Product};
use super::thin::{self, Cross, Thin, Vector};
use super::updates::{self, Models, Sums};
use crate::code::Code;
use crate::dtype::Float;
use std::arch::x86_64::{
    __m256, __m512, __m512i, _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128,
    _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_ps, _mm256_storeu_ps, _mm512_and_si512, _mm512_castps_si512,
    _mm512_cmpge_epu32_mask, _mm512_cmplt_epu32_mask, _mm512_cvtph_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_maskz_compress_epi32, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_epi32, _mm512_sub_ps,
};

/// Half conversions by F16C, eight at a time. Only the two modules below name it, inside functions with that feature.
struct F16c;

impl Half for F16c {
    const FAST: bool = true;

    #[inline(always)]
    fn load(source: &[[u8; 2]], destination: &mut [f32]) {
        let (blocks, rest) = source.as_chunks::<8>();
        let (outputs, output_rest) = destination.as_chunks_mut::<8>();
        for (output, block) in outputs.iter_mut().zip(blocks) {
            // SAFETY: the callers below are compiled with F16C and reached only after its detection; the arrays
            // are 16 and 32 bytes long, and the accesses are the unaligned ones.
            unsafe {
                let halves = _mm_loadu_si128(block.as_ptr().cast());
                _mm256_storeu_ps(output.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        Portable::load(rest, output_rest);
    }

    #[inline(always)]
    fn store(source: &[f32], destination: &mut [[u8; 2]]) {
        let (blocks, rest) = source.as_chunks::<8>();
        let (outputs, output_rest) = destination.as_chunks_mut::<8>();
        for (output, block) in outputs.iter_mut().zip(blocks) {
            // SAFETY: as in `load`.
            unsafe {
                let halves =
                    _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(block.as_ptr()));
                _mm_storeu_si128(output.as_mut_ptr().cast(), halves);
            }
        }
        Portable::store(rest, output_rest);
    }
}

/// As [`F16c`], but sixteen at a time where halves are loaded: what reads the numbers as whole vectors finds them stored so.
struct Wide;

impl Half for Wide {
    const FAST: bool = true;

    #[inline(always)]
    fn load(source: &[[u8; 2]], destination: &mut [f32]) {
        let (blocks, rest) = source.as_chunks::<16>();
        let (outputs, output_rest) = destination.as_chunks_mut::<16>();
        for (output, block) in outputs.iter_mut().zip(blocks) {
            // SAFETY: only functions with AVX-512F call it, which are reached after its detection; the arrays are 32 and
            // 64 bytes long, and the accesses are the unaligned ones.
            unsafe {
                let halves = _mm256_loadu_si256(block.as_ptr().cast());
                _mm512_storeu_ps(output.as_mut_ptr(), _mm512_cvtph_ps(halves));
            }
        }
        F16c::load(rest, output_rest);
    }

    #[inline(always)]
    fn store(source: &[f32], destination: &mut [[u8; 2]]) {
        F16c::store(source, destination);
    }
}

/// [`generic::collect_between`] by AVX-512, which the compiler does not find by itself: it compresses vectors.
pub(super) fn collect_between(
    values: &[f32],
    base: Option<&[f32]>,
    low: u32,
    width: u32,
    found: &mut [u32],
) -> (usize, u32) {
    // SAFETY: `Kernels::of` hands this out only for a level that `Level::available` detected.
    unsafe {
        match base {
            Some(base) => collect_differences(values, base, low, width, found),
            None => collect_values(values, low, width, found),
        }
    }
}

/// Values that are looked at together.
type Block = [f32; COLLECT_MARGIN];

#[target_feature(enable = "avx512f,popcnt")]
fn collect_values(values: &[f32], low: u32, width: u32, found: &mut [u32]) -> (usize, u32) {
    let (blocks, rest) = values.as_chunks::<COLLECT_MARGIN>();
    let mut collected = Collected::new(low, width, found);
    for block in blocks {
        collected.add(vector(block));
    }
    collected.finish(rest, None)
}

#[target_feature(enable = "avx512f,popcnt")]
fn collect_differences(
    values: &[f32],
    base: &[f32],
    low: u32,
    width: u32,
    found: &mut [u32],
) -> (usize, u32) {
    let (blocks, rest) = values.as_chunks::<COLLECT_MARGIN>();
    let (bases, base_rest) = base.as_chunks::<COLLECT_MARGIN>();
    let mut collected = Collected::new(low, width, found);
    for (block, base) in blocks.iter().zip(bases) {
        collected.add(_mm512_sub_ps(vector(block), vector(base)));
    }
    collected.finish(rest, Some(base_rest))
}

#[inline]
#[target_feature(enable = "avx512f,popcnt")]
fn vector(block: &Block) -> __m512 {
    // SAFETY: a block has 16 elements of 4 bytes, and the load is the unaligned one.
    unsafe { _mm512_loadu_ps(block.as_ptr()) }
}

/// What has been collected of some vectors.
struct Collected<'a> {
    low: u32,
    width: u32,
    lows: __m512i,
    widths: __m512i,
    found: &'a mut [u32],
    count: usize,
    higher: u32,
}

impl<'a> Collected<'a> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(low: u32, width: u32, found: &'a mut [u32]) -> Self {
        let [lows, widths] = [low, width].map(|bits| _mm512_set1_epi32(bits.cast_signed()));
        Self { low, width, lows, widths, found, count: 0, higher: 0 }
    }

    #[inline]
    #[target_feature(enable = "avx512f,popcnt")]
    fn add(&mut self, values: __m512) {
        let magnitude = _mm512_set1_epi32(generic::MAGNITUDE.cast_signed());
        let bits = _mm512_and_si512(_mm512_castps_si512(values), magnitude);
        let offsets = _mm512_sub_epi32(bits, self.lows);
        let inside = _mm512_cmplt_epu32_mask(offsets, self.widths);
        self.higher += (_mm512_cmpge_epu32_mask(bits, self.lows) & !inside).count_ones();
        let packed = _mm512_maskz_compress_epi32(inside, offsets);
        let place = &mut self.found[self.count..self.count + COLLECT_MARGIN];
        // SAFETY: `place` has 16 elements of 4 bytes, and the store is the unaligned one.
        unsafe { _mm512_storeu_si512(place.as_mut_ptr().cast(), packed) };
        self.count += inside.count_ones() as usize;
    }

    #[inline(always)]
    fn finish(self, rest: &[f32], base: Option<&[f32]>) -> (usize, u32) {
        let Self { low, width, found, count, higher, .. } = self;
        let (more, above) = generic::collect_between(rest, base, low, width, &mut found[count..]);
        (count + more, higher + above)
    }
}

/// Vectors for thin products.
macro_rules! vector {
    ($vector:ty, $lanes:literal, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        // SAFETY: the intrinsics read and write one vector.
        unsafe impl Vector for $vector {
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller's.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller's.
                unsafe { $store(to, self) }
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                // SAFETY: the caller's.
                unsafe { $splat(value) }
            }

            #[inline(always)]
            unsafe fn plus_product(self, left: Self, right: Self) -> Self {
                // SAFETY: the caller's.
                unsafe { $fma(left, right, self) }
            }
        }
    };
}

vector!(__m256, 8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);
vector!(__m512, 16, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);

/// One module per level: safe entry points for the dispatch table around functions that have the features.
macro_rules! level {
    ($level:ident, $features:literal, $half:ident, $vector:ident, $rows:literal, $wide:literal) => {
        pub(super) mod $level {
            use super::{
                Code, Cross, Float, Groups, Models, Product, Sums, Thin, codes, generic, thin,
                updates,
            };
            use super::{$half, $vector};

            #[target_feature(enable = $features)]
            fn load_with(dtype: Float, source: &[u8], destination: &mut [f32]) {
                generic::load::<$half>(dtype, source, destination);
            }

            #[target_feature(enable = $features)]
            fn store_with(dtype: Float, source: &[f32], destination: &mut [u8]) -> bool {
                generic::store::<$half>(dtype, source, destination)
            }

            #[target_feature(enable = $features)]
            fn multiply_add_with(accumulator: &mut [f32], values: &[f32], weight: f32) {
                generic::multiply_add(accumulator, values, weight);
            }

            #[target_feature(enable = $features)]
            fn weighted_sum_with(out: &mut [f32], operands: &[&[f32]], weights: &[f32]) {
                generic::weighted_sum(out, operands, weights);
            }

            pub(in crate::kernels) fn weighted_sum(
                out: &mut [f32],
                operands: &[&[f32]],
                weights: &[f32],
            ) {
                // SAFETY: as in `load`.
                unsafe { weighted_sum_with(out, operands, weights) }
            }

            #[target_feature(enable = $features)]
            fn dot_with(left: &[f32], right: &[f32]) -> f64 {
                generic::dot(left, right)
            }

            #[target_feature(enable = $features)]
            fn add_product_with(values: &mut [f32], product: &Product<'_>) {
                generic::add_product(values, product);
            }

            #[target_feature(enable = $features)]
            fn add_thin_with(product: &mut Thin<'_>) {
                // SAFETY: `Kernels::add_thin` checks that the product fits; the features are this function's.
                unsafe { thin::add::<$vector, $rows, $wide>(product) }
            }

            #[target_feature(enable = $features)]
            fn add_cross_with(product: &mut Cross<'_>) {
                thin::add_cross(product);
            }

            pub(in crate::kernels) fn add_cross(product: &mut Cross<'_>) {
                // SAFETY: as in `load`.
                unsafe { add_cross_with(product) }
            }

            #[target_feature(enable = $features)]
            fn updates_with(
                models: &Models<'_>,
                v: &mut [f32],
                delta: &mut [f32],
                sums: Option<&mut Sums>,
            ) {
                updates::updates(models, v, delta, sums);
            }

            pub(in crate::kernels) fn updates(
                models: &Models<'_>,
                v: &mut [f32],
                delta: &mut [f32],
                sums: Option<&mut Sums>,
            ) {
                // SAFETY: as in `load`.
                unsafe { updates_with(models, v, delta, sums) }
            }

            pub(in crate::kernels) fn add_thin(product: &mut Thin<'_>) {
                // SAFETY: as in `load`.
                unsafe { add_thin_with(product) }
            }

            #[target_feature(enable = $features)]
            fn decode_with(
                code: Code,
                bytes: &[u8],
                middle: bool,
                groups: Option<&Groups<'_>>,
                out: &mut [f32],
            ) {
                codes::decode::<$half>(code, bytes, middle, groups, out);
            }

            #[target_feature(enable = $features)]
            fn encode_with(
                code: Code,
                values: &[f32],
                groups: Option<&Groups<'_>>,
                out: &mut [u8],
            ) {
                codes::encode(code, values, groups, out);
            }

            #[target_feature(enable = $features)]
            fn amax_with(values: &[f32]) -> f32 {
                codes::amax(values)
            }

            pub(in crate::kernels) fn decode(
                code: Code,
                bytes: &[u8],
                middle: bool,
                groups: Option<&Groups<'_>>,
                out: &mut [f32],
            ) {
                // SAFETY: as in `load`.
                unsafe { decode_with(code, bytes, middle, groups, out) }
            }

            pub(in crate::kernels) fn encode(
                code: Code,
                values: &[f32],
                groups: Option<&Groups<'_>>,
                out: &mut [u8],
            ) {
                // SAFETY: as in `load`.
                unsafe { encode_with(code, values, groups, out) }
            }

            pub(in crate::kernels) fn amax(values: &[f32]) -> f32 {
                // SAFETY: as in `load`.
                unsafe { amax_with(values) }
            }

            #[target_feature(enable = $features)]
            fn run_with<R>(work: impl FnOnce() -> R) -> R {
                work()
            }

            #[inline(always)]
            pub(in crate::kernels) fn run<R>(work: impl FnOnce() -> R) -> R {
                // SAFETY: as in `load`; `Kernels::run` asks the level, which only `Kernels::of` sets.
                unsafe { run_with(work) }
            }

            pub(in crate::kernels) fn load(dtype: Float, source: &[u8], destination: &mut [f32]) {
                // SAFETY: `Kernels::of` hands this out only for a level that `Level::available` detected.
                unsafe { load_with(dtype, source, destination) }
            }

            pub(in crate::kernels) fn store(
                dtype: Float,
                source: &[f32],
                destination: &mut [u8],
            ) -> bool {
                // SAFETY: as in `load`.
                unsafe { store_with(dtype, source, destination) }
            }

            pub(in crate::kernels) fn multiply_add(
                accumulator: &mut [f32],
                values: &[f32],
                weight: f32,
            ) {
                // SAFETY: as in `load`.
                unsafe { multiply_add_with(accumulator, values, weight) }
            }

            pub(in crate::kernels) fn dot(left: &[f32], right: &[f32]) -> f64 {
                // SAFETY: as in `load`.
                unsafe { dot_with(left, right) }
            }

            pub(in crate::kernels) fn add_product(values: &mut [f32], product: &Product<'_>) {
                // SAFETY: as in `load`.
                unsafe { add_product_with(values, product) }
            }
        }
    };
}

level!(avx2, "avx2,fma,f16c", F16c, __m256, 4, 3);
level!(avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c", Wide, __m512, 8, 3);
