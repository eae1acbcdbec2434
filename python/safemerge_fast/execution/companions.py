"""The files beside the weights: which are taken over from the fine-tuned model, and its config.json.

What is not listed here is left behind: pickles, GGUF files, the old index, optimizer states, and above all
`consolidated*.safetensors` with params.json, which some servers would load in place of the merged weights.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.model import Model
from ..documents import CODE, read_bytes, read_bytes_if_there, read_json, require_regular
from ..errors import CheckpointError
from ..printable import printable

__all__ = ["companion_files", "configuration_file", "has_tokenizer"]

CONFIGURATION = "config.json"

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
_OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
# What ModelOpt says of formats beside config.json; true as long as nothing is dequantised.
_FORMATS = ("hf_quant_config.json",)
_NEVER = frozenset({".bin", ".gguf", ".pt", ".pth", ".safetensors"})

# Files whose auto_map can name Python modules.
_WITH_CODE = (
    CONFIGURATION,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# Within a line, and without two ways to match the same text: the file may be made to take long.
_RELATIVE_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+\.(\w+)(?:\.[\w.]*)?[ \t]+import|import[ \t]+\.(\w+)|from[ \t]+\.[ \t]+import[ \t]+(\w+))",
    re.M,
)


def companion_files(
    model: Model, tokenizer: Model | None = None, *, keeps_formats: bool = False
) -> list[tuple[Path, str]]:
    """Lists the files to copy beside the merged weights; config.json is not among them.

    Args:
        model: The checkpoint that the output is shaped like. Where a single file was given for it, the
            directory it lies in is looked at if that holds a config.json.
        tokenizer: An adapter of it, or another model. If a tokenizer lies there, it is taken in place of the
            checkpoint's.
        keeps_formats: Whether all quantised tensors stay so.

    Returns:
        (where a file lies, its name in the output), sorted by name.

    Raises:
        CheckpointError: A file is no regular file, cannot be read, has a name that is not UTF-8, or is a link that
            leads out of its checkpoint.
    """
    directory = _directory(model)
    if not model.path.is_dir() and not (directory / CONFIGURATION).is_file():
        return []
    others = (*_OTHERS, *_FORMATS) if keeps_formats else _OTHERS
    sources = [(directory, others), (_tokenizer_directory(tokenizer) or directory, _TOKENIZER)]
    found: dict[str, Path] = {}
    for source, patterns in sources:
        for pattern in patterns:
            for name in _matching(source, pattern):
                path = source / name
                if path.suffix not in _NEVER and not path.is_dir():
                    found[name] = path
        for name in _code_files(source):
            found[name] = source / name
    for name in sorted(found):
        _check_companion(found[name], name)
    # It is not copied but written anew, and by then it is late.
    if os.path.lexists(directory / CONFIGURATION):
        _check_companion(directory / CONFIGURATION, CONFIGURATION)
    return [(found[name], name) for name in sorted(found)]


def _matching(directory: Path, pattern: str) -> Iterator[str]:
    """Names in a directory, or in a folder of it, that match a pattern; links that lead nowhere are among them."""
    folder, _, pattern = pattern.rpartition("/")
    place = directory / folder
    if folder and not place.is_dir():
        return
    try:
        names = os.listdir(place)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {error.strerror}") from error
    for name in fnmatch.filter(names, pattern):
        yield f"{folder}/{name}" if folder else name


def _check_companion(path: Path, name: str) -> None:
    """Refuses what should not be copied: the output may be published, and can be read by all."""
    if not name.isprintable():
        raise CheckpointError(
            f"{printable(str(path))} has a name that no file of a model has; rename or remove it"
        )
    directory = Path(os.path.abspath(path)).parents[name.count("/")]
    resolved = Path(os.path.realpath(path))
    if not any(resolved.is_relative_to(place) for place in _places(Path(os.path.realpath(directory)))):
        raise CheckpointError(
            f"{path} is a link to {printable(str(resolved))}, outside of the checkpoint, and would be copied into the "
            f"output; put the file itself there, or remove the link"
        )
    require_regular(path, CheckpointError)


def _places(directory: Path) -> Iterator[Path]:
    """Where the files of a checkpoint may lie: in its directory, or among the blobs of its repository's cache."""
    yield directory
    for parent in directory.parents:
        # …/models--org--name/snapshots/<revision>/… holds links to …/models--org--name/blobs/<hash>.
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            yield parent.parent / "blobs"


def _tokenizer_directory(model: Model | None) -> Path | None:
    """The model's directory if it has a tokenizer of its own."""
    return None if model is None or not has_tokenizer(model) else _directory(model)


def has_tokenizer(model: Model) -> bool:
    """Whether a tokenizer lies beside a model's weights."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return any(os.path.lexists(_directory(model) / name) for name in names)


def configuration_file(model: Model, dtype: str, config: Mapping[str, Any] | None = None) -> bytes | None:
    """The output's config.json.

    Args:
        model: The model that the output is shaped like.
        dtype: "auto" takes the file over byte for byte; "bfloat16", "float16" or "float32" is written where
            the configuration names a dtype (`dtype`, `torch_dtype`, also in `text_config`), for loaders.
        config: What the file says in place of the model's own, if it is not to be that.

    Returns:
        The file's bytes, or None if the model has none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    text = read_bytes_if_there(_directory(model) / CONFIGURATION, CheckpointError)
    if text is None:
        return None
    if dtype == "auto" and config is None:
        return text
    written = copy.deepcopy(dict(model.config if config is None else config))
    for part in (written, written.get("text_config")) if dtype != "auto" else ():
        if isinstance(part, dict):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    return (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()


def _directory(model: Model) -> Path:
    return model.path if model.path.is_dir() else model.path.parent


def _code_files(directory: Path) -> list[str]:
    """Python files that an auto_map names, and those of the directory that they import. Runs nothing."""
    waiting = [f"{module}.py" for file in _WITH_CODE for module in _mapped_modules(directory / file)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = directory / name
        if name in found or not os.path.lexists(path):
            continue
        found.add(name)
        _check_companion(path, name)
        text = read_bytes(path, CheckpointError, limit=CODE).decode("utf-8", errors="replace")
        for groups in _RELATIVE_IMPORT.findall(text):
            waiting.extend(f"{module}.py" for module in groups if module)
    return sorted(found)


def _mapped_modules(path: Path) -> Iterator[str]:
    """Modules of this very repository that the auto_map of a JSON file names."""
    document = read_json(path, CheckpointError, nonfinite=True, optional=True)
    auto_map = document.get("auto_map") if isinstance(document, dict) else None
    entries = list(auto_map.values()) if isinstance(auto_map, dict) else []
    while entries:
        entry = entries.pop()
        if isinstance(entry, list):
            entries.extend(entry)
        elif isinstance(entry, str) and "--" not in entry and "." in entry:
            # "module.Class" lies here; "org/name--module.Class" lies in another repository.
            module = entry.split(".")[0]
            if module.isidentifier():
                yield module
