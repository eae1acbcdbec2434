//! Parts of tensors: elements of an input in the order in which an operand has them, and the elements of an output that a
//! piece of it fills.

use super::schema;
use std::ops::Range;

/// Elements of a stored tensor, counted row by row, in the order of another shape: a slice, rows out of many, every second
/// column, a transposed matrix, one expert of a fused tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    start: usize,
    /// Extent and stride of each dimension; neighbours that make one long dimension are one.
    axes: Vec<Axis>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Axis {
    extent: usize,
    stride: usize,
}

/// Where the elements of the rows of a view lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A row is one run.
    Runs,
    /// The elements of a row lie apart by so many.
    Spread(usize),
    /// Rows are neighbours of each other: their elements lie so many apart, those of one row farther.
    Across(usize),
}

impl View {
    /// Checks what a plan says of a tensor of so many elements.
    ///
    /// # Errors
    /// A sentence if the view has no elements, or some that the tensor has not.
    pub(super) fn new(stated: &schema::View, elements: usize) -> Result<Self, String> {
        let schema::View { start, shape, strides } = stated;
        if shape.len() != strides.len() || shape.is_empty() || shape.contains(&0) {
            return Err(format!(
                "a view has the shape {shape:?} and the strides {strides:?}; it needs as many of both, and elements"
            ));
        }
        let last = shape.iter().zip(strides).try_fold(*start, |last, (extent, stride)| {
            (extent - 1).checked_mul(*stride).and_then(|offset| last.checked_add(offset))
        });
        let count = shape.iter().try_fold(1_usize, |count, &extent| count.checked_mul(extent));
        let repeats = shape.iter().zip(strides).any(|(&extent, &stride)| extent > 1 && stride == 0);
        if repeats || last.is_none_or(|last| last >= elements) || count.is_none_or(|n| n > elements)
        {
            return Err(format!(
                "a view from element {start} on of shape {shape:?} and strides {strides:?} does not lie within {elements} \
                 elements, each once"
            ));
        }
        let mut axes: Vec<Axis> = Vec::with_capacity(shape.len());
        for (&extent, &stride) in shape.iter().zip(strides).filter(|&(&extent, _)| extent > 1) {
            match axes.last_mut() {
                Some(last) if stride.checked_mul(extent) == Some(last.stride) => {
                    *last = Axis { extent: last.extent * extent, stride };
                }
                _ => axes.push(Axis { extent, stride }),
            }
        }
        if axes.is_empty() {
            axes.push(Axis { extent: 1, stride: 1 });
        }
        Ok(Self { start: *start, axes })
    }

    fn row_axis(&self) -> Axis {
        self.axes[self.axes.len() - 1]
    }

    /// Elements that follow one another at one stride; not the columns of the shape, where rows are one long run.
    #[must_use]
    pub fn row(&self) -> usize {
        self.row_axis().extent
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.axes.iter().map(|axis| axis.extent).product()
    }

    /// Never, see [`View::new`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where the elements of a row lie.
    #[must_use]
    pub fn order(&self) -> Order {
        let Axis { stride, .. } = self.row_axis();
        match self.axes.len().checked_sub(2).map(|place| self.axes[place]) {
            _ if stride == 1 => Order::Runs,
            Some(above) if above.stride < stride => Order::Across(above.stride),
            _ => Order::Spread(stride),
        }
    }

    /// Stride of the elements of a row.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.row_axis().stride
    }

    /// The place in the tensor of the first element of a row.
    #[must_use]
    pub fn row_start(&self, row: usize) -> usize {
        let (mut rest, mut place) = (row, self.start);
        for axis in self.axes[..self.axes.len() - 1].iter().rev() {
            place += rest % axis.extent * axis.stride;
            rest /= axis.extent;
        }
        place
    }

    /// How many rows after this one are its neighbours in an order [`Order::Across`], with itself.
    #[must_use]
    pub fn neighbours(&self, row: usize) -> usize {
        let extent = self.axes.len().checked_sub(2).map_or(1, |place| self.axes[place].extent);
        extent - row % extent
    }

    /// The elements of the tensor from the first to the last that these elements of the view lie at.
    #[must_use]
    pub fn bounds(&self, elements: &Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return self.start..self.start;
        }
        let row = self.row();
        let (first, last) = (elements.start / row, (elements.end - 1) / row);
        if first == last {
            let place = self.row_start(first);
            let stride = self.stride();
            return place + elements.start % row * stride
                ..place + (elements.end - 1) % row * stride + 1;
        }
        // Whole rows; with all dimensions that they cross, from their beginning to their end.
        let (mut low, mut high) = (self.start, self.start + (row - 1) * self.stride());
        let (mut first, mut last) = (first, last);
        let mut crossed = Vec::new();
        for axis in self.axes[..self.axes.len() - 1].iter().rev() {
            crossed.push((*axis, first % axis.extent, last % axis.extent));
            (first, last) = (first / axis.extent, last / axis.extent);
        }
        let mut apart = false;
        for (axis, first, last) in crossed.into_iter().rev() {
            let (least, most) = if apart { (0, axis.extent - 1) } else { (first, last) };
            apart |= first != last;
            low += least * axis.stride;
            high += most * axis.stride;
        }
        low..high + 1
    }
}

