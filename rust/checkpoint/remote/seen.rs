//! What a store says of an object.

/// What tells one content of an object from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct Seen {
    pub size: u64,
    /// When the object was stored, nanoseconds since the epoch.
    pub stored_ns: i64,
    pub etag: String,
    pub version: Option<String>,
}
