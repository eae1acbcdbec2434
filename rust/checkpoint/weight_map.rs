//! The `weight_map` of an index, compact: a million names in one string, and each file's name once.

use super::json::{Skipped, Text};
use super::limits::MOST_TENSORS;
use super::lookup::Lookup;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::HashMap;
use std::fmt;

/// Tensor name to shard file. Of a name that stands twice, the last file counts, as for every reader of JSON.
#[derive(Debug)]
pub(super) struct WeightMap {
    names: String,
    /// End of each name, and number of its file.
    places: Vec<(u32, u32)>,
    files: Vec<String>,
    lookup: Lookup,
}

impl WeightMap {
    /// The files, each once, in the order in which they are first named.
    pub(super) fn files(&self) -> &[String] {
        &self.files
    }

    /// The file of a tensor.
    pub(super) fn file(&self, name: &str) -> Option<&str> {
        let number = self.lookup.find(name, |number| name_of(&self.names, &self.places, number))?;
        Some(&self.files[self.places[number as usize].1 as usize])
    }

    /// All names and their files.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        (0..).zip(&self.places).filter_map(|(number, _)| {
            let name = name_of(&self.names, &self.places, number);
            Some((name, self.file(name)?))
        })
    }
}

fn name_of<'a>(names: &'a str, places: &[(u32, u32)], number: u32) -> &'a str {
    let number = number as usize;
    let start = number.checked_sub(1).map_or(0, |before| places[before].0);
    &names[start as usize..places[number].0 as usize]
}

/// An index. Such files carry more than the map (sizes, counts); nothing of that is needed or believed.
pub(super) struct Index {
    pub weight_map: WeightMap,
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let mut weight_map = None;
        while let Some(Text(key)) = map.next_key()? {
            if key == "weight_map" {
                weight_map = Some(map.next_value()?);
            } else {
                map.next_value::<Skipped>()?;
            }
        }
        let weight_map = weight_map.ok_or_else(|| A::Error::missing_field("weight_map"))?;
        Ok(Index { weight_map })
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut names = String::new();
        let mut places = Vec::new();
        let mut numbers: HashMap<String, u32> = HashMap::new();
        let mut files = Vec::new();
        while let Some((Text(name), Text(file))) = map.next_entry::<Text<'de>, Text<'de>>()? {
            if places.len() == MOST_TENSORS {
                let problem = format!("more than {MOST_TENSORS} tensors, the most allowed");
                return Err(A::Error::custom(problem));
            }
            let number = match numbers.get(&*file) {
                Some(&number) => number,
                None => {
                    let number = u32::try_from(files.len()).map_err(A::Error::custom)?;
                    numbers.insert(file.clone().into_owned(), number);
                    files.push(file.into_owned());
                    number
                }
            };
            names.push_str(&name);
            places.push((u32::try_from(names.len()).map_err(A::Error::custom)?, number));
        }
        let mut lookup = Lookup::with_capacity(places.len());
        for (number, _) in (0..).zip(&places) {
            let name = name_of(&names, &places, number);
            lookup.insert(name, number, |number| name_of(&names, &places, number));
        }
        Ok(WeightMap { names, places, files, lookup })
    }
}