/// Elements of an output tensor that a piece fills, in ascending order: runs of one length that lie apart by a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    start: usize,
    run: usize,
    period: usize,
    repeats: usize,
}

impl Region {
    /// All of a tensor of so many elements.
    #[must_use]
    pub fn whole(elements: usize) -> Self {
        Self { start: 0, run: elements, period: elements.max(1), repeats: 1 }
    }

    /// What a view of an output tensor covers.
    ///
    /// # Errors
    /// A sentence if its elements are no runs of one length at one distance.
    pub(super) fn of(view: &View) -> Result<Self, String> {
        let View { start, ref axes } = *view;
        match *axes.as_slice() {
            [Axis { extent: run, stride: 1 }] => Ok(Self { start, run, period: run, repeats: 1 }),
            [Axis { extent: repeats, stride: period }] => {
                Ok(Self { start, run: 1, period, repeats })
            }
            [Axis { extent: repeats, stride: period }, Axis { extent: run, stride: 1 }]
                if run <= period =>
            {
                Ok(Self { start, run, period, repeats })
            }
            _ => Err("a piece of it is no row of runs of one length at one distance".to_owned()),
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.run * self.repeats
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is one run.
    #[must_use]
    pub fn is_run(&self) -> bool {
        self.repeats == 1
    }

    /// The place in the tensor of one of its elements.
    #[must_use]
    pub fn place(&self, element: usize) -> usize {
        self.start + element / self.run * self.period + element % self.run
    }

    /// How many of its elements lie before this place of the tensor.
    #[must_use]
    pub fn before(&self, place: usize) -> usize {
        let Some(offset) = place.checked_sub(self.start) else { return 0 };
        (offset / self.period * self.run + (offset % self.period).min(self.run)).min(self.len())
    }

    /// The elements of it that lie within these of the tensor.
    #[must_use]
    pub fn within(&self, elements: &Range<usize>) -> Range<usize> {
        self.before(elements.start)..self.before(elements.end)
    }

    /// Writes `values`, which are its elements from `first` on, to their places in `out`, which begins at element `origin`
    /// of the tensor and holds all those places.
    pub fn scatter(&self, first: usize, values: &[f32], origin: usize, out: &mut [f32]) {
        if self.run == 1 {
            let start = self.place(first) - origin;
            for (value, place) in values.iter().zip(out[start..].iter_mut().step_by(self.period)) {
                *place = *value;
            }
            return;
        }
        let mut rest = values;
        let mut element = first;
        while !rest.is_empty() {
            let count = (self.run - element % self.run).min(rest.len());
            let (now, later) = rest.split_at(count);
            let place = self.place(element) - origin;
            out[place..place + count].copy_from_slice(now);
            (rest, element) = (later, element + count);
        }
    }

    /// Whether regions fill so many elements, each once. They are put into order.
    ///
    /// # Errors
    /// A sentence if not.
    pub(super) fn check_cover(regions: &[Self], elements: usize) -> Result<(), String> {
        let mut sorted: Vec<&Self> = regions.iter().collect();
        sorted.sort_unstable_by_key(|region| region.start);
        let mut rest = sorted.as_slice();
        let mut filled = 0;
        while let Some(first) = rest.first() {
            // Regions that share a period fill it together, one after another.
            let period = if first.repeats == 1 { first.run } else { first.period };
            let mut end = filled;
            let mut count = 0;
            for region in rest {
                let alike = region.repeats == first.repeats
                    && (region.repeats == 1 || region.period == first.period);
                if region.start != end || !alike || end - filled + region.run > period {
                    break;
                }
                end += region.run;
                count += 1;
                if end - filled == period {
                    break;
                }
            }
            let span = period.checked_mul(first.repeats).and_then(|span| filled.checked_add(span));
            match span {
                Some(span) if count > 0 && end - filled == period => filled = span,
                _ => {
                    return Err(format!(
                        "its pieces do not fill it: element {end} is left out, or filled twice"
                    ));
                }
            }
            rest = &rest[count..];
        }
        if filled == elements {
            return Ok(());
        }
        Err(format!("its pieces fill {filled} of its {elements} elements"))
    }
}
