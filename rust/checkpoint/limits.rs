//! How much a checkpoint may hold.

/// Tensors of a checkpoint at most.
pub const MOST_TENSORS: usize = 1_000_000;

/// Dimensions of a tensor at most; PyTorch and numpy allow no more.
pub(super) const MOST_DIMENSIONS: usize = 64;
