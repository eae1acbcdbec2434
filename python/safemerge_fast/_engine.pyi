"""The Rust engine: headers, mapped tensors, plans and their execution. Knows nothing of safety."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, final

__all__ = [
    "Block",
    "Checkpoint",
    "Columns",
    "FileIdentity",
    "JobDirectory",
    "Matrix",
    "MethodInfo",
    "Mismatch",
    "NonFinite",
    "ParameterInfo",
    "Pattern",
    "Plan",
    "Prepared",
    "Progress",
    "Rows",
    "ShardFacts",
    "SketchMoments",
    "TensorInfo",
    "ThinImages",
    "Verification",
    "Watchdog",
    "WrittenFile",
    "__version__",
    "commit_shard",
    "committed_shards",
    "fault_points",
    "fetch_small",
    "file_digest",
    "list_directory",
    "methods",
    "normal_url",
    "open_shards",
    "prepare_shard",
    "simd_levels",
    "thin_images",
]

__version__: str
"""Version of the engine, the same as the package's."""

@final
class ParameterInfo:
    """A parameter of a merge method."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Literal["shared", "operand"]:
        """Whether it has one value, or one for each operand."""
    @property
    def kind(self) -> Literal["number", "integer", "flag", "choice"]: ...
    @property
    def required(self) -> bool:
        """Whether it must be given."""
    @property
    def default(self) -> float | int | bool | str | None:
        """The value where none is given; None if it must be given."""
    @property
    def least(self) -> float | None:
        """The least number; None if there is none."""
    @property
    def most(self) -> float | None:
        """The largest number; None if there is none."""
    @property
    def choices(self) -> list[str]:
        """The words of a choice; the first is the default."""
    @property
    def help(self) -> str:
        """One sentence or two."""

@final
class MethodInfo:
    """A merge method: what it is called, what it needs, which parameters it takes, and what holds of it."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def reference(self) -> str:
        """Address of the paper or page that describes it."""
    @property
    def base(self) -> Literal["none", "optional", "required"]: ...
    @property
    def least_operands(self) -> int:
        """The fewest models it merges, the base not counted."""
    @property
    def most_operands(self) -> int | None:
        """The most; None if any number will do."""
    @property
    def passes(self) -> int:
        """How often inputs are read at most before they are blended."""
    @property
    def parameters(self) -> list[ParameterInfo]:
        """Its parameters, those of operands first."""
    @property
    def interpolates(self) -> str | None:
        """The shared parameter that leads from the base (0) to the one operand (1), if it interpolates so."""
    @property
    def weighs(self) -> bool:
        """Whether it weighs models against each other: by a weight of each, or by interpolation."""
    @property
    def votes(self) -> bool:
        """Whether elements vote on their sign, so that a lone update always wins."""
    @property
    def sole(self) -> bool:
        """Whether mergekit, given one model only, takes that model's tensor as it is."""
    @property
    def copies(self) -> bool:
        """Whether it gives its one operand unchanged, by default."""
    @property
    def sums(self) -> bool:
        """Whether it is a weighted sum, so that weights of operands that share a tensor may be added up."""
    @property
    def thins(self) -> bool:
        """Whether it keeps random elements of task vectors, scales them up and adds them."""

def methods() -> list[MethodInfo]:
    """Every merge method."""

def file_digest(path: str | PathLike[str]) -> str:
    """BLAKE3 of a regular file's bytes, hexadecimal.

    Raises:
        CheckpointError: It cannot be read.
    """

def normal_url(url: str) -> str:
    """An address as plans and reports have it.

    Raises:
        CheckpointError: It is not one that models are read from, or holds a user, a password or a query.
    """

def list_directory(url: str) -> list[tuple[str, int]]:
    """Names and sizes of the objects of a directory in a store; of a plain server those of the usual weights alone.

    Raises:
        CheckpointError: There is none, or the store does not give it.
    """

