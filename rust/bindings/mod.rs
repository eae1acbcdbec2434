//! The Python surface, `safemerge_fast._engine`: few classes, coarse calls, the GIL released while work is done.

mod arguments;
mod checkpoint;
mod difference;
mod error;
mod interruption;
mod job;
mod methods;
mod pattern;
mod plan;
mod prepared;
mod remote;
mod sketch;

use crate::kernels::Level;
use pyo3::prelude::*;

/// The Rust engine: headers, mapped tensors, plans and their execution. Knows nothing of safety.
#[pymodule]
mod _engine {
    #[pymodule_export]
    use super::checkpoint::{Checkpoint, FileIdentity, Rows, TensorInfo};
    #[pymodule_export]
    use super::difference::{Block, Matrix};
    #[pymodule_export]
    use super::interruption::Watchdog;
    #[pymodule_export]
    use super::job::{JobDirectory, WrittenFile, fault_points, file_digest};
    #[pymodule_export]
    use super::methods::{MethodInfo, ParameterInfo, methods};
    #[pymodule_export]
    use super::pattern::Pattern;
    #[pymodule_export]
    use super::plan::{Mismatch, NonFinite, Plan, Progress, ShardFacts, Verification};
    #[pymodule_export]
    use super::prepared::{Prepared, commit_shard, committed_shards, open_shards, prepare_shard};
    #[pymodule_export]
    use super::remote::{fetch_small, list_directory, normal_url};
    #[pymodule_export]
    use super::simd_levels;
    #[pymodule_export]
    use super::sketch::{Columns, SketchMoments, ThinImages, thin_images};
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(_: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        #[cfg(feature = "faults")]
        super::job::set_faults_up();
        Ok(())
    }
}

/// Kernel versions that this processor can run, fastest first; the last is always "scalar".
#[pyfunction]
fn simd_levels() -> Vec<&'static str> {
    Level::available().into_iter().map(Level::name).collect()
}
