"""Checkpoints in object stores and on servers: small files are fetched, weights stay where they are.

A mirror is a private temporary directory with the small files of a checkpoint, and with an empty file for each of its
weights, which the engine reads by ranges from where they lie. An empty file is refused by whoever takes it for weights.
"""

from __future__ import annotations

import fnmatch
import itertools
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath

from .. import _engine, interruption
from ..errors import CheckpointError, show_as
from ..printable import printable

__all__ = ["address", "mirror"]

_PLAIN = ("http://", "https://")

_MOST = 256 << 20
"""Bytes of a small file at most."""

# What tells a model's shape, its tokenizer and its code.
_SMALL = ("*.json", "*.jinja", "*.model", "*.py", "vocab.*", "merges.txt", "chat_template.*", "LICENSE*")
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = frozenset({".bin", ".gguf", ".pt", ".pth", ".safetensors"})

# A plain server has no list of its files; it is asked for these.
_ASKED = (
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "hf_quant_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)

_numbers = itertools.count()
_mirrors: dict[Path, str] = {}


def address(path: Path) -> str:
    """Where the engine reads what lies at a path: its address, if it is mirrored, else the path."""
    for place in (path, path.parent):
        if (url := _mirrors.get(place)) is not None:
            return url if place == path else f"{url}/{path.name}"
    return str(path)


def mirror(role: str, text: str) -> Path:
    """Fetches the small files of a checkpoint that lies elsewhere.

    Args:
        role: Error messages name it.
        text: The address of a directory or of a .safetensors file.

    Returns:
        The path of the directory or file in the mirror, which lasts as long as this process.

    Raises:
        CheckpointError: It is not an address that models are read from, or the store does not give what lies there.
    """
    try:
        return _mirror(_engine.normal_url(text))
    except CheckpointError as error:
        raise CheckpointError(f"{role}: {error}") from None


def _mirror(url: str) -> Path:
    file = PurePosixPath(url).name if url.endswith(".safetensors") else None
    where = url if file is None else url.removesuffix(f"/{file}")
    if any(file_or_folder in where for file_or_folder in ("\\", "\0")):
        raise CheckpointError(f"{printable(where)} has a character in it that no path should have; rename it")
    directory = _root() / str(next(_numbers)) / PurePosixPath(where).name
    directory.mkdir(parents=True, mode=0o700)
    _mirrors[directory] = where
    show_as(str(directory), where)
    plain = url.startswith(_PLAIN)
    # Of a single file on a plain server only what lies beside it is asked for.
    listed = [] if plain and file is not None else _engine.list_directory(where)
    small = list(_ASKED) if plain else [name for name, size in listed if _is_small(name, size)]
    if any(name.startswith(f"{_TEMPLATES}/") for name in small):
        (directory / _TEMPLATES).mkdir()
    fetched = _engine.fetch_small(where, small, str(directory), most=_MOST)
    if plain:
        _refuse_code(where, directory, fetched)
    weights = [name for name, _ in listed if PurePosixPath(name).suffix in _WEIGHTS]
    for name in (*weights, *([] if file is None else [file])):
        if _is_plain_name(name):
            (directory / name).touch()
    return directory if file is None else directory / file


def _is_small(name: str, size: int) -> bool:
    """Whether a file is fetched. One that is too large is refused by the engine, but not where nobody will want it."""
    folder, _, last = name.rpartition("/")
    if folder == _TEMPLATES:
        return _is_plain_name(last)
    if folder or not _is_plain_name(last) or PurePosixPath(last).suffix in _WEIGHTS:
        return False
    wanted = any(fnmatch.fnmatchcase(last, pattern) for pattern in _SMALL)
    return wanted and (size <= _MOST or last in _ASKED or not last.endswith(".json"))


def _is_plain_name(name: str) -> bool:
    return (
        "/" not in name and name not in ("", ".", "..") and name.isprintable() and len(name.encode()) <= 255
    )


def _refuse_code(url: str, directory: Path, names: list[str]) -> None:
    """Refuses code that a configuration names: which other files it needs cannot be asked for."""
    for name in names:
        if name.endswith(".json") and b'"auto_map"' in (directory / name).read_bytes():
            raise CheckpointError(
                f"{url}/{name} names code of its own (auto_map), whose files a plain server does not list; download "
                f"the model"
            )


@cache
def _root() -> Path:
    """The directory of all mirrors of this process, removed when it ends."""
    return Path(_keep().name).resolve()


@cache
def _keep() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="safemerge-")
    interruption.remove_at_end(made.name)
    return made
