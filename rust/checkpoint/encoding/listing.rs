//! Which stored tensors are tensors of the model, and which belong to another.

use super::claim::{may_hold_codes, with_scales};
use super::description::Encoding;
use super::fp8;
use super::parts::{Codes, logical_name, names_of_codes};
use crate::Result;
use crate::checkpoint::stored::{Stored, TensorId};

/// A tensor of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogicalTensor<'a> {
    /// Its name, also where it is stored under another.
    pub name: &'a str,
    /// Where it is stored, or its codes are.
    pub id: TensorId,
    /// Whether it is quantised.
    pub encoded: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// A tensor of the model, stored as it is.
    Plain,
    /// Codes of a quantised one.
    Codes,
    /// Belongs to a quantised one.
    Part,
}

/// The roles of all stored tensors: a byte each, or nothing if all are plain.
#[derive(Debug)]
pub(in crate::checkpoint) struct Listing {
    roles: Vec<Role>,
}

impl Listing {
    /// Finds all quantised tensors and checks that they are whole.
    pub(in crate::checkpoint) fn new(stored: &Stored) -> Result<Self> {
        let candidates: Vec<TensorId> =
            stored.ids().filter(|&id| may_hold_codes(stored.entry(id).1.dtype)).collect();
        if candidates.is_empty() {
            return Ok(Self { roles: Vec::new() });
        }
        let mut roles = vec![Role::Plain; stored.numbers()];
        let mut example = None;
        let mut found = false;
        for &id in &candidates {
            if let Some(encoding) = with_scales(&Codes::new(stored, id))? {
                encoding.stored().for_each(|part| roles[part.number()] = Role::Part);
                roles[id.number()] = Role::Codes;
                example = example.or(encoding.scales.map(|scales| scales.tensor));
                found = true;
            }
        }
        // What is left is plain FP8, or has lost its scales.
        for &id in &candidates {
            let codes = Codes::new(stored, id);
            if roles[id.number()] == Role::Plain
                && let Some(encoding) = fp8::plain(&codes)
            {
                if let Some(example) = example {
                    return Err(fp8::missing(&codes, stored.entry(example).1.name));
                }
                encoding.stored().for_each(|part| roles[part.number()] = Role::Part);
                roles[id.number()] = Role::Codes;
                found = true;
            }
        }
        Ok(Self { roles: if found { roles } else { Vec::new() } })
    }

    fn role(&self, id: TensorId) -> Role {
        self.roles.get(id.number()).copied().unwrap_or(Role::Plain)
    }

    /// The tensor of the model that is stored here, or whose codes are.
    pub(in crate::checkpoint) fn logical<'a>(
        &self,
        stored: &'a Stored,
        id: TensorId,
    ) -> Option<LogicalTensor<'a>> {
        let entry = stored.entry(id).1;
        match self.role(id) {
            Role::Plain => Some(LogicalTensor { name: entry.name, id, encoded: false }),
            Role::Codes => {
                let name = logical_name(entry.name, entry.dtype);
                Some(LogicalTensor { name, id, encoded: true })
            }
            Role::Part => None,
        }
    }

    /// The tensor of the model that has this name.
    pub(in crate::checkpoint) fn find<'a>(
        &self,
        stored: &'a Stored,
        name: &str,
    ) -> Option<LogicalTensor<'a>> {
        let found = |id: Option<TensorId>| {
            id.and_then(|id| self.logical(stored, id)).filter(|tensor| tensor.name == name)
        };
        found(stored.id(name)).or_else(|| {
            // Only quantised tensors are stored under other names.
            let names = (!self.roles.is_empty()).then(|| names_of_codes(name));
            names.into_iter().flatten().find_map(|codes| found(stored.id(&codes)))
        })
    }

    /// The encoding of the tensor whose codes are stored here.
    pub(in crate::checkpoint) fn encoding(
        &self,
        stored: &Stored,
        id: TensorId,
    ) -> Result<Option<Encoding>> {
        if self.role(id) != Role::Codes {
            return Ok(None);
        }
        let codes = Codes::new(stored, id);
        Ok(with_scales(&codes)?.or_else(|| fp8::plain(&codes)))
    }
}
