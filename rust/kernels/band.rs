//! Bands of quantised matrices: the rows that share scales, all their columns. What is decoded and encoded as one.

use super::{Groups, Kernels};
use crate::checkpoint::Encoding;
use crate::code::{Code, GlobalScale, ScaleType, scale_of};
use crate::dtype::Float;

/// The rows of a matrix that have their scales to themselves: as many as a block has (the last ones of a matrix may be
/// fewer), and all columns. Formats with groups within a row, or without scales, have bands of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// How a number is stored.
    pub code: Code,
    /// How a scale is stored; `None` if codes are the numbers themselves.
    pub scale_type: Option<ScaleType>,
    /// Rows of a full band.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Columns that share a scale; the last ones may be fewer.
    pub block: usize,
}

impl Band {
    /// The bands of a tensor.
    #[must_use]
    pub fn of(encoding: &Encoding) -> Self {
        let columns = encoding.columns();
        let (code, scales) = (encoding.code, encoding.scales.as_ref());
        Self {
            code,
            scale_type: scales.map(|scales| scales.scale_type),
            rows: scales.map_or(1, |scales| scales.blocks.rows),
            columns,
            block: scales.map_or(columns, |scales| scales.blocks.columns),
        }
    }

    /// Bytes of the codes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.code.bytes(self.columns)
    }

    /// Number of a band's scales; zero without scales.
    #[must_use]
    pub fn scales(&self) -> usize {
        self.scale_type.map_or(0, |_| self.columns.div_ceil(self.block))
    }

    /// Bytes of a band's scales.
    #[must_use]
    pub fn scale_bytes(&self) -> usize {
        self.scales() * self.scale_type.map_or(0, ScaleType::size)
    }

    /// What codes are multiplied by, from the bytes of scales: those of one band or of several. Nothing without scales.
    pub fn factors(
        &self,
        kernels: &Kernels,
        bytes: &[u8],
        global: Option<GlobalScale>,
        out: &mut [f32],
    ) {
        let Some(scale_type) = self.scale_type else { return };
        assert_eq!(bytes.len(), out.len() * scale_type.size());
        match scale_type {
            ScaleType::F32 => kernels.load(Float::F32, bytes, out),
            ScaleType::BF16 => kernels.load(Float::BF16, bytes, out),
            ScaleType::F16 => kernels.load(Float::F16, bytes, out),
            ScaleType::E4M3 => kernels.decode(Code::E4M3, bytes, 0, None, out),
            ScaleType::E8M0 => {
                for (factor, byte) in out.iter_mut().zip(bytes) {
                    *factor = scale_type.load(&[*byte]);
                }
            }
        }
        if let Some(global) = global {
            kernels.run(|| {
                for factor in out {
                    *factor = global.factor(*factor);
                }
            });
        }
    }

    /// Decodes whole rows of one band, whose factors these are: one rounding an element.
    pub fn decode(&self, kernels: &Kernels, codes: &[u8], factors: &[f32], out: &mut [f32]) {
        if self.columns == 0 {
            return;
        }
        let rows = out.chunks_mut(self.columns).zip(codes.chunks(self.row_bytes()));
        for (out, codes) in rows {
            self.decode_part(kernels, codes, 0, factors, out);
        }
    }

    /// Decodes a part of one row, from the column `start` on. `codes` begins with the byte that holds the code of that
    /// column; `factors` are all of the row.
    pub fn decode_part(
        &self,
        kernels: &Kernels,
        codes: &[u8],
        start: usize,
        factors: &[f32],
        out: &mut [f32],
    ) {
        let first = start % self.code.per_byte();
        if self.scale_type.is_none() || out.is_empty() {
            kernels.decode(self.code, codes, first, None, out);
            return;
        }
        // The first block may have begun before.
        let (begun, head) = (start / self.block, self.block - start % self.block);
        let blocks = 1 + out.len().saturating_sub(head).div_ceil(self.block);
        let factors = &factors[begun..begun + blocks];
        let groups = Groups { factors, first: head, columns: self.block };
        kernels.decode(self.code, codes, first, Some(&groups), out);
    }

    /// Raises `largest`, which begins with zeros, to the largest magnitudes of each block of columns in some rows of a
    /// band. A band may be gone through in parts.
    pub fn measure(&self, kernels: &Kernels, values: &[f32], largest: &mut [f32]) {
        if self.columns == 0 || self.scale_type.is_none() {
            return;
        }
        assert_eq!(largest.len(), self.scales());
        for row in values.chunks(self.columns) {
            for (largest, block) in largest.iter_mut().zip(row.chunks(self.block)) {
                let amax = kernels.amax(block);
                // By bits, so that NaN stays.
                *largest = f32::from_bits(largest.to_bits().max(amax.to_bits()));
            }
        }
    }

    /// Chooses the scales of a band by [`scale_of`] from the largest magnitudes, which are replaced by the factors.
    pub fn choose(&self, largest: &mut [f32], global: Option<GlobalScale>, scales: &mut [u8]) {
        let Some(scale_type) = self.scale_type else { return };
        let places = scales.chunks_exact_mut(scale_type.size());
        assert_eq!(places.len(), largest.len());
        for (amax, place) in largest.iter_mut().zip(places) {
            let scale = scale_of(self.code, scale_type, *amax, global);
            place.copy_from_slice(&scale.bytes[..place.len()]);
            *amax = scale.factor;
        }
    }

    /// Encodes whole rows of a band by its factors; the values must be finite.
    pub fn write(&self, kernels: &Kernels, values: &[f32], factors: &[f32], codes: &mut [u8]) {
        if self.columns == 0 {
            return;
        }
        let groups = Groups { factors, first: self.block, columns: self.block };
        let groups = self.scale_type.map(|_| &groups);
        let rows = values.chunks(self.columns).zip(codes.chunks_mut(self.row_bytes()));
        for (values, codes) in rows {
            kernels.encode(self.code, values, groups, codes);
        }
    }

    /// Encodes one whole band: its largest magnitudes, scales, codes. `factors` is as long as there are scales, and is
    /// overwritten.
    pub fn encode(
        &self,
        kernels: &Kernels,
        values: &[f32],
        global: Option<GlobalScale>,
        factors: &mut [f32],
        codes: &mut [u8],
        scales: &mut [u8],
    ) {
        factors.fill(0.0);
        self.measure(kernels, values, factors);
        self.choose(factors, global, scales);
        self.write(kernels, values, factors, codes);
    }
}
