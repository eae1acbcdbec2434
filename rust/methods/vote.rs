//! From scaled task vectors and their sum to the result: plain, or of those elements that have the elected sign.

use super::task_vectors::{Family, PART};

/// Below this a sum of weights does not divide.
const LEAST_DIVISOR: f32 = 1e-8;

impl Family {
    /// Turns the sums of scaled task vectors into the result.
    #[inline(always)]
    pub(super) fn conclude(&self, scaled: &[f32], base: &[f32], sums: &mut [f32]) {
        if self.votes {
            self.elect(scaled, base, sums);
            return;
        }
        if self.normalize {
            let sum: f32 = self.weights.iter().sum();
            let divisor = if sum.abs() < LEAST_DIVISOR { 1.0 } else { sum };
            sums.iter_mut().for_each(|sum| *sum /= divisor);
        }
        for (value, base) in sums.iter_mut().zip(base) {
            *value = base + *value * self.lambda;
        }
    }

    /// As [`Family::conclude`], of the elected sign alone.
    #[inline(always)]
    fn elect(&self, scaled: &[f32], base: &[f32], sums: &mut [f32]) {
        let (parts, rest) = scaled.as_chunks();
        if let (Ok(sums), Ok(base), []) =
            (<&mut [f32; PART]>::try_from(&mut *sums), <&[f32; PART]>::try_from(base), rest)
        {
            // So few rows are read side by side, all else staying in registers.
            match parts {
                [a] => return self.elect_rows([a], base, sums),
                [a, b] => return self.elect_rows([a, b], base, sums),
                [a, b, c] => return self.elect_rows([a, b, c], base, sums),
                _ => {}
            }
        }
        let signs: Vec<f32> = sums.iter().map(|&sum| sign(sum)).collect();
        let mut divisors = vec![0.0_f32; sums.len()];
        let rows = scaled.chunks_exact(sums.len().max(1)).zip(&*self.weights);
        sums.fill(0.0);
        for (row, &weight) in rows {
            let places = sums.iter_mut().zip(&mut divisors).zip(row.iter().zip(&signs));
            for ((total, divisor), (&value, &sign)) in places {
                vote(value, sign, weight, total, divisor);
            }
        }
        for ((total, &divisor), base) in sums.iter_mut().zip(&divisors).zip(base) {
            *total = self.finish(*total, divisor, *base);
        }
    }

    /// As [`Family::elect`], of `N` operands.
    #[inline(always)]
    fn elect_rows<const N: usize>(
        &self,
        rows: [&[f32; PART]; N],
        base: &[f32; PART],
        sums: &mut [f32; PART],
    ) {
        let Ok(weights) = <[f32; N]>::try_from(&*self.weights) else { return };
        for place in 0..PART {
            let sign = sign(sums[place]);
            let (mut total, mut divisor) = (0.0, 0.0);
            for (row, weight) in rows.iter().zip(weights) {
                vote(row[place], sign, weight, &mut total, &mut divisor);
            }
            sums[place] = self.finish(total, divisor, base[place]);
        }
    }

    /// The result from the total of those that agree and the sum of their weights.
    #[inline(always)]
    fn finish(&self, total: f32, divisor: f32, base: f32) -> f32 {
        let divisor = if self.normalize && divisor != 0.0 { divisor } else { 1.0 };
        base + total / divisor * self.lambda
    }
}

/// The sign that a sum elects; zero counts as positive.
#[inline(always)]
fn sign(sum: f32) -> f32 {
    if sum >= 0.0 { 1.0 } else { -1.0 }
}

/// Adds a value to the total, and its weight to the divisor, if it has the sign.
#[inline(always)]
fn vote(value: f32, sign: f32, weight: f32, total: &mut f32, divisor: &mut f32) {
    let agrees = value * sign > 0.0;
    *total += if agrees { value } else { 0.0 };
    *divisor += if agrees { weight } else { 0.0 };
}
