//! `Pattern`: regular expressions of users and of files that nobody vouches for, searched in linear time.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use regex::{Regex, RegexBuilder};

/// Most bytes that an expression may compile to; counted repetitions would multiply without end.
const COMPILED_BYTES: usize = 4 << 20;

/// Deepest nesting of an expression; the parser of each level takes stack.
const NESTING: u32 = 50;

/// A regular expression without look-around and backreferences: the time of a search is linear in the name.
#[pyclass(frozen, module = "safemerge_fast._engine")]
pub struct Pattern {
    anywhere: Regex,
    whole: Regex,
}

#[pymethods]
impl Pattern {
    #[new]
    fn new(text: &str) -> PyResult<Self> {
        // The expression on its own first, so that a stray parenthesis cannot close the group around it.
        let anywhere = compile(text)?;
        // The line break ends a comment, which an expression that switches them on with (?x) may end with.
        let whole = compile(&format!("\\A(?:{text})\\z"))
            .or_else(|_| compile(&format!("\\A(?:{text}\n)\\z")))?;
        Ok(Self { anywhere, whole })
    }

    /// Whether the expression matches a part of the name.
    fn search(&self, name: &str) -> bool {
        self.anywhere.is_match(name)
    }

    /// Whether the expression matches the whole name.
    fn fullmatch(&self, name: &str) -> bool {
        self.whole.is_match(name)
    }
}

fn compile(text: &str) -> PyResult<Regex> {
    RegexBuilder::new(text)
        .size_limit(COMPILED_BYTES)
        .dfa_size_limit(COMPILED_BYTES)
        .nest_limit(NESTING)
        .build()
        .map_err(|error| PyValueError::new_err(reason(&error)))
}

/// Why an expression was refused, in one line: the crate's message draws the place below the expression.
fn reason(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(_) => {
            "it is too large when its repetitions are written out".to_owned()
        }
        _ => {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or("it is malformed").trim();
            last.strip_prefix("error: ").unwrap_or(last).to_owned()
        }
    }
}
