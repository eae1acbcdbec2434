//! Scales of quantised output tensors that were found while codes were written, for the tensor that holds the scales.
//!
//! It mostly follows at once. What was forgotten meanwhile is found again, by computing the numbers a second time.

use crate::plan::EncodedTarget;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tensors whose scales are kept.
const TENSORS: usize = 8;
/// Bytes of the scales of a tensor from which on none are kept.
const MOST: usize = 16 << 20;

/// Scales of the tensors that workers were in lately.
#[derive(Debug, Default)]
pub(super) struct RecentScales(Mutex<VecDeque<(Name, Arc<TensorScales>)>>);

/// Source and name of the input that a tensor is encoded like: no two output tensors have the same.
type Name = (Arc<str>, String);

/// Scales of one tensor.
#[derive(Debug)]
pub(super) struct TensorScales {
    /// Bytes of a band's scales.
    width: usize,
    known: Mutex<Known>,
    /// Held by whoever goes through a band that is too large to be held: others need the same.
    pub measuring: Mutex<()>,
}

#[derive(Debug)]
struct Known {
    bytes: Vec<u8>,
    bands: Vec<bool>,
}

impl RecentScales {
    /// Those of a tensor.
    pub(super) fn of(&self, target: &EncodedTarget) -> Arc<TensorScales> {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, scales)) = recent.iter().find(|(name, _)| *name == target.name) {
            return Arc::clone(scales);
        }
        while recent.len() >= TENSORS {
            recent.pop_front();
        }
        let scales = Arc::new(TensorScales::new(target));
        recent.push_back((target.name.clone(), Arc::clone(&scales)));
        scales
    }
}

impl TensorScales {
    fn new(target: &EncodedTarget) -> Self {
        let (width, bands) = (target.like.band.scale_bytes(), target.all_bands());
        let bands = if width * bands > MOST { 0 } else { bands };
        let known = Known { bytes: vec![0; width * bands], bands: vec![false; bands] };
        Self { width, known: Mutex::new(known), measuring: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, band: usize) -> Range<usize> {
        band * self.width..(band + 1) * self.width
    }

    /// Copies the scales of a band; false if they are not known.
    pub(super) fn get(&self, band: usize, out: &mut [u8]) -> bool {
        let known = self.lock();
        if known.bands.get(band) != Some(&true) {
            return false;
        }
        out.copy_from_slice(&known.bytes[self.place(band)]);
        true
    }

    /// Keeps the scales of a band.
    pub(super) fn put(&self, band: usize, scales: &[u8]) {
        let mut known = self.lock();
        if band < known.bands.len() {
            known.bytes[self.place(band)].copy_from_slice(scales);
            known.bands[band] = true;
        }
    }
}
