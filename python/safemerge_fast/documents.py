"""Small files: read within limits, and JSON that a person can read, quick to write for a hundred thousand tensors.

A checkpoint comes from anywhere. Its config.json may be a pipe that nobody writes to, a device without end, or a few
kilobytes that unfold into gigabytes. All that is not weights is read here: regular files only, of a size and depth
that such a file can have.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

from .errors import SafemergeError
from .printable import printable

__all__ = [
    "CODE",
    "CONFIGURATION",
    "DEPTH",
    "RECIPE",
    "RECORD",
    "TOKENIZER",
    "Limit",
    "parse_json",
    "read_bytes",
    "read_bytes_if_there",
    "read_json",
    "read_text",
    "require_regular",
    "write_document",
]


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of one kind of file is read.

    Attributes:
        size: Bytes.
        items: Values of a JSON document, about: each takes memory of its own.
    """

    size: int
    items: int


CONFIGURATION: Final = Limit(16 << 20, 500_000)
"""config.json, adapter_config.json, tokenizer_config.json and their like."""

TOKENIZER: Final = Limit(256 << 20, 50_000_000)
"""tokenizer.json and vocabularies."""

RECORD: Final = Limit(1 << 30, 200_000_000)
"""What this program wrote: scores, reports, plans."""

RECIPE: Final = Limit(4 << 20, 10_000)
"""YAML that a person wrote."""

CODE: Final = Limit(4 << 20, 0)
"""Python files beside the weights."""

DEPTH: Final = 64
"""Levels of nesting that a document may have."""

# Digits beyond which a whole number is no number of anything here; arithmetic with it would take its time. Tokenizers
# write int(1e30), 31 digits, for a length without limit.
_MOST_DIGITS = 40
_LARGEST = 10**_MOST_DIGITS
_TOO_LONG = f"it holds a whole number of more than {_MOST_DIGITS} digits"
_TOO_DEEP = f"it is nested deeper than {DEPTH} levels"


def read_bytes(
    file: str | os.PathLike[str],
    error: type[SafemergeError],
    *,
    limit: Limit = CONFIGURATION,
    subject: str | None = None,
) -> bytes:
    """Reads a small file whole.

    Args:
        file: Its path. It must lead to a regular file; nothing else is opened for longer than it takes to see that.
        error: What to raise.
        limit: How large it may be.
        subject: What messages begin with, in place of the path: "base: …/config.json".

    Returns:
        Its bytes.

    Raises:
        SafemergeError: Of the class given: it is not there, not a regular file, too large, or cannot be read.
    """
    subject = _subject(file, subject)
    data = _read(file, error, limit, subject)
    if data is None:
        raise error(f"{subject} cannot be read: there is no such file")
    return data


def read_bytes_if_there(
    file: str | os.PathLike[str],
    error: type[SafemergeError],
    *,
    limit: Limit = CONFIGURATION,
    subject: str | None = None,
) -> bytes | None:
    """As read_bytes, but a file that does not exist is None."""
    return _read(file, error, limit, _subject(file, subject))


def read_text(
    file: str | os.PathLike[str],
    error: type[SafemergeError],
    *,
    limit: Limit = CONFIGURATION,
    subject: str | None = None,
) -> str:
    """Reads a small file of UTF-8 text; arguments and errors as for read_bytes."""
    data = read_bytes(file, error, limit=limit, subject=subject)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{_subject(file, subject)} is not UTF-8 text (byte {problem.start})") from problem


def read_json(
    file: str | os.PathLike[str],
    error: type[SafemergeError],
    *,
    limit: Limit = CONFIGURATION,
    subject: str | None = None,
    nonfinite: bool = False,
    optional: bool = False,
) -> Any:
    """Reads a small JSON file.

    Args:
        file: As for read_bytes.
        error: As for read_bytes.
        limit: As for read_bytes.
        subject: As for read_bytes.
        nonfinite: Whether NaN and Infinity, which JSON does not have, are numbers.
        optional: Whether the file may be missing.

    Returns:
        The document; None if the file is missing and may be.

    Raises:
        SafemergeError: Of the class given, as read_bytes and parse_json.
    """
    subject = _subject(file, subject)
    data = _read(file, error, limit, subject)
    if data is None:
        if optional:
            return None
        raise error(f"{subject} cannot be read as JSON: there is no such file")
    return parse_json(data, error, subject=subject, limit=limit, nonfinite=nonfinite)


