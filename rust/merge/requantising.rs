//! Quantised output tensors: their numbers are computed band by band (rows that share scales), the scales are chosen from
//! them, and codes are written. Rows that nothing changes keep their bytes.

use super::assembling::{Assembler, Work};
use super::reading::Reader;
use super::scales::{RecentScales, TensorScales};
use super::windows::{Part, Place};
use super::work::copy_wanted;
use crate::kernels::Kernels;
use crate::plan::{Change, Changes, EncodedPart, EncodedRows, EncodedTarget};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// Elements of a band that are held at a time; a larger one is gone through twice.
pub(super) const HELD: usize = 3 << 20;
/// Elements whose change is measured at a time.
pub(super) const COMPARED: usize = 1 << 16;

/// Writes quantised tensors for one worker.
#[derive(Debug)]
pub(super) struct Requantiser {
    kernels: Kernels,
    reader: Reader,
    recent: Arc<RecentScales>,
    values: Vec<f32>,
    before: Vec<f32>,
    wanted: Vec<f32>,
    after: Vec<f32>,
    factors: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<u8>,
    /// By the tensor's name in the input that it is encoded like; whoever asks takes them over.
    pub changes: Changes,
}

impl Requantiser {
    pub(super) fn new(kernels: Kernels, recent: Arc<RecentScales>) -> Self {
        Self {
            kernels,
            reader: Reader::new(kernels),
            recent,
            values: Vec::new(),
            before: Vec::new(),
            wanted: Vec::new(),
            after: Vec::new(),
            factors: Vec::new(),
            codes: Vec::new(),
            scales: Vec::new(),
            changes: Changes::new(),
        }
    }

    /// Fills `out` with the bytes `part` of an output tensor. Calls `read` with elements whose operands have been read.
    ///
    /// # Errors
    /// Those of [`Assembler::numbers`], and of reading the input.
    pub(super) fn fill(
        &mut self,
        assembler: &mut Assembler,
        work: &Work<'_>,
        target: &EncodedTarget,
        part: &Range<usize>,
        out: &mut [u8],
        mut read: impl FnMut(&Range<usize>),
    ) -> Result<()> {
        self.reader.clear();
        let known = self.recent.of(target);
        let columns = target.like.band.columns;
        for band in target.bands_of(part) {
            let band = target.band(band);
            let elements = band.rows.start * columns..band.rows.end * columns;
            let kept = work.assembly.keeps(&elements);
            match target.part {
                EncodedPart::Codes => {
                    let rows = target.rows_of(part, &band);
                    let width = target.like.band.row_bytes();
                    let bytes = rows.start * width..rows.end * width;
                    if kept {
                        let wanted = bytes.start.max(part.start)..bytes.end.min(part.end);
                        let place = wanted.start - part.start..wanted.end - part.start;
                        target.codes.read(&wanted, &mut out[place])?;
                        continue;
                    }
                    let cut = (&rows, part);
                    if part.start <= bytes.start && bytes.end <= part.end {
                        let out = &mut out[bytes.start - part.start..bytes.end - part.start];
                        self.write_codes(
                            assembler, work, target, &known, &band, cut, out, &mut read,
                        )?;
                    } else {
                        let mut codes = std::mem::take(&mut self.codes);
                        codes.resize(bytes.len(), 0);
                        let all = &mut codes;
                        self.write_codes(
                            assembler, work, target, &known, &band, cut, all, &mut read,
                        )?;
                        copy_wanted(&bytes, &codes, part, out);
                        self.codes = codes;
                    }
                    read(&(rows.start * columns..rows.end * columns));
                }
                EncodedPart::Scales => {
                    let width = target.like.band.scale_bytes();
                    let bytes = band.band * width..(band.band + 1) * width;
                    self.scales.resize(width, 0);
                    if kept && let Some(scales) = &target.like.scales {
                        scales.read(&bytes, &mut self.scales)?;
                    } else if self.find_scales(assembler, work, target, &known, &band, &mut read)? {
                        read(&elements);
                    }
                    copy_wanted(&bytes, &self.scales, part, out);
                }
            }
        }
        Ok(())
    }

