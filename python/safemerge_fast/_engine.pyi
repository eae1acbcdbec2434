"""The Rust engine: headers, mapped tensors, plans and their execution. Knows nothing of safety."""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict, final, type_check_only

__all__ = ["Checkpoint", "Output", "Plan", "Progress", "Rows", "TensorInfo", "__version__", "simd_levels"]

__version__: str
"""Version of the engine, the same as the package's."""

def simd_levels() -> list[str]:
    """Kernel versions that this processor can run, fastest first; the last is always "scalar"."""

@type_check_only
class FileIdentity(TypedDict):
    """What tells one shard from another without reading its data."""

    size: int
    mtime_ns: int
    header_digest: str

@type_check_only
class ShardFacts(TypedDict):
    """What happened to one output shard."""

    file: str
    bytes_written: int
    seconds: float
    write: Literal["direct", "buffered"]
    resumed: bool
    nonfinite_inputs: list[str]

@type_check_only
class Mismatch(TypedDict):
    """The first byte of one tensor (or of the header, then tensor is None) that differs from the plan."""

    file: str
    tensor: str | None
    offset: int

@type_check_only
class Verification(TypedDict):
    """What a verification looked at and found."""

    files: int
    bytes_checked: int
    bytes_total: int
    mismatches: list[Mismatch]

@final
class TensorInfo:
    """Name, dtype, shape and place of one tensor, from a header."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

@final
class Rows:
    """A read-only window on the bytes of some rows of a mapped tensor; numpy.asarray takes it without a copy."""

    @property
    def __array_interface__(self) -> dict[str, object]: ...
    def __len__(self) -> int: ...

@final
class Checkpoint:
    """The validated headers of a checkpoint directory or of one .safetensors file; data is mapped, never loaded."""

    def __new__(cls, path: str | PathLike[str]) -> Checkpoint: ...
    @property
    def path(self) -> str: ...
    @property
    def index(self) -> str | None: ...
    @property
    def files(self) -> list[str]: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: str, /) -> bool: ...
    def tensor(self, name: str) -> TensorInfo: ...
    def identity(self) -> dict[str, FileIdentity]: ...
    def rows(self, name: str, start: int, stop: int) -> Rows: ...
    def release(self, name: str) -> None: ...

@final
class Progress:
    """Counters that workers advance and any thread may poll; cancel() stops the work within a tile."""

    def __new__(cls) -> Progress: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def shards_done(self) -> int: ...
    @property
    def cancelled(self) -> bool: ...
    def cancel(self) -> None: ...

@final
class Output:
    """An output directory, locked, with a journal of the shards that are committed in it."""

    def __new__(
        cls,
        path: str | PathLike[str],
        *,
        inputs: Sequence[str | PathLike[str]] = ...,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Output: ...
    @property
    def path(self) -> str: ...
    @property
    def committed(self) -> list[str]: ...
    def write_file(self, name: str, data: bytes) -> None: ...
    def copy_file(self, source: str | PathLike[str], name: str) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...

@final
class Plan:
    """A validated plan: what every output tensor is made of."""

    def __new__(cls, json: str) -> Plan: ...
    @property
    def shards(self) -> list[str]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    def shard_digest(self, file: str) -> str: ...
    def execute(
        self,
        output: Output,
        *,
        shards: Sequence[str] | None = None,
        threads: int | None = None,
        memory_budget: int | None = None,
        tile_bytes: int | None = None,
        write: Literal["auto", "direct", "buffered"] = "auto",
        simd: str | None = None,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> list[ShardFacts]: ...
    def verify(
        self,
        directory: str | PathLike[str],
        *,
        shards: Sequence[str] | None = None,
        threads: int | None = None,
        simd: str | None = None,
        sample: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Verification: ...