def fetch_small(url: str, names: list[str], directory: str, *, most: int) -> list[str]:
    """Copies small files of a directory in a store or on a server into a local one.

    Args:
        url: The address of the directory.
        names: Their names.
        directory: Where they are written.
        most: Bytes that one may have.

    Returns:
        The names of those that were there.

    Raises:
        CheckpointError: The store does not give one, or one has more bytes.
    """

def fault_points() -> list[str]:
    """The names of the engine's fail points; none in a build without the feature `faults`."""

def simd_levels() -> list[str]:
    """Kernel versions that this processor can run, fastest first; the last is always "scalar"."""

@final
class FileIdentity:
    """What was seen of a shard when its header was read. Equal if all of it is."""

    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def mtime_ns(self) -> int:
        """Modification time, nanoseconds since the epoch."""
    @property
    def ctime_ns(self) -> int:
        """Time of the inode's last change, nanoseconds since the epoch; nobody can set it back."""
    @property
    def inode(self) -> int: ...
    @property
    def device(self) -> int:
        """The device of the inode; other after a reboot."""
    @property
    def header_digest(self) -> str:
        """BLAKE3 of the length field and the header, hexadecimal."""
    @property
    def etag(self) -> str | None:
        """What a store calls this content; None of a file that lies here."""
    @property
    def version(self) -> str | None:
        """What a store with versions calls this one."""
    def to_dict(self) -> dict[str, int | str]:
        """As plans state it: size, mtime_ns, header_digest; of a file ctime_ns, inode; of an object etag, version."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class NonFinite:
    """An input tensor that was merged though it holds NaN or infinity. Equal places are equal and hash alike.

    Attributes:
        tensor: Its name.
        path: The file that it lies in.
    """

    @property
    def tensor(self) -> str: ...
    @property
    def path(self) -> str: ...
    def __hash__(self) -> int: ...

@final
class ShardFacts:
    """What happened to one output shard.

    Attributes:
        file: Its name.
        bytes_written: Bytes written; zero if it had been committed before.
        seconds: From its first tile to its commit.
        write: How it was written: past the page cache, through it, or as a clone of an input of the same bytes.
        resumed: Whether it had been committed before, so that nothing was done.
        nonfinite_inputs: Input tensors that were merged though they hold NaN or infinity, if that was allowed.
        survival: Of tensors that were quantised again, by name: ‖Q(W') - W‖ / ‖W' - W‖, what is stored of a change.
        retained: Of the same, by name: ⟨Q(W') - W, W' - W⟩ / ‖W' - W‖², the part of that along the change.
    """

    @property
    def file(self) -> str: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def write(self) -> Literal["direct", "buffered", "cloned"]: ...
    @property
    def resumed(self) -> bool: ...
    @property
    def nonfinite_inputs(self) -> list[NonFinite]: ...
    @property
    def survival(self) -> dict[str, float]: ...
    @property
    def retained(self) -> dict[str, float]: ...

@final
class Mismatch:
    """The first byte of a tile that differs from the plan.

    Attributes:
        file: The output file.
        tensor: The tensor that the byte belongs to; None for the header.
        offset: Its place in the file.
    """

    @property
    def file(self) -> str: ...
    @property
    def tensor(self) -> str | None: ...
    @property
    def offset(self) -> int: ...

@final
class Verification:
    """What a verification looked at and found.

    Attributes:
        files: Number of output files.
        bytes_checked: Bytes that were compared.
        bytes_total: Bytes of all those files.
        mismatches: Differences, at most one for each tile of 4 MiB, by file and offset.
    """

    @property
    def files(self) -> int: ...
    @property
    def bytes_checked(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...
    @property
    def mismatches(self) -> list[Mismatch]: ...

@final
class TensorInfo:
    """Name, dtype, shape and place of one tensor, from a header.

    A quantised tensor is spoken of as what it stands for. A reference into the checkpoint's tables, which it keeps
    alive; what is asked for is made then.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """As safetensors names it; of a quantised tensor that of the model it was made from, BF16."""
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def encoding(self) -> str | None:
        """The format of a quantised tensor, in words; None if the bytes are numbers of this dtype."""
    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors that it is made of: codes, scales, the global scale, what else speaks of it."""
    @property
    def scales(self) -> str | None:
        """Which of them holds scales; None if there are none."""
    @property
    def file(self) -> str:
        """The file that holds it, or its codes."""
    @property
    def nbytes(self) -> int:
        """Bytes of all that it is made of."""
    @property
    def parameters(self) -> int:
        """Number of elements."""

@final
class Rows:
    """The bytes of some rows of a tensor, read-only; numpy.asarray takes them without a copy.

    A window on the mapped file, or memory of its own where files are read by position.
    """

    @property
    def __array_interface__(self) -> dict[str, object]: ...
    def __len__(self) -> int: ...

@final
class Checkpoint:
    """The validated headers of a checkpoint directory or of one .safetensors file; data is opened when asked for."""

    def __new__(cls, path: str | PathLike[str], *, read_backend: str = "auto") -> Checkpoint:
        """Reads and checks all headers; nothing of the tensors' data.

        Args:
            path: A checkpoint directory, or one .safetensors file.
            read_backend: How the data is read when it is asked for.

        Raises:
            CheckpointError: There are no such weights, or a header or the index is not valid, or beyond a limit
                (1,000,000 tensors, 64 dimensions, 100,000,000 bytes of header, 256 MiB of index).
        """
    @property
    def path(self) -> str: ...
    @property
    def index(self) -> str | None: ...
    @property
    def files(self) -> list[str]: ...
    @property
    def names(self) -> list[str]:
        """Names of all tensors, file by file, then in the order of their bytes.

        A quantised tensor stands once, where its codes lie, under the name that it has where it is not quantised.
        What asks for names, tensors or their number raises CheckpointError if a quantised one is not whole.
        """
    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of `names`."""
    @property
    def stored_tensors(self) -> list[TensorInfo]:
        """All tensors as they are stored: codes and scales apart. Never raises."""
    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
    def __len__(self) -> int:
        """Number of tensors."""
    def __contains__(self, name: str, /) -> bool: ...
    def tensor(self, name: str) -> TensorInfo:
        """One tensor.

        Raises:
            CheckpointError: There is no tensor of this name.
        """
    def identity(self) -> dict[str, FileIdentity]:
        """The identity of every shard, by file name."""
    def check_unchanged(self) -> None:
        """Checks that size, times and inode of every shard are those seen when the checkpoint was opened.

        Raises:
            PlanError: A shard has changed.
            CheckpointError: A shard is gone.
        """
    def rows(self, name: str, start: int, stop: int, *, stored: bool = False) -> Rows:
        """Bytes of some rows of a tensor.

        Args:
            name: Its name.
            start: The first row.
            stop: The row after the last.
            stored: Whether bytes of codes are wanted where the tensor is quantised; the name is then a stored one's.

        Raises:
            PlanError: There are not so many rows, or the tensor is quantised and `stored` was not said.
            CheckpointError: There is no tensor of this name, or it cannot be read.
        """
    def release(self, name: str, *, stored: bool = False) -> None:
        """Gives the memory back that a tensor's mapped bytes take; `stored` as for rows."""

@final
class Matrix:
    """A 2-D tensor of floats that is read in blocks: a stored one, or a weighted sum of tensors that adapters change.

    The sum is computed by the arithmetic of a merge: float32, with fused multiply-adds over the terms.

    Args:
        name: The tensor's name, for messages; the tensor of operands that name none.
        sources: Open checkpoints by the names that the terms use.
        terms: The terms as the plan writes operands ({"operand": {"source", "tensor", "rows", "low_rank",
            "magnitude"}, "weight"}), as plain data or as JSON; all of one shape.

    Raises:
        PlanError: The terms are malformed, or do not go together.
        CheckpointError: A tensor is missing.
    """

    def __new__(
        cls, name: str, *, sources: Mapping[str, Checkpoint], terms: Sequence[Mapping[str, Any]] | str
    ) -> Matrix: ...
    @staticmethod
    def stored(checkpoint: Checkpoint, name: str) -> Matrix:
        """Finds a tensor that is a matrix of floats; reads nothing of it.

        Args:
            checkpoint: Where it lies.
            name: A 2-D tensor of dtype BF16, F16, F32 or F64.

        Raises:
            CheckpointError: There is no such tensor.
            PlanError: It is not such a matrix.
        """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str:
        """The stored dtype as safetensors names it; "F32" for a sum or what an adapter changes."""

    @property
    def mapped(self) -> bool:
        """Whether it is a tensor in a mapped file, as it is stored; opens the file."""

    def read(self, block: Block, rows: tuple[int, int], columns: tuple[int, int], *, offset: int = 0) -> None:
        """Reads a block as float32, row after row, into memory from an element on. The GIL is released meanwhile.

        Args:
            block: The memory; nobody else may use it until this returns.
            rows: Start and stop of the block's rows, as the matrix is stored.
            columns: Start and stop of its columns.
            offset: Element of the memory at which the block starts.

        Raises:
            PlanError: The block is not within the matrix, has more elements than the memory has from the offset
                on, or an input is no longer the one that was opened.
            CheckpointError: An input cannot be read.
            RuntimeError: Another thread is filling this memory.
        """

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite, as float32; reads the matrix. The GIL is released meanwhile."""

    def equals(self, other: Matrix) -> bool:
        """Whether another matrix has the same shape and equal numbers, as float32; reads on only as long as it has."""

    def release(self) -> None:
        """Gives mapped pages of its inputs back; what is read again is mapped again."""

@final
class Columns:
    """Standard normal columns of one analysis, a function of seed, look, and the number of rows and columns.

    They are drawn by Philox4x32-10 and Box and Muller's transform, and kept. Any number of threads may use them.

    Args:
        seed: From 0 to 2^64 - 1.
    """

    def __new__(cls, seed: int) -> Columns: ...
    def measure(
        self,
        base: Matrix,
        aligned: Matrix,
        finetuned: Matrix,
        *,
        look: int,
        columns: int,
        tests: int,
        against_base: bool = False,
        transposed: bool = False,
        simd: str | None = None,
    ) -> SketchMoments:
        """Takes a module through passes that are fused with its reading, in this thread; the GIL is released meanwhile.

        Memory is (2·d_out + d_in)·(columns + tests) float32 numbers and two blocks of rows of about 1 MB.

        Args:
            base: Its matrix in the base model.
            aligned: In the aligned model.
            finetuned: In the fine-tuned one. All are stored alike, and nobody else may read them meanwhile.
            look: Which columns to take.
            columns: Of Ω.
            tests: Of G.
            against_base: Whether Δ is taken against base, not against aligned.
            transposed: Whether the matrices are stored as (d_in, d_out).
            simd: A level of simd_levels; the fastest if not given. All give the same bits.

        Raises:
            PlanError: The shapes differ, or an input is no longer the one that was opened.
            CheckpointError: An input cannot be read.
            KeyboardInterrupt: stop was called.
        """

    def draw(self, rows: int, look: int, columns: int) -> bytes:
        """The columns of a look as little-endian float32, (rows, columns) row by row."""

    def stop(self) -> None:
        """Makes calls of measure in other threads end within a few milliseconds."""

def thin_images(
    base: Matrix,
    aligned: Matrix,
    columns: bytes,
    width: int,
    *,
    transposed: bool = False,
    simd: str | None = None,
) -> ThinImages:
    """What V = W_aligned - W_base, (d_out, d_in), does to columns C: G = VᵀC and H = VG, as it is read.

    The GIL is released meanwhile. Memory is (d_out + 2·d_in)·width float32 numbers and a block of rows of about 1 MB.

    Args:
        base: The matrix in the base model.
        aligned: In the aligned model. Both are stored alike, and nobody else may read them meanwhile.
        columns: (d_out, width) as little-endian float32, row by row.
        width: Number of columns; with none of them only the norms are found.
        transposed: Whether the matrices are stored as (d_in, d_out).
        simd: A level of simd_levels; the fastest if not given. All give the same bits.

    Raises:
        PlanError: The shapes differ, there are not as many numbers, or an input is no longer the one that was opened.
        CheckpointError: An input cannot be read.
    """

@final
class ThinImages:
    """G = VᵀC, and Gram matrices of it and of H = VG, row by row."""

    @property
    def images(self) -> bytes:
        """(d_in, width): G times the scale, as little-endian float32."""

    @property
    def scale(self) -> float:
        """What `images` was multiplied by, a power of two."""

    @property
    def grams(self) -> bytes:
        """(2, width, width): GᵀG and HᵀH, as little-endian float64."""

    @property
    def v_squares(self) -> float:
        """‖V‖²."""

    @property
    def weight_squares(self) -> float:
        """‖W_aligned‖²."""

@final
class SketchMoments:
    """What the passes over a module found: Gram matrices as little-endian float64 row by row, and sums.

    With Y = ΔΩ, P = VG and K = V Vᵀ.
    """

    @property
    def columns(self) -> int:
        """Columns of Ω, k."""

    @property
    def tests(self) -> int:
        """Columns of G, p."""

    @property
    def grams(self) -> bytes:
        """(3, k + p, k + p): [Y | P]ᵀ·M·[Y | P] for M = 1, K and K²."""

    @property
    def cross(self) -> bytes:
        """(p, k): QᵀY, with Q = KP as it was rounded, summed in float64."""

    @property
    def image(self) -> bytes:
        """(p, p): RᵀR with R = ΔᵀQ, summed in float64."""

    @property
    def v_squares(self) -> float:
        """‖V‖², to about 1e-7."""

    @property
    def delta_squares(self) -> float:
        """‖Δ‖²."""

    @property
    def weight_squares(self) -> float:
        """‖W_aligned‖²."""

    @property
    def inner(self) -> float:
        """⟨V, Δ⟩."""

@final
class Block:
    """Writable float32 memory that the engine fills and that numpy.asarray takes without a copy.

    Its array interface is one-dimensional and starts at a multiple of 64 bytes. Arrays made of it keep it alive.
    """

    def __new__(cls, elements: int) -> Block: ...
    def __len__(self) -> int: ...
    @property
    def __array_interface__(self) -> dict[str, object]: ...
    def read_difference(
        self,
        minuend: Matrix,
        subtrahend: Matrix,
        rows: tuple[int, int],
        columns: tuple[int, int],
        *,
        offset: int = 0,
        minuend_squares: bool = False,
    ) -> tuple[float, float]:
        """Reads a block of minuend - subtrahend, row after row, into the memory.

        Values are brought to float32 first; their difference is rounded once. The GIL is released meanwhile, so
        nobody else may use the memory until this returns.

        Args:
            minuend: The matrix to subtract from.
            subtrahend: What is subtracted; of the same shape, of any dtype.
            rows: Start and stop of the block's rows, as the matrices are stored.
            columns: Start and stop of its columns.
            offset: Element of the memory at which the block starts.
            minuend_squares: Whether to sum the squares of the minuend too.

        Returns:
            The sums, in float64, of the squares of the difference and of the minuend (0 if not asked for) over
            the block. NaN or infinite if a value is.

        Raises:
            PlanError: The shapes differ, the block is not within them, or it has more elements than the memory
                has from the offset on.
            RuntimeError: Another thread is filling this memory.
        """

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
class WrittenFile:
    """A file of an output.

    Attributes:
        name: Its path from the output on, with slashes.
        bytes: Its size.
        digest: BLAKE3 in hexadecimal; None for shards, which are compared with their plan instead.
    """

    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def digest(self) -> str | None: ...

@final
class JobDirectory:
    """The directory in which an output is made, locked until it is published or closed.

    It lies beside the output as `.NAME.safemerge`, or inside it as `.safemerge` where the output is a mounted
    volume or its parent is not writable. It gets the output's name by one rename when all is there, so that what
    stands under that name is whole. A job that was interrupted or killed goes on with resume.

    Attributes:
        output: The output: absolute, links resolved.
        path: The job directory.
        files: Where the output's files are: in the job directory until it is published, then the output.
        complete: Whether the output is whole and has its name. True after publish, and for a job opened with resume
            whose output was finished by an earlier run of the same identity; nothing can be written then.
        committed: Names of the shards that the journal lists.
        written: All files of the output so far, sorted by name: shards of this identity, and small files of this
            session. A published report must list them as "files" and the identity as "job" for the output to be
            known as this program's.
    """

    def __new__(
        cls,
        output: str | PathLike[str],
        *,
        identity: str,
        inputs: Sequence[str | PathLike[str]] = ...,
        resume: bool = False,
        overwrite: Literal["no", "exchange", "in-place"] = "no",
    ) -> JobDirectory:
        """Opens the job of an output, or begins it.

        Args:
            output: Directory that the output gets. Missing parents are made.
            identity: What tells this job from others: settings, identities of inputs, version. A job that is
                resumed with another identity loses its own files; its shards are kept as far as their digests are
                asked for.
            inputs: Files and directories that must stay as they are; compared with the output by device and inode.
            resume: Go on with an unfinished job; say complete of a finished one of the same identity.
            overwrite: Throw an unfinished job away, and replace a finished output of this program: "exchange" keeps
                it until the new one is complete, "in-place" removes it before the first new shard. With resume, an
                unfinished job goes on in this mode.

        Raises:
            OutputError: The output or the job directory holds what this program did not write, or a finished or
                unfinished output and neither resume nor overwrite; it is locked, or overlaps an input; it cannot be
                written.
        """
    @property
    def output(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def files(self) -> str: ...
    @property
    def complete(self) -> bool: ...
    @property
    def committed(self) -> list[str]: ...
    @property
    def written(self) -> list[WrittenFile]: ...
    def write_file(self, name: str, data: bytes) -> None:
        """Writes a small file of the output, durably."""
    def write_pieces(self, name: str, pieces: Iterable[bytes]) -> None:
        """Writes a file of the output piece by piece, durably; what the iterator raises is raised."""
    def copy_file(self, source: str | PathLike[str], name: str) -> None:
        """Copies a regular file into the output, durably."""
    def append(self, name: str, data: bytes) -> None:
        """Appends to a file of the job, never of the output; the data has reached the kernel when this returns.

        Names are plain, without slashes, and do not begin with a dot. A failure leaves the file as it was.
        """
    def read(self, name: str) -> bytes | None:
        """Reads a file of the job; None if there is no such file. A kill may have cut its end short."""
    def remove(self, name: str) -> None:
        """Removes a file of the job, if it is there."""
    def take_over(self) -> None:
        """Gives up all attempts at shards, of this process and others; what they make from now on has no place."""
    def hand_out(self) -> None:
        """Makes the place for attempts that workers name themselves; an output that is replaced in place goes now."""
    def begin_attempt(self, file: str) -> str:
        """Records an attempt at a shard durably, and returns its name, which no other attempt of the job has."""
    def adopt(self, file: str, attempt: str) -> None:
        """Records an attempt that its worker has named, so that what it prepared can be committed."""
    def abort(self, file: str, attempt: str) -> None:
        """Removes what an attempt made, or is making."""
    def publish(self) -> None:
        """Gives the whole output its name, removes what it replaces and the job directory, and closes.

        Files that are not in `written` are no part of the output.

        Raises:
            OutputError: The output's place is no longer what it was when the job was opened; or the message says
                that the output is complete, and that something is left to clean up.
        """
    def close(self) -> None:
        """Lets go of the job. What a later run can use stays for resume; without any, nothing stays."""

@final
class Pattern:
    """A regular expression in the syntax of the Rust crate regex: no look-around, no backreferences, linear time.

    Raises:
        ValueError: The expression is malformed, not supported or too large; the message is a short reason.
    """

    def __new__(cls, text: str) -> Pattern: ...
    def search(self, name: str) -> bool:
        """Whether the expression matches a part of the name."""
    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole name."""

@final
class Plan:
    """A validated plan: what every output tensor is made of.

    Args:
        json: The plan, version 2.
        sources: Checkpoints that are open already, by the plan's names; their headers are not read again, and they are
            read as they were opened. Names that the plan does not have are passed over.
        read_backend: As Checkpoint takes it, for the sources that are not given.
        directory: The output that carries the plan, where sources with a relative path lie.

    Raises:
        PlanError: The plan is malformed, contradicts the inputs' headers, or an input is not the one it was made for.
        CheckpointError: An input cannot be opened.
    """

    def __new__(
        cls,
        json: str | bytes,
        *,
        sources: Mapping[str, Checkpoint] | None = None,
        read_backend: str = "auto",
        directory: str | PathLike[str] | None = None,
    ) -> Plan: ...
    @property
    def shards(self) -> list[str]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    def shard_digest(self, file: str) -> str: ...
    def memory(
        self,
        *,
        threads: int | None = None,
        memory_budget: int | None = None,
        tile_bytes: int | None = None,
    ) -> int:
        """Bytes that execute would take at most: buffers, windows on inputs, factors and counters.

        Args:
            threads: As execute takes it.
            memory_budget: As execute takes it.
            tile_bytes: As execute takes it.

        Raises:
            PlanError: The budget is too small, or the tile size no multiple of 4096.
        """

    def execute(
        self,
        output: JobDirectory,
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

@final
class Prepared:
    """A shard that a worker wrote and synced in an attempt of its own, under no name yet.

    Attributes:
        file: The shard.
        attempt: The attempt's name.
        size: Its bytes.
        digest: What Plan.shard_digest says of the plan that made it.
        facts: What the worker found.
    """

    @property
    def file(self) -> str: ...
    @property
    def attempt(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def facts(self) -> ShardFacts: ...
    def to_json(self) -> bytes:
        """All of it, for another process."""
    @staticmethod
    def from_json(json: bytes) -> Prepared:
        """Reads what to_json wrote.

        Raises:
            PlanError: It is something else, or of another version.
        """

def prepare_shard(
    plan: Plan,
    job: str | PathLike[str],
    file: str,
    attempt: str,
    *,
    threads: int | None = None,
    memory_budget: int | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Makes a shard of a plan in an attempt of its own; neither locks the job nor writes its journal.

    Args:
        plan: The plan.
        job: The job's directory.
        file: The shard.
        attempt: Small letters and digits, which no other attempt of the job has.
        threads: As Plan.execute takes it.
        memory_budget: As Plan.execute takes it.
        allow_nonfinite: As Plan.execute takes it.
        progress: As Plan.execute takes it.

    Raises:
        OutputError: The job or the attempt is given up or finished, or the disk refuses.
        PlanError: An input has changed, or as Plan.execute.
        CheckpointError: An input cannot be read, or holds NaN.
    """

def commit_shard(plan: Plan, output: JobDirectory, prepared: Prepared) -> Literal["named", "late", "gone"]:
    """Gives a prepared shard its name, and enters it into the journal.

    Returns:
        "late" if another attempt came first, which removes this one; "gone" if its bytes are not there.

    Raises:
        PlanError: It was prepared for another plan.
        OutputError: Its attempt is not recorded, or the disk refuses; nothing more is committed then.
    """

def open_shards(plan: Plan, job: str | PathLike[str]) -> list[str]:
    """The shards of a plan that are not committed, as a worker sees it, who does not hold the job.

    Raises:
        OutputError: No job is handed out there.
    """

def committed_shards(plan: Plan, output: JobDirectory) -> list[ShardFacts]:
    """The shards of a plan that are committed."""

@final
class Watchdog:
    """A thread that ends the process with exit code 130 if the interpreter cannot do so after a signal."""

    def __new__(cls) -> Watchdog: ...
    def fileno(self) -> int:
        """The descriptor for signal.set_wakeup_fd; it is open as long as this object lives."""
    def set_message(self, message: str) -> None:
        """What is said after `error: ` if the thread has to say it."""
    def set_temporary(self, directory: str) -> None:
        """Names a directory that does not outlast the process."""
    def answer(self) -> None:
        """Tells that the signal's handler runs: the process then has more time to stop in good order."""
    def said(self) -> None:
        """Tells that the interruption has been said."""