    /// Writes the codes of those rows of a band that some bytes of the tensor are of to `out`, which holds just these rows.
    #[expect(clippy::too_many_arguments, reason = "what, where, and who is told")]
    fn write_codes(
        &mut self,
        assembler: &mut Assembler,
        work: &Work<'_>,
        target: &EncodedTarget,
        known: &TensorScales,
        band: &EncodedRows,
        (rows, bytes): (&Range<usize>, &Range<usize>),
        out: &mut [u8],
        read: &mut impl FnMut(&Range<usize>),
    ) -> Result<()> {
        let quantised = &target.like.band;
        let columns = quantised.columns;
        let held = self.find_scales(assembler, work, target, known, band, read)?;
        self.factors.resize(quantised.scales(), 0.0);
        let global = target.like.global(band.matrix)?;
        quantised.factors(&self.kernels, &self.scales, global, &mut self.factors);
        let mut values = std::mem::take(&mut self.values);
        let step = (COMPARED / columns.max(1)).max(1);
        for start in rows.clone().step_by(step) {
            let part = start..rows.end.min(start + step);
            let place = if held { part.start - band.rows.start } else { 0 } * columns;
            let values = {
                let length = part.len() * columns;
                values.resize(values.len().max(place + length), 0.0);
                &mut values[place..place + length]
            };
            let elements = part.start * columns..part.end * columns;
            if !held {
                let look = quantised.scales() == 0;
                assembler.numbers(work, &elements, look, values)?;
            }
            if quantised.scales() == 0 && !self.kernels.amax(values).is_finite() {
                return Err(unstorable(work));
            }
            // A row that two tiles cut counts for the one that it begins in.
            let counted: Vec<usize> = part
                .clone()
                .filter(|&row| target.compares(row) && row * quantised.row_bytes() >= bytes.start)
                .collect();
            let row_of =
                |row: usize| (row - part.start) * columns..(row - part.start + 1) * columns;
            let length = counted.len() * columns;
            self.before.resize(self.before.len().max(length), 0.0);
            self.wanted.resize(self.wanted.len().max(length), 0.0);
            self.after.resize(columns, 0.0);
            let mut change = Change::default();
            let places = self.before.chunks_exact_mut(columns.max(1));
            let differences = self.wanted.chunks_exact_mut(columns.max(1));
            for ((&row, before), wanted) in counted.iter().zip(places).zip(differences) {
                let place = Place::new(0, Part::Matrix);
                let elements = row * columns..(row + 1) * columns;
                self.reader.load_codes(place, &target.codes, &target.like, elements, before)?;
                wanted.copy_from_slice(&values[row_of(row)]);
                change.wanted += distance(&self.kernels, wanted, before);
            }
            let width = quantised.row_bytes();
            let codes = &mut out[(part.start - rows.start) * width..][..part.len() * width];
            quantised.write(&self.kernels, values, &self.factors, codes);
            let places = self.before.chunks_exact(columns.max(1));
            let differences = self.wanted.chunks_exact(columns.max(1));
            for ((&row, before), wanted) in counted.iter().zip(places).zip(differences) {
                let codes = &codes[(row - part.start) * width..][..width];
                quantised.decode(&self.kernels, codes, &self.factors, &mut self.after);
                change.stored += distance(&self.kernels, &mut self.after, before);
                change.along += self.kernels.dot(&self.after, wanted);
            }
            match self.changes.get_mut(&target.name.1) {
                Some(total) => total.add(change),
                None if counted.is_empty() => {}
                None => drop(self.changes.insert(target.name.1.clone(), change)),
            }
        }
        self.values = values;
        Ok(())
    }

    /// Finds the scales of a band. True if its numbers had to be computed and are all held now.
    fn find_scales(
        &mut self,
        assembler: &mut Assembler,
        work: &Work<'_>,
        target: &EncodedTarget,
        known: &TensorScales,
        band: &EncodedRows,
        read: &mut impl FnMut(&Range<usize>),
    ) -> Result<bool> {
        let quantised = &target.like.band;
        self.scales.resize(quantised.scale_bytes(), 0);
        if quantised.scales() == 0 || known.get(band.band, &mut self.scales) {
            return Ok(false);
        }
        let columns = quantised.columns;
        let step = (HELD / columns.max(1)).max(1);
        let held = band.rows.len() <= step;
        let _measuring =
            (!held).then(|| known.measuring.lock().unwrap_or_else(PoisonError::into_inner));
        if !held && known.get(band.band, &mut self.scales) {
            return Ok(false);
        }
        self.factors.clear();
        self.factors.resize(quantised.scales(), 0.0);
        for start in band.rows.clone().step_by(step) {
            let rows = start..band.rows.end.min(start + step);
            let elements = rows.start * columns..rows.end * columns;
            self.values.resize(self.values.len().max(elements.len()), 0.0);
            let values = &mut self.values[..elements.len()];
            assembler.numbers(work, &elements, false, values)?;
            quantised.measure(&self.kernels, values, &mut self.factors);
            if !held {
                read(&elements);
            }
        }
        if self.factors.iter().any(|amax| !amax.is_finite()) {
            let elements = band.rows.start * columns..band.rows.end * columns;
            return Err(self.explain_nonfinite(assembler, work, elements));
        }
        let global = target.like.global(band.matrix)?;
        quantised.choose(&mut self.factors, global, &mut self.scales);
        known.put(band.band, &self.scales);
        Ok(held)
    }

    /// The error that numbers of a band are not finite: they are computed again, and looked at closely.
    #[cold]
    fn explain_nonfinite(
        &mut self,
        assembler: &mut Assembler,
        work: &Work<'_>,
        elements: Range<usize>,
    ) -> Error {
        for start in elements.clone().step_by(COMPARED) {
            let part = start..elements.end.min(start + COMPARED);
            self.values.resize(self.values.len().max(part.len()), 0.0);
            let values = &mut self.values[..part.len()];
            if let Err(error) = assembler.numbers(work, &part, true, values) {
                return error;
            }
        }
        unstorable(work)
    }
}

/// ‖left - right‖²; `left` is their difference then.
fn distance(kernels: &Kernels, left: &mut [f32], right: &[f32]) -> f64 {
    kernels.multiply_add(left, right, -1.0);
    kernels.dot(left, left)
}

/// The error that numbers are not finite, where that was allowed: most formats cannot say it, and in the others all numbers
/// that share a scale would be lost.
#[cold]
fn unstorable(work: &Work<'_>) -> Error {
    Error::Merge {
        file: work.file.to_owned(),
        tensor: work.tensor.output.name.clone(),
        problem: "it would hold NaN or infinity, which cannot be quantised again; pass --encode bfloat16 to store \
                  it as numbers"
            .to_owned(),
    }
}
