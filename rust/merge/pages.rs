//! Pages of mapped inputs that one worker has read, until they are given back: of small tensors many at once, since every
//! call costs as much as reading one of them, and the neighbours would have to be mapped again.

use crate::checkpoint::InputFile;
use crate::plan::Input;
use std::ops::Range;
use std::sync::Arc;

/// Bytes from which on a range is given back at once.
const ENOUGH: usize = 1 << 20;
/// Bytes between two ranges that are given back as one.
const NEAR: usize = 64 << 10;
/// Ranges that are looked after at a time.
const RANGES: usize = 16;

/// Ranges that have been read.
#[derive(Debug, Default)]
pub(super) struct Pages(Vec<(Arc<InputFile>, Range<usize>)>);

impl Pages {
    /// Some bytes of an input have been read and are not needed any more.
    pub(super) fn read(&mut self, input: &Input, bytes: &Range<usize>) {
        if bytes.len() >= ENOUGH {
            input.release(bytes);
            return;
        }
        let Ok(file) = input.file() else { return };
        let new = input.place(bytes);
        let near = |known: &Range<usize>| {
            new.start <= known.end.saturating_add(NEAR)
                && known.start <= new.end.saturating_add(NEAR)
        };
        // Codes and scales of a tensor are read in turn, and mostly lie in one file.
        let place = self.0.iter().position(|(of, known)| Arc::ptr_eq(of, file) && near(known));
        let Some(place) = place else {
            if self.0.len() >= RANGES {
                self.give_back();
            }
            self.0.push((Arc::clone(file), new));
            return;
        };
        let known = &mut self.0[place].1;
        *known = known.start.min(new.start)..known.end.max(new.end);
        if known.len() >= ENOUGH {
            let (file, range) = self.0.swap_remove(place);
            file.release(range);
        }
    }

    /// Gives all of them back, and lets the files go.
    pub(super) fn give_back(&mut self) {
        for (file, range) in self.0.drain(..) {
            file.release(range);
        }
    }
}
