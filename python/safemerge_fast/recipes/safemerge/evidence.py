"""Scores as they are measured: appended to a job or to a file, and found again by a run that goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ... import _engine
from ...analysis.precision import Precision
from ...analysis.score import Score, read_score, write_score
from ...checkpoint.model import Model
from ...documents import RECORD, read_bytes_if_there
from ...errors import AnalysisError, OutputError
from ...execution.inputs import source_identity

__all__ = ["PartialFile", "ScoreLog"]

_FILE = "scores.jsonl"


class _Keeper(Protocol):
    """What holds a log: a job's directory, or a file of its own."""

    def read(self, name: str) -> bytes | None: ...
    def append(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class PartialFile:
    """Holds the log of an analysis that has no job, beside the file that its scores go to, until that is written.

    Attributes:
        path: `.NAME.partial`.
    """

    def __init__(self, scores: Path) -> None:
        """Takes the path of the file that the scores go to."""
        self.path = scores.with_name(f".{scores.name}.partial")

    def read(self, name: str) -> bytes | None:
        """All of it; None if it is not there."""
        return read_bytes_if_there(self.path, AnalysisError, limit=RECORD)

    def append(self, name: str, data: bytes) -> None:
        """Adds to it."""
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def remove(self, name: str = _FILE) -> None:
        """Removes it, if it is there."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {self.path}: {error.strerror}") from error


class ScoreLog:
    """Scores of one analysis. The first line says what they are scores of; those of anything else are thrown away.

    Attributes:
        known: Scores that an earlier run measured, by module name.
    """

    def __init__(
        self,
        directory: _Keeper,
        models: Mapping[str, Model],
        *,
        delta_reference: str,
        precision: Precision,
    ) -> None:
        """Reads what an earlier run left.

        Args:
            directory: The job's directory, or a file of its own.
            models: base, aligned and finetuned, which the scores depend on.
            delta_reference: What Δ is taken against.
            precision: How ρ is measured; intervals of another probability, or another seed's, are other scores.
        """
        self._directory = directory
        subject = {
            "version": _engine.__version__,
            "delta_reference": delta_reference,
            "failure": precision.failure,
            "seed": precision.seed,
            "models": {role: source_identity(models[role]) for role in ("base", "aligned", "finetuned")},
        }
        text = json.dumps(subject, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        self._head = {"scores_of": hashlib.blake2b(text, digest_size=16).hexdigest()}
        self.known: dict[str, Score] = {}
        text = directory.read(_FILE) or b""
        lines = text.split(b"\n")
        if _parsed(lines[0]) == self._head:
            self._read(lines[1:])
            if not text.endswith(b"\n"):
                # The last line was cut short; the next one must not be taken for its end.
                directory.append(_FILE, b"\n")
        else:
            directory.remove(_FILE)
            directory.append(_FILE, _line(self._head))

    def append(self, name: str, score: Score) -> None:
        """Adds a score; it is in the system's hands when this returns."""
        self._directory.append(_FILE, _line({"name": name, **write_score(score)}))

    def _read(self, lines: list[bytes]) -> None:
        for line in lines:
            entry = _parsed(line)
            try:
                name = entry.pop("name")
                self.known[name] = read_score(name, entry)
            except (AnalysisError, AttributeError, KeyError, TypeError):
                # A line that a crash cut short, with another one behind it.
                continue


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(entry), ensure_ascii=True).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
