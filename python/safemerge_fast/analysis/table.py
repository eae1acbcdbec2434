"""Scores as a table: columns for pandas and polars, and a Parquet file that holds all that JSON does."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..documents import RECORD, parse_json
from ..errors import AnalysisError, OutputError
from ..pairing.modules import PROJECTION, layer_of, module_type
from ..printable import printable
from .score import SCORE_FIELDS, Score, write_score

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = [
    "DERIVED",
    "columns_of",
    "is_parquet",
    "names_parquet",
    "parse_parquet",
    "require_parquet",
    "to_pandas",
    "to_polars",
    "write_parquet",
]

DERIVED = ("layer", "module_type", "ratio", "z")
"""Columns that follow from the others: what a name says, and what chance is compared with."""

_INSTALL = "pip install safemerge-fast[tables]"

# Where a file's metadata hold what is not of one module.
_KEY = "safemerge_fast"

# A few bytes can stand for billions of equal values.
_MOST_ROWS = 5_000_000

_MAGIC = b"PAR1"


def columns_of(modules: Mapping[str, Score]) -> dict[str, list[Any]]:
    """The columns of a table, by name: each module's name, layer, type, every field of its score, ratio and z.

    Args:
        modules: Scores by module name.

    Returns:
        Lists of one length; None where a number is undefined or not finite.
    """
    written = [write_score(score) for score in modules.values()]
    return {
        "name": list(modules),
        "layer": [layer_of(name) for name in modules],
        "module_type": [module_type(name, PROJECTION) for name in modules],
        **{field: [entry[field] for entry in written] for field in SCORE_FIELDS},
        "ratio": [score.ratio for score in modules.values()],
        "z": [score.z for score in modules.values()],
    }


def to_pandas(modules: Mapping[str, Score]) -> pandas.DataFrame:
    """The table as pandas holds it; AnalysisError if pandas is not installed."""
    _require("pandas", "to_pandas")
    import pandas

    return pandas.DataFrame(
        {
            name: pandas.Series(values, dtype=_PANDAS.get(_kind(name), "object"))
            for name, values in columns_of(modules).items()
        }
    )


def to_polars(modules: Mapping[str, Score]) -> polars.DataFrame:
    """The table as polars holds it; AnalysisError if polars is not installed."""
    _require("polars", "to_polars")
    import polars

    types = {str: polars.String, bool: polars.Boolean, int: polars.Int64, float: polars.Float64}
    columns = columns_of(modules)
    return polars.DataFrame(columns, schema={name: types[_kind(name)] for name in columns})


def require_parquet() -> None:
    """Raises AnalysisError if nothing is installed that reads and writes Parquet."""
    if find_spec("pyarrow") is None and find_spec("polars") is None:
        raise AnalysisError(f"Parquet needs pyarrow or polars; install one with {_INSTALL}, or use JSON")


def names_parquet(file: str | Path) -> bool:
    """Whether a file's name says that it is one of Parquet."""
    return Path(file).suffix.lower() == ".parquet"


def is_parquet(data: bytes) -> bool:
    """Whether a file's bytes are those of Parquet."""
    return data.startswith(_MAGIC)


def write_parquet(file: str | Path, head: Mapping[str, Any], modules: Mapping[str, Score]) -> None:
    """Writes a table with what is common to all modules in the file's metadata.

    Args:
        file: The file.
        head: What is common to them, as JSON can hold it.
        modules: Scores by module name.

    Raises:
        AnalysisError: Neither pyarrow nor polars is installed.
        OutputError: The file cannot be written.
    """
    require_parquet()
    text = json.dumps(dict(head), ensure_ascii=False, allow_nan=False)
    try:
        if find_spec("pyarrow") is None:
            to_polars(modules).write_parquet(file, metadata={_KEY: text})
            return
        import pyarrow
        import pyarrow.parquet

        types = {
            str: pyarrow.string(),
            bool: pyarrow.bool_(),
            int: pyarrow.int64(),
            float: pyarrow.float64(),
        }
        columns = columns_of(modules)
        schema = pyarrow.schema([(name, types[_kind(name)]) for name in columns], metadata={_KEY: text})
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error


def parse_parquet(data: bytes, subject: str) -> dict[str, Any]:
    """Reads what write_parquet wrote, as the document that JSON would hold.

    Args:
        data: The file's bytes.
        subject: What messages begin with.

    Raises:
        AnalysisError: It is no such file; or neither pyarrow nor polars is installed.
    """
    require_parquet()
    try:
        text, columns = _read(data)
    except Exception as error:
        # Both libraries have many errors, and a damaged file may meet any of them.
        said = str(error).splitlines() or [repr(error)]
        raise AnalysisError(f"{subject} cannot be read as Parquet: {printable(said[0], 200)}") from error
    wanted = ("name", *SCORE_FIELDS)
    if text is None or (missing := [name for name in wanted if name not in columns]):
        lacks = "metadata of analyze" if text is None else f"column {missing[0]}"
        raise AnalysisError(f"{subject} holds no scores: it has no {lacks}; write them again with analyze")
    document = parse_json(text, AnalysisError, subject=f"the metadata of {subject}", limit=RECORD)
    if not isinstance(document, dict):
        raise AnalysisError(f"the metadata of {subject} are no object; write the scores again with analyze")
    if not all(isinstance(name, str) for name in columns["name"]):
        raise AnalysisError(f"{subject}: a name is no text; write the scores again with analyze")
    if len(set(columns["name"])) < len(columns["name"]):
        raise AnalysisError(f"{subject} names a module twice; write the scores again with analyze")
    entries = zip(*(columns[field] for field in SCORE_FIELDS), strict=True)
    document["modules"] = {
        name: dict(zip(SCORE_FIELDS, entry, strict=True))
        for name, entry in zip(columns["name"], entries, strict=True)
    }
    return document


def _read(data: bytes) -> tuple[str | None, dict[str, Sequence[Any]]]:
    """The metadata's text, and the columns."""
    if find_spec("pyarrow") is None:
        import polars

        found = polars.read_parquet_metadata(io.BytesIO(data)).get(_KEY)
        columns: dict[str, Sequence[Any]] = dict(
            polars.read_parquet(io.BytesIO(data)).to_dict(as_series=False)
        )
        return found, columns
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    if file.metadata.num_rows > _MOST_ROWS:
        raise ValueError(f"it has {file.metadata.num_rows} rows")
    table = file.read()
    held = (table.schema.metadata or {}).get(_KEY.encode())
    return None if held is None else held.decode(), table.to_pydict()


def _require(library: str, method: str) -> None:
    if find_spec(library) is None:
        raise AnalysisError(f"{method} needs {library}; install it with pip install {library}")


_KINDS: Mapping[str, type] = {
    "name": str,
    "layer": str,
    "module_type": str,
    "undefined": str,
    "rho_null_estimated": bool,
    "nonfinite": bool,
    "columns": int,
}

_PANDAS: Mapping[type, str] = {bool: "bool", int: "int64", float: "float64"}


def _kind(column: str) -> type:
    return _KINDS.get(column, float)
