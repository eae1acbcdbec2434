"""Judging one model: a command of the user's is run on it, without a shell, and writes JSON."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import CONFIGURATION, read_json
from ..errors import CheckpointError, OutputError, SettingError
from ..printable import printable

__all__ = ["Judge", "JudgeError", "read_judge"]

_PLACES = ("model", "out", "aligned", "name")
_POLL_SECONDS = 0.05
# How much of the log is looked at for the line that a failure is told with.
_TAIL = 8192


class JudgeError(Exception):
    """The command did not judge the model; the message says why."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A command, as words with placeholders.

    Attributes:
        words: The command; {model}, {out}, {aligned} and {name} stand for what is known when it runs.
        timeout: Seconds after which it is stopped, or None.
    """

    words: tuple[str, ...]
    timeout: float | None = None

    def run(self, places: Mapping[str, str], directory: Path, log: Path) -> Any:
        """Runs the command and reads what it wrote.

        Args:
            places: What stands for each placeholder but {out}.
            directory: An empty directory; {out} is a file in it. A command that writes one JSON file with another
                name there, as lm-evaluation-harness does, has written it as well.
            log: Gets what the command prints.

        Returns:
            The JSON document.

        Raises:
            JudgeError: It failed, took too long, or left no such file.
            OutputError: The log cannot be written.
        """
        out = directory / "out.json"
        given = {**places, "out": str(out)}
        words = [_filled(word, given) for word in self.words]
        try:
            with open(log, "wb") as stream:
                code = self._wait(words, stream)
        except OSError as error:
            if not isinstance(error, FileNotFoundError | PermissionError) or not log.exists():
                raise OutputError(f"cannot write {log}: {error.strerror}") from error
            raise JudgeError(f"{printable(words[0])} cannot be run: {error.strerror}") from error
        if code is None:
            raise JudgeError(f"the command took longer than {self.timeout:g} s and was stopped")
        if code != 0:
            how = f"exit code {code}" if code > 0 else f"signal {_signal(-code)}"
            raise JudgeError(f"the command ended with {how}{_last_line(log)}")
        try:
            return read_json(_written(out), CheckpointError, limit=CONFIGURATION, nonfinite=True)
        except CheckpointError as error:
            raise JudgeError(str(error)) from error

    def _wait(self, words: list[str], log: Any) -> int | None:
        """The exit code; None if it took too long."""
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own, so that what it starts ends with it.
            start_new_session=True,
        )
        started = time.monotonic()
        try:
            while not _has_ended(process):
                if self.timeout is not None and time.monotonic() - started > self.timeout:
                    return None
                time.sleep(_POLL_SECONDS)
        finally:
            # Also what a command leaves running that has ended itself, and for Ctrl-C.
            code = _end_group(process)
        return code


def read_judge(text: str, timeout: float | None) -> Judge:
    """Reads a command as it is typed.

    Raises:
        SettingError: It is not one that could judge a model: {model} or {out} is missing, or there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingError(f"eval cannot be split into words: {error}; see to its quotes") from error
    if not words:
        raise SettingError("eval is empty; give a command like 'python judge.py {model} {out}'")
    for place in ("model", "out"):
        if not any(f"{{{place}}}" in word for word in words):
            raise SettingError(
                f"eval has no {{{place}}}; give a command like 'python judge.py {{model}} {{out}}'"
            )
    if not any(f"{{{place}}}" in words[0] for place in _PLACES) and shutil.which(words[0]) is None:
        raise SettingError(f"eval: there is no program {printable(words[0])} to run")
    return Judge(tuple(words), timeout)


def _filled(word: str, given: Mapping[str, str]) -> str:
    """A word with its placeholders filled in; in one pass, since paths may hold braces too."""
    parts = []
    while word:
        found = [
            (word.index(mark), mark, value)
            for name, value in given.items()
            if (mark := f"{{{name}}}") in word
        ]
        if not found:
            break
        place, mark, value = min(found)
        parts += [word[:place], value]
        word = word[place + len(mark) :]
    return "".join(parts) + word


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without collecting it: its number stays its group's until the group is ended."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return process.poll() is not None


def _end_group(process: subprocess.Popen[bytes]) -> int:
    """Ends the process and all that it started; returns its exit code."""
    # The errors of a group that has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _written(out: Path) -> Path:
    """The file that a command wrote: {out}, or the one JSON file beside it."""
    if os.path.lexists(out):
        return out
    files = [path for path in sorted(out.parent.rglob("*.json")) if path.is_file()]
    if not files:
        raise JudgeError("the command ended well, but wrote no JSON to {out}")
    if len(files) > 1:
        raise JudgeError(
            f"the command wrote not {{out}} but {len(files)} JSON files beside it, such as "
            f"{printable(files[0].name)} and {printable(files[1].name)}; which one is meant?"
        )
    return files[0]


def _last_line(log: Path) -> str:
    """The last thing that a command said, to follow on a sentence."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL))
        lines = [line for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {printable(lines[-1].strip(), 200)}" if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
