"""Shards that workers prepared without anybody to tell: each leaves a document beside what it made.

A worker writes the document when all bytes of the shard are synced, so that one that died leaves none. Whoever runs the
job believes nothing of it that the plan does not say: a shard of another plan, or of other inputs, counts as not there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .. import _engine
from ..errors import OutputError, PlanError

__all__ = ["ATTEMPTS", "all_committed", "commit_prepared", "leave_prepared", "new_attempt", "prepared_files"]

ATTEMPTS = "attempts"
"""Where attempts lie in a job's directory; the engine makes it."""

_SUFFIX = ".json"
_LARGEST = 64 << 20


def new_attempt() -> str:
    """The name of an attempt that nobody has recorded beforehand, like no other."""
    return f"w{secrets.token_hex(10)}"


def leave_prepared(job: Path, prepared: _engine.Prepared) -> None:
    """Says durably that a shard is prepared.

    Raises:
        OutputError: The document cannot be written.
    """
    place = job / ATTEMPTS
    partial = place / f".{prepared.attempt}{_SUFFIX}.partial"
    try:
        with partial.open("xb") as file:
            file.write(prepared.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(place / f"{prepared.attempt}{_SUFFIX}")
        directory = os.open(place, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OutputError(f"cannot write {partial}: {error.strerror}") from error


def prepared_files(checked: _engine.Plan, job: Path) -> set[str]:
    """Names of the plan's shards that are prepared and still there."""
    return {prepared.file for prepared in _of_plan(checked, job)}


def commit_prepared(checked: _engine.Plan, directory: _engine.JobDirectory) -> dict[str, _engine.ShardFacts]:
    """Commits what workers have prepared for a plan; of several attempts at a shard one.

    Args:
        checked: The plan.
        directory: The job's directory.

    Returns:
        What happened to each shard that was committed here, by name.

    Raises:
        OutputError: The disk refuses.
    """
    committed = {}
    for prepared in _of_plan(checked, Path(directory.path)):
        if prepared.file not in committed:
            directory.adopt(prepared.file, prepared.attempt)
            if _engine.commit_shard(checked, directory, prepared) == "named":
                committed[prepared.file] = prepared.facts
    return committed


def all_committed(checked: _engine.Plan, directory: _engine.JobDirectory) -> dict[str, _engine.ShardFacts]:
    """Commits what workers have prepared, and says what happened to each shard that is committed now, by name.

    Raises:
        OutputError: The disk refuses.
    """
    here = commit_prepared(checked, directory)
    return {known.file: known for known in _engine.committed_shards(checked, directory)} | here


def _of_plan(checked: _engine.Plan, job: Path) -> Iterator[_engine.Prepared]:
    """What is prepared for this very plan, by the names of the attempts."""
    place = job / ATTEMPTS
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{place} cannot be read: {error.strerror}") from error
    digests = {file: checked.shard_digest(file) for file in checked.shards} if names else {}
    for name in names:
        if name.startswith(".") or not name.endswith(_SUFFIX):
            continue
        prepared = _read(place / name)
        known = prepared is not None and digests.get(prepared.file) == prepared.digest
        if prepared is not None and known and _is_there(place, prepared):
            yield prepared


def _read(path: Path) -> _engine.Prepared | None:
    """The document, if it is one."""
    try:
        with path.open("rb") as file:
            prepared = _engine.Prepared.from_json(file.read(_LARGEST))
    except (OSError, PlanError):
        # Whoever asks for the shard hears that it is missing, and makes it again.
        return None
    return prepared if path.name == f"{prepared.attempt}{_SUFFIX}" else None


def _is_there(place: Path, prepared: _engine.Prepared) -> bool:
    path = place / f".{prepared.file}.{prepared.attempt}.partial"
    try:
        return not path.is_symlink() and path.stat().st_size == prepared.size
    except OSError:
        return False