def parse_json(
    data: bytes | str,
    error: type[SafemergeError],
    *,
    subject: str,
    limit: Limit = RECORD,
    nonfinite: bool = False,
) -> Any:
    """Parses JSON of any origin.

    Args:
        data: The text, or its UTF-8 bytes.
        error: What to raise.
        subject: What messages begin with.
        limit: How large it may be.
        nonfinite: Whether NaN and Infinity, which JSON does not have, are numbers.

    Returns:
        The document.

    Raises:
        SafemergeError: Of the class given: it is malformed, too large, nested deeper than DEPTH levels, or holds a
            whole number of more than 40 digits.
    """
    import msgspec

    where = f"{subject} cannot be read as JSON"
    try:
        raw = data.encode() if isinstance(data, str) else data
        if len(raw) > limit.size:
            raise error(f"{where}: it has {len(raw)} bytes, at most {limit.size} are read")
        # Each value but the first follows a comma or an opening bracket. Text may hold such characters too, which
        # the limits leave room for.
        if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > limit.items:
            raise error(f"{where}: it holds more than {limit.items} values")
        try:
            document = msgspec.json.decode(raw)
            plain = True
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Python's own parser takes more than JSON, and says better what is wrong.
            document = json.loads(raw.decode("utf-8"), parse_constant=_constant, parse_int=_whole_number)
            plain = False
        _check_values(document, nonfinite)
        if not plain:
            # It takes halves of surrogate pairs too, which no file can be written with.
            _encode_any(document).encode()
    except RecursionError as problem:
        raise error(f"{where}: {_TOO_DEEP}") from problem
    except ValueError as problem:
        raise error(f"{where}: {printable(str(problem))}") from problem
    return document


def _constant(name: str) -> float:
    return float(name.replace("Infinity", "inf"))


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS + 1:
        raise ValueError(_TOO_LONG)
    return int(digits)


def _check_values(document: Any, nonfinite: bool) -> None:
    """Raises ValueError for what would fail later, far from the file: deep nesting and endless numbers."""
    level: list[Any] = [[document]]
    for _ in range(DEPTH + 1):
        deeper: list[Any] = []
        for container in level:
            for value in container.values() if type(container) is dict else container:
                kind = type(value)
                if kind is dict or kind is list:
                    deeper.append(value)
                elif kind is int and not -_LARGEST < value < _LARGEST:
                    raise ValueError(_TOO_LONG)
                elif kind is float and not nonfinite and not math.isfinite(value):
                    raise ValueError("it holds NaN, Infinity or a number that is too large")
        if not deeper:
            return
        level = deeper
    raise ValueError(_TOO_DEEP)


def require_regular(
    file: str | os.PathLike[str], error: type[SafemergeError], *, subject: str | None = None
) -> None:
    """Raises an error unless a path leads to a regular file that can be opened."""
    subject = _subject(file, subject)
    try:
        os.close(_open(file, error, subject))
    except (OSError, ValueError) as problem:
        raise error(f"{subject} cannot be read: {_reason(problem)}") from problem


def _read(
    file: str | os.PathLike[str], error: type[SafemergeError], limit: Limit, subject: str
) -> bytes | None:
    """Reads a regular file within a limit; None if there is no such file."""
    try:
        with open(_open(file, error, subject), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # Memory is taken for as many bytes as are asked for. One more shows whether the file has grown.
            data = stream.read(size + 1) if size <= limit.size else b""
            if len(data) > size:
                data += stream.read(limit.size + 1 - len(data))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{subject} cannot be read: {_reason(problem)}") from problem
    if size > limit.size or len(data) > limit.size:
        raise error(
            f"{subject} has {max(size, len(data))} bytes, and at most {limit.size} are read of such a file; is it the "
            f"right one?"
        )
    return data


def _open(file: str | os.PathLike[str], error: type[SafemergeError], subject: str) -> int:
    """Opens a regular file, and nothing that could make a reader wait."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise error(f"{subject} is {_kind(mode)}, not a regular file; put the file itself there")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")


def _reason(problem: Exception) -> str:
    """What went wrong, without the path, which the sentence names already."""
    if isinstance(problem, OSError):
        if problem.errno in (errno.ENXIO, errno.ENODEV):
            return "it is a socket or a device, not a regular file"
        return problem.strerror or str(problem)
    return printable(str(problem))


def _subject(file: str | os.PathLike[str], subject: str | None) -> str:
    return printable(os.fsdecode(file) if subject is None else subject)


# With this the encoder in C does the work; an indent would leave it to the one in Python, ten times slower.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_encode_any = json.JSONEncoder(ensure_ascii=False).encode


def write_document(document: Any, *, levels: int) -> str:
    """Writes JSON with line breaks and indents at the outer levels only.

    Args:
        document: What json can encode; NaN and infinity it cannot.
        levels: How many levels of nested objects and arrays have a line per item; deeper ones have none.

    Returns:
        JSON that ends with a line break.
    """
    return _write(document, levels, "\n") + "\n"


def _write(value: Any, levels: int, line: str) -> str:
    if levels == 0 or not value or not isinstance(value, dict | list | tuple):
        return _encode(value)
    deeper = f"{line}  "
    if isinstance(value, dict):
        items = [f"{_encode(str(key))}: {_write(item, levels - 1, deeper)}" for key, item in value.items()]
        return f"{{{deeper}{f',{deeper}'.join(items)}{line}}}"
    items = [_write(item, levels - 1, deeper) for item in value]
    return f"[{deeper}{f',{deeper}'.join(items)}{line}]"
