"""The model that is judged, as transformers and PEFT load it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import AdapterError, AnalysisError, CheckpointError
from ..printable import printable
from .settings import JudgeSettings

__all__ = ["Loaded", "load"]

_ADAPTER = "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its tokenizer, ready to answer.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, padding on the left.
        device: Where it runs.
        adapter: Whether it is an adapter on a model.
    """

    model: Any
    tokenizer: Any
    device: str
    adapter: bool


def load(settings: JudgeSettings) -> Loaded:
    """Loads what is to be judged.

    Raises:
        AnalysisError: transformers, or for an adapter peft, is not installed; or the device is not there.
        CheckpointError: transformers cannot load the model, or there is no tokenizer.
        AdapterError: PEFT cannot load the adapter, or it is not known on what.
    """
    # Before the import: it says how it is installed, and takes no seconds.
    path = Path(settings.model).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"{printable(settings.model)} is no directory; the judge loads checkpoints and adapters"
        )
    adapter = (path / _ADAPTER).exists()
    modules = _imported("transformers", "peft") if adapter else _imported("transformers")
    import torch

    from ..analysis.device import resolve_device

    device = str(resolve_device(settings.device))
    on_cpu = device == "cpu"
    dtype = ("float32" if on_cpu else "auto") if settings.dtype == "auto" else settings.dtype
    whole = _base_of(path, settings) if adapter else str(path)
    transformers = modules[0]
    # What it says while it loads would stand between this program's own lines.
    transformers.utils.logging.disable_progress_bar()
    tokenizer = _tokenizer(transformers, path, whole, settings)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            whole, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except Exception as error:
        raise CheckpointError(f"transformers cannot load {printable(whole)}: {_sentence(error)}") from error
    if adapter:
        try:
            model = modules[1].PeftModel.from_pretrained(model, str(path))
        except Exception as error:
            raise AdapterError(
                f"peft cannot load {printable(str(path))} on {printable(whole)}: {_sentence(error)}"
            ) from error
    return Loaded(model.eval().to(device), tokenizer, device, adapter)


def _base_of(path: Path, settings: JudgeSettings) -> str:
    """What an adapter is loaded on."""
    if settings.aligned is not None:
        return os.path.expanduser(settings.aligned)
    config = read_json(path / _ADAPTER, AdapterError)
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(named, str) or not named:
        raise AdapterError(
            f"{path / _ADAPTER} does not name the model that the adapter is for; give --aligned"
        )
    return named


def _tokenizer(transformers: Any, path: Path, whole: str, settings: JudgeSettings) -> Any:
    """The model's own, else that of what it is loaded on or was made of."""
    places = [str(path), whole, *([] if settings.aligned is None else [os.path.expanduser(settings.aligned)])]
    # A directory without such a file would be searched for on the Hub, or give an empty tokenizer.
    found = [
        place
        for place in dict.fromkeys(places)
        if not os.path.isdir(place) or any((Path(place) / name).exists() for name in _TOKENIZERS)
    ]
    if not found:
        raise CheckpointError(f"{printable(str(path))} has no tokenizer; give --aligned a model that has it")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(found[0], padding_side="left")
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load the tokenizer of {printable(found[0])}: {_sentence(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        # What is padded is masked, so that any token will do.
        tokenizer.pad_token = (
            tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def _imported(*names: str) -> list[Any]:
    from importlib import import_module

    found = []
    for name in names:
        try:
            found.append(import_module(name))
        except ImportError as error:
            raise AnalysisError(
                f"judging needs {name}, which cannot be imported ({_sentence(error)}); install it with "
                f"pip install safemerge-fast[judge]"
            ) from error
    return found


def _sentence(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__, 300)
