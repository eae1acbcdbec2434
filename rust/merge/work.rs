//! Geometry: how output files are cut into tiles, tensors into chunks, and which parts of tensors lie in a tile.

use crate::dtype::Float;
use crate::plan::layout::Layout;
use crate::{Error, Result};
use std::ops::Range;

/// Tiles and input windows of this size are where mapped reads and direct writes reach their full speed.
pub const DEFAULT_TILE: usize = 4 << 20;

/// Tiles must be whole blocks of any disk that takes direct writes.
pub(super) const TILE_ALIGNMENT: usize = 4096;

/// Elements that are held as f32 at a time: the buffers of several operands fit a first-level cache together.
pub(super) const SUB_TILE: usize = 2048;

/// Elements of a chunk of an observe pass, about.
pub(super) const CHUNK: usize = 1 << 20;

/// Elements after which a worker looks whether it is to stop: a chunk or a tile of a slow method takes long.
const PATIENCE: usize = 1 << 16;

/// Looks from time to time whether to stop.
pub(super) struct Watch<'a> {
    stopped: &'a dyn Fn() -> bool,
    elements: usize,
}

impl<'a> Watch<'a> {
    pub(super) fn new(stopped: &'a dyn Fn() -> bool) -> Self {
        Self { stopped, elements: 0 }
    }

    /// Called before so many elements are worked on.
    pub(super) fn pass(&mut self, elements: usize) -> Result<()> {
        self.elements += elements;
        if self.elements >= PATIENCE {
            self.elements = 0;
            if (self.stopped)() {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }
}

/// The elements of each chunk of a tensor; `row` is the length of rows that must be whole.
pub(super) fn chunks(elements: usize, row: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    let step = row.map_or(CHUNK, |row| CHUNK.next_multiple_of(row.max(1)));
    (0..elements).step_by(step).map(move |start| start..elements.min(start + step))
}

/// The elements that some bytes of a tensor are part of.
pub(super) fn elements_of(bytes: &Range<usize>, dtype: Float) -> Range<usize> {
    bytes.start / dtype.size()..bytes.end.div_ceil(dtype.size())
}

/// A tensor of which bytes lie in a span.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// The tensor's number in its file.
    pub tensor: usize,
    /// Those bytes of it, at least one.
    pub bytes: Range<usize>,
    /// Where they stand in the span.
    pub place: Range<usize>,
    /// Whether these are all its bytes.
    pub whole: bool,
}

/// The parts of a span of a file.
pub(super) fn parts(layout: &Layout, span: &Range<usize>) -> impl Iterator<Item = Part> {
    let span = span.clone();
    let first = layout.first_behind(span.start);
    (first..layout.len())
        .map(|tensor| (tensor, layout.range(tensor)))
        .take_while({
            let end = span.end;
            move |(_, range)| range.start < end
        })
        .filter_map(move |(tensor, range)| {
            let (start, stop) = (range.start.max(span.start), range.end.min(span.end));
            (start < stop).then(|| Part {
                tensor,
                bytes: start - range.start..stop - range.start,
                place: start - span.start..stop - span.start,
                whole: start == range.start && stop == range.end,
            })
        })
}

/// Copies those of the bytes `from` that lie in `part` to their places in `out`, which is that part.
pub(super) fn copy_wanted(from: &Range<usize>, bytes: &[u8], part: &Range<usize>, out: &mut [u8]) {
    let wanted = from.start.max(part.start)..from.end.min(part.end);
    out[wanted.start - part.start..wanted.end - part.start]
        .copy_from_slice(&bytes[wanted.start - from.start..wanted.end - from.start]);
}
