"""The directory of a sweep: locked while it runs, its log appended after each result."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ..documents import RECORD, read_bytes
from ..errors import OutputError, PlanError
from ..printable import printable
from .result import VERSION, Result

__all__ = ["LOG_FILE", "SCORES_FILE", "SweepDirectory", "read_log"]

LOG_FILE = "sweep.jsonl"
"""Its first line says what is swept, and each further one what came of a model."""

SCORES_FILE = "scores-{}.json"
"""Scores; a number more where rules that came later wanted more."""

_LOCK_FILE = "lock"
_CANDIDATES, _RESULTS, _LOGS, _MODULES = "candidates", "results", "logs", "modules"


class SweepDirectory:
    """The directory, locked until it is closed.

    Attributes:
        path: The directory, absolute.
        results: Results by name, of this run and of earlier ones.
    """

    def __init__(self, path: str, head: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the directory, or opens it again.

        Args:
            path: The directory.
            head: What is swept: "identity", and what else the first line holds.
            resume: Whether it may hold the beginning of the same sweep.

        Raises:
            OutputError: It holds something else, another process works in it, or it cannot be written.
            PlanError: It holds a sweep of other inputs or settings.
        """
        self.path = Path(path)
        self.results: dict[str, Result] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = {entry.name for entry in self.path.iterdir()} - {_LOCK_FILE}
            if present and LOG_FILE not in present:
                raise OutputError(
                    f"{self.path} holds files of no sweep, such as {printable(min(present))}; name a new directory"
                )
            self._lock = open(self.path / _LOCK_FILE, "ab")  # noqa: SIM115
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._begin(head, resume)
            except BaseException as error:
                self._lock.close()
                if isinstance(error, BlockingIOError):
                    raise OutputError(f"another process works in {self.path}; wait for it to end") from None
                raise
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> SweepDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def scores(self) -> Path | None:
        """The newest scores that all candidates share; None if none are measured yet."""
        files = [self.path / SCORES_FILE.format(number) for number in range(self._scores_written())]
        return files[-1] if files else None

    def candidate(self, name: str) -> Path:
        """Where a candidate is made."""
        return self._folder(_CANDIDATES) / name

    def log(self, name: str) -> Path:
        """What the judge of a candidate prints."""
        return self._folder(_LOGS) / f"{name}.log"

    def empty_results(self, name: str) -> Path:
        """The directory that the judge of a candidate writes to, emptied."""
        path = self._folder(_RESULTS) / name
        self._remove_tree(path)
        try:
            path.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        return path

    def add(self, result: Result) -> None:
        """Appends a result to the log, durably."""
        self.results[result.name] = result
        self._append(msgspec.json.encode(result))

    def remove(self, name: str) -> None:
        """Removes a candidate, finished or not, if it is there."""
        folder = self._folder(_CANDIDATES)
        for path in (folder / name, folder / f".{name}.safemerge"):
            self._remove_tree(path)

    def write_scores(self, text: str) -> str:
        """Writes scores beside those that there are; returns the path."""
        path = self.path / SCORES_FILE.format(self._scores_written())
        _write_whole(path, text)
        return str(path)

    def _scores_written(self) -> int:
        number = 0
        while (self.path / SCORES_FILE.format(number)).exists():
            number += 1
        return number

    def write_modules(self, name: str, modules: Sequence[str]) -> str:
        """Writes the list of modules of a candidate, for merge --modules; returns its path."""
        path = self._folder(_MODULES) / f"{name}.json"
        _write_whole(path, json.dumps(modules, indent=0) + "\n")
        return str(path)

    def _begin(self, head: Mapping[str, Any], resume: bool) -> None:
        file = self.path / LOG_FILE
        line = json.dumps({"version": VERSION, **head}, ensure_ascii=True, default=str).encode()
        text = file.read_bytes() if file.exists() else b""
        if b"\n" not in text:
            # Nothing was begun; a kill may have cut the first line short.
            file.unlink(missing_ok=True)
            self._append(line)
            return
        if not resume:
            raise OutputError(
                f"{self.path} holds a sweep already; go on with --resume, or name a new directory"
            )
        known, results = read_log(self.path)
        if known["identity"] != head["identity"]:
            raise PlanError(
                f"{self.path} holds a sweep of {_difference(known, json.loads(line))}; name a new directory"
            )
        self.results = {result.name: result for result in results}
        if not text.endswith(b"\n"):
            # The last line was cut short; the next one must not be taken for its end.
            self._append(b"")

    def _append(self, line: bytes) -> None:
        file = self.path / LOG_FILE
        try:
            with open(file, "ab") as stream:
                stream.write(line + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error.strerror}") from error

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error
        if folder.is_symlink():
            raise OutputError(f"{folder} is a link, which a sweep does not follow; put a directory there")
        return folder

    def _remove_tree(self, path: Path) -> None:
        if path.is_symlink():
            raise OutputError(f"{path} is a link, which a sweep does not follow; remove it")
        try:
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            raise OutputError(f"cannot remove {path}: {error.strerror}") from error


def _write_whole(file: Path, text: str) -> None:
    """Writes all of a file or nothing."""
    part = file.with_name(f".{file.name}")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from error


def read_log(directory: Path) -> tuple[dict[str, Any], list[Result]]:
    """Reads what a sweep has logged.

    Args:
        directory: The sweep's directory.

    Returns:
        The first line, and the last result of each name in the order of the names' first ones.

    Raises:
        PlanError: It holds no log of a sweep, or one of another version.
    """
    file = directory / LOG_FILE
    lines = read_bytes(file, PlanError, limit=RECORD).split(b"\n")
    try:
        head = json.loads(lines[0])
        version, _ = head["version"], head["identity"]
    except (ValueError, KeyError, TypeError):
        raise PlanError(f"{printable(str(file))} is no log of a sweep: its first line is damaged") from None
    if version != VERSION:
        raise PlanError(f"{file} is of version {version}, this program reads version {VERSION}")
    results: dict[str, Result] = {}
    for line in lines[1:]:
        try:
            result = msgspec.json.decode(line, type=Result)
        except (msgspec.DecodeError, msgspec.ValidationError):
            # A line that a kill cut short.
            continue
        results[result.name] = result
    return head, list(results.values())


def _difference(known: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """What a sweep in the directory has that this one has not, in words."""
    ours, theirs = head.get("settings", {}), known.get("settings", {})
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            return f"another {name} ({printable(str(theirs.get(name)), 200)})"
    if known.get("program") != head.get("program"):
        return f"version {printable(str(known.get('program')), 40)} of this program"
    return "other inputs: a file has changed since"
