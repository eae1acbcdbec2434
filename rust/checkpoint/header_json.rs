//! The JSON of a header, handed on tensor by tensor without a tree in between.

use super::json::{Skipped, Text};
use super::limits::MOST_DIMENSIONS;
use crate::error::printable;
use safetensors::tensor::Dtype;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use std::fmt;

/// The one key of a header that is not a tensor's name.
const METADATA: &str = "__metadata__";

/// What a header says of every tensor.
const FIELDS: &[&str] = &["dtype", "shape", "data_offsets"];

/// Visits a header's JSON and calls the function for every tensor, until that returns false.
pub(super) struct Parser<'a>(pub &'a mut dyn FnMut(&str, &Described) -> bool);

impl<'de> Visitor<'de> for Parser<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata = false;
        while let Some(Text(name)) = map.next_key()? {
            if name == METADATA {
                if std::mem::replace(&mut metadata, true) {
                    return Err(A::Error::duplicate_field(METADATA));
                }
                map.next_value::<Option<Strings>>()?;
                continue;
            }
            let tensor = map.next_value_seed(Named(&name))?;
            if !(self.0)(&name, &tensor) {
                return Err(A::Error::custom("too much"));
            }
        }
        Ok(())
    }
}

/// What a header says of a tensor.
pub(super) struct Described {
    pub dtype: Dtype,
    pub shape: Shape,
    /// Counted from the end of the header.
    pub data_offsets: (usize, usize),
}

/// Dimensions; those beyond the most that are allowed are counted but not kept.
pub(super) struct Shape {
    rank: usize,
    dimensions: [usize; MOST_DIMENSIONS],
}

impl Shape {
    /// The dimensions, unless there are more than are allowed.
    pub(super) fn kept(&self) -> Option<&[usize]> {
        self.dimensions.get(..self.rank)
    }
}

/// Parses the entry of the tensor with this name, which an error then names.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = Described;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Described, D::Error> {
        deserializer
            .deserialize_struct("TensorInfo", FIELDS, DescribedVisitor)
            .map_err(|e| D::Error::custom(format_args!("tensor `{}`: {e}", printable(self.0))))
    }
}

#[derive(serde::Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    #[serde(other)]
    Other,
}

struct DescribedVisitor;

impl<'de> Visitor<'de> for DescribedVisitor {
    type Value = Described;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("dtype, shape and data_offsets")
    }

    /// As the crate `safetensors` reads it: in any order, other fields ignored.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Described, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key()? {
            let twice = match field {
                Field::Dtype => dtype.replace(map.next_value()?).is_some(),
                Field::Shape => shape.replace(map.next_value()?).is_some(),
                Field::DataOffsets => offsets.replace(map.next_value()?).is_some(),
                Field::Other => {
                    map.next_value::<Skipped>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom("a field stands twice"));
            }
        }
        Ok(Described {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            data_offsets: offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
        })
    }

    /// As the crate `safetensors` reads a list of the three.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Described, A::Error> {
        let missing = |length| A::Error::invalid_length(length, &self);
        Ok(Described {
            dtype: list.next_element()?.ok_or_else(|| missing(0))?,
            shape: list.next_element()?.ok_or_else(|| missing(1))?,
            data_offsets: list.next_element()?.ok_or_else(|| missing(2))?,
        })
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
        let mut shape = Shape { rank: 0, dimensions: [0; MOST_DIMENSIONS] };
        while let Some(dimension) = list.next_element()? {
            if let Some(place) = shape.dimensions.get_mut(shape.rank) {
                *place = dimension;
            }
            shape.rank += 1;
        }
        Ok(shape)
    }
}

/// A map of strings, checked and forgotten.
struct Strings;

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(StringsVisitor)
    }
}

struct StringsVisitor;

impl<'de> Visitor<'de> for StringsVisitor {
    type Value = Strings;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
        while map.next_entry::<Text<'de>, Text<'de>>()?.is_some() {}
        Ok(Strings)
    }
}
