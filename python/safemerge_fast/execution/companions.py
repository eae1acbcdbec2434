"""The files beside the weights: which are taken over from the fine-tuned model, and its config.json.

What is not listed here is left behind: pickles, GGUF files, the old index, optimizer states, and above all
`consolidated*.safetensors` with params.json, which some servers would load in place of the merged weights.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.model import Model
from ..errors import CheckpointError

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
_NEVER = frozenset({".bin", ".gguf", ".pt", ".pth", ".safetensors"})

# Files whose auto_map can name Python modules.
_WITH_CODE = (
    CONFIGURATION,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_RELATIVE_IMPORT = re.compile(
    r"^\s*(?:from\s+\.(\w+)[\w.]*\s+import|import\s+\.(\w+)|from\s+\.\s+import\s+(\w+))", re.M
)


def companion_files(model: Model, tokenizer: Model | None = None) -> list[tuple[Path, str]]:
    """Lists the files to copy beside the merged weights; config.json is not among them.

    Args:
        model: The checkpoint that the output is shaped like. Where a single file was given for it, the
            directory it lies in is looked at if that holds a config.json.
        tokenizer: An adapter of it, or another model. If a tokenizer lies there, it is taken in place of the
            checkpoint's.

    Returns:
        (where a file lies, its name in the output), sorted by name.
    """
    directory = _directory(model)
    if not model.path.is_dir() and not (directory / CONFIGURATION).is_file():
        return []
    sources = [(directory, _OTHERS), (_tokenizer_directory(tokenizer) or directory, _TOKENIZER)]
    found: dict[str, Path] = {}
    for source, patterns in sources:
        for pattern in patterns:
            for path in source.glob(pattern):
                if path.is_file() and path.suffix not in _NEVER:
                    found[path.relative_to(source).as_posix()] = path
        for name in _code_files(source):
            found[name] = source / name
    return [(found[name], name) for name in sorted(found)]


def _tokenizer_directory(model: Model | None) -> Path | None:
    """The model's directory if it has a tokenizer of its own."""
    return None if model is None or not has_tokenizer(model) else _directory(model)


def has_tokenizer(model: Model) -> bool:
    """Whether a tokenizer lies beside a model's weights."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return any((_directory(model) / name).is_file() for name in names)


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
    path = _directory(model) / CONFIGURATION
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
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
        if name in found or not path.is_file():
            continue
        found.add(name)
        text = path.read_text(encoding="utf-8", errors="replace")
        for groups in _RELATIVE_IMPORT.findall(text):
            waiting.extend(f"{module}.py" for module in groups if module)
    return sorted(found)


def _mapped_modules(path: Path) -> Iterator[str]:
    """Modules of this very repository that the auto_map of a JSON file names."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
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
