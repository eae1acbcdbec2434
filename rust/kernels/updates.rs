//! What alignment and fine-tuning changed of a run of elements, and sums over it.

/// Sums that are kept side by side.
const LANES: usize = 16;

/// Elements that are summed in f32 before they go into an f64: a longer sum of numbers that were rounded to a narrow
/// type drifts.
pub const RUN: usize = 1024;

/// Sums over elements: of V², Δ², W² (aligned) and V·Δ.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// ‖V‖².
    pub v: f64,
    /// ‖Δ‖².
    pub delta: f64,
    /// ‖W‖² of aligned.
    pub weight: f64,
    /// ⟨V, Δ⟩.
    pub inner: f64,
}

/// The same run of elements of three models.
#[derive(Debug, Clone, Copy)]
pub struct Models<'a> {
    /// Before alignment.
    pub base: &'a [f32],
    /// After it.
    pub aligned: &'a [f32],
    /// After fine-tuning.
    pub finetuned: &'a [f32],
    /// Whether Δ is taken against base.
    pub against_base: bool,
}

/// Writes V = aligned - base and Δ of a run of at most [`RUN`] elements, and adds to their sums where they are wanted.
#[inline(always)]
pub(super) fn updates(
    models: &Models<'_>,
    v: &mut [f32],
    delta: &mut [f32],
    sums: Option<&mut Sums>,
) {
    match sums {
        Some(sums) => sums.take(models, v, delta),
        None => models.subtract(v, delta),
    }
}

impl Models<'_> {
    fn reference(&self) -> &[f32] {
        if self.against_base { self.base } else { self.aligned }
    }

    /// Writes V and Δ.
    #[inline(always)]
    fn subtract(&self, v: &mut [f32], delta: &mut [f32]) {
        for ((v, aligned), base) in v.iter_mut().zip(self.aligned).zip(self.base) {
            *v = aligned - base;
        }
        for ((delta, finetuned), reference) in
            delta.iter_mut().zip(self.finetuned).zip(self.reference())
        {
            *delta = finetuned - reference;
        }
    }
}

impl Sums {
    /// Writes V and Δ of a run of at most [`RUN`] elements, and adds their sums.
    #[inline(always)]
    fn take(&mut self, models: &Models<'_>, v: &mut [f32], delta: &mut [f32]) {
        let mut lanes = [[0.0_f32; LANES]; 4];
        let (base, base_rest) = models.base.as_chunks::<LANES>();
        let (aligned, aligned_rest) = models.aligned.as_chunks::<LANES>();
        let (finetuned, finetuned_rest) = models.finetuned.as_chunks::<LANES>();
        let (reference, reference_rest) = models.reference().as_chunks::<LANES>();
        let (v, v_rest) = v.as_chunks_mut::<LANES>();
        let (delta, delta_rest) = delta.as_chunks_mut::<LANES>();
        let blocks = base.iter().zip(aligned).zip(finetuned.iter().zip(reference));
        for (((base, aligned), (finetuned, reference)), (v, delta)) in
            blocks.zip(v.iter_mut().zip(delta))
        {
            add(&mut lanes, [base, aligned, finetuned, reference], v, delta);
        }
        let rests = [base_rest, aligned_rest, finetuned_rest, reference_rest];
        add(&mut lanes, rests, v_rest, delta_rest);
        let [v, delta, weight, inner] =
            lanes.map(|lanes| lanes.iter().map(|&sum| f64::from(sum)).sum::<f64>());
        self.v += v;
        self.delta += delta;
        self.weight += weight;
        self.inner += inner;
    }
}

/// Writes V and Δ of at most [`LANES`] elements, and adds each to the sums of its lane.
#[inline(always)]
fn add(
    lanes: &mut [[f32; LANES]; 4],
    [base, aligned, finetuned, reference]: [&[f32]; 4],
    v: &mut [f32],
    delta: &mut [f32],
) {
    for lane in 0..v.len() {
        let (x, y) = (aligned[lane] - base[lane], finetuned[lane] - reference[lane]);
        v[lane] = x;
        delta[lane] = y;
        lanes[0][lane] = x.mul_add(x, lanes[0][lane]);
        lanes[1][lane] = y.mul_add(y, lanes[1][lane]);
        lanes[2][lane] = aligned[lane].mul_add(aligned[lane], lanes[2][lane]);
        lanes[3][lane] = x.mul_add(y, lanes[3][lane]);
    }
}
