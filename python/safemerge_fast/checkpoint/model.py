"""Stage 1, checkpoint: from what the user typed to a local model with validated headers.

Resolves a directory, a .safetensors file, an address in an object store or a repository of the Hugging Face Hub, and
refuses by name what cannot be merged exactly: adapters, pickles and quantised weights. Nothing of the tensors' data is
read here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import _engine
from ..addresses import is_url
from ..documents import read_json
from ..errors import AdapterError, CheckpointError
from ..printable import printable
from .foreign import FLOATS, Foreign, quantization_method, recognise
from .hub import download
from .remote import address, mirror

__all__ = [
    "ANYHOW",
    "FLOATS",
    "ROLES",
    "Access",
    "ExpertLayout",
    "Model",
    "locate",
    "open_model",
    "quantization_method",
]

ROLES = ("base", "aligned", "finetuned", "safe")
"""The parts that a model can play, in the order in which reports name them."""

_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

ExpertLayout = Literal["peft", "unsloth"]
"""Who trained LoRA of fused experts: PEFT, whose B is (out, rank, experts), or Unsloth: (out, experts, rank)."""

# What the pairing relies on; other fields of a wrong kind do no harm here.
_FIELDS = (("model_type", str, "a text"), ("tie_word_embeddings", bool, "true or false"))


@dataclass(frozen=True, slots=True)
class Access:
    """How models are found and read.

    Attributes:
        read_backend: How the engine reads their files, see `_engine.Checkpoint`.
        bars: Whether downloads show the Hub's bars on stderr.
        expert_layout: How adapters lay out B of stacked experts, where they have any.
    """

    read_backend: Literal["auto", "mmap", "pread"] = "auto"
    bars: bool = True
    expert_layout: ExpertLayout = "peft"


ANYHOW = Access()
"""What serves where nobody has asked for anything."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model, found and opened: its headers are validated, its data is mapped and not read.

    Attributes:
        role: The part it plays, one of ROLES.
        spec: What the user typed.
        path: The local directory or file; of a model that lies elsewhere, its mirror (see remote.py).
        headers: Names, dtypes, shapes and places of its tensors.
        config: Its config.json; empty when there is none.
        foreign: What of its weights the engine does not decode; None but for models that are only looked at.
    """

    role: str
    spec: str
    path: Path
    headers: _engine.Checkpoint
    config: dict[str, Any]
    foreign: Foreign | None = field(default=None, kw_only=True)

    @property
    def location(self) -> str:
        """Where it lies: its path, or its address if it lies elsewhere."""
        return address(self.path)


def locate(role: str, spec: str | os.PathLike[str], *, access: Access = ANYHOW) -> Path:
    """Finds what a person typed for a role.

    Args:
        role: Error messages name it.
        spec: A path, or the address of a directory or file in a store or on a server, or (only when no such path
            exists) `org/name[@revision]` on the Hub, which is downloaded into the Hub's own cache.
        access: Whether a download shows the Hub's bars.

    Returns:
        An absolute local path, which exists; of what lies elsewhere, that of its mirror.

    Raises:
        CheckpointError: There is no such path or repository.
    """
    typed = os.fspath(spec)
    if not _is_utf8(typed):
        raise CheckpointError(f"{role}: the path {printable(typed)} is not UTF-8; rename what lies there")
    if isinstance(spec, str) and is_url(typed):
        return mirror(role, typed)
    path = _local(role, typed)
    if path is None:
        match = _REPOSITORY.fullmatch(typed) if isinstance(spec, str) else None
        if match is None:
            raise CheckpointError(
                f"{role}: {printable(typed)} does not exist; give a checkpoint directory or org/name[@revision]"
            )
        path = download(role, match["name"], match["revision"], progress=access.bars)
    return path.absolute()


def _local(role: str, typed: str) -> Path | None:
    """The path that was typed, if there is something."""
    try:
        path = Path(typed).expanduser()
        return path if path.exists() else None
    except RuntimeError as error:
        raise CheckpointError(
            f"{role}: {printable(typed)} names a user that this machine does not have"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{role}: {printable(typed)} cannot be read: {error.strerror}") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_model(
    role: str,
    spec: str | os.PathLike[str],
    path: Path | None = None,
    *,
    access: Access = ANYHOW,
    foreign: bool = False,
) -> Model:
    """Finds and opens the checkpoint of one role.

    Args:
        role: One of ROLES; error messages name it.
        spec: A directory, a .safetensors file, or a repository, as locate takes it.
        path: Where it lies, if that is known already.
        access: How it is read, and whether a download shows the Hub's bars.
        foreign: Whether weights that the engine does not decode are no error, since they are only looked at.

    Returns:
        The model.

    Raises:
        CheckpointError: There is no such path or repository, it holds no safetensors, its headers or
            config.json are malformed, or its weights are quantised.
        AdapterError: It is a PEFT adapter.
    """
    path = locate(role, spec, access=access) if path is None else path
    _check_files(role, path)
    headers = _engine.Checkpoint(address(path), read_backend=access.read_backend)
    model = Model(role, os.fspath(spec), path, headers, _read_config(role, path))
    _refuse_adapter(model)
    found = recognise(headers.tensors, model.config)
    if found is not None and not foreign:
        raise CheckpointError(found.refusal(role, path))
    return model if found is None else replace(model, foreign=found)


def _check_files(role: str, path: Path) -> None:
    """Refuses what holds no safetensors weights, with the way out for the usual cases."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{role}: {path} is not a .safetensors file; {_instead(path)}")
        _refuse_single_shard(role, path)
        return
    if not path.is_dir():
        raise CheckpointError(f"{role}: {path} is neither a directory nor a regular file")
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{role}: {path} cannot be read: {error.strerror}") from error
    whole_model = "model.safetensors" in names or "model.safetensors.index.json" in names
    if "adapter_config.json" in names and not whole_model:
        raise AdapterError(
            f"{role}: {path} is a PEFT adapter; give a whole checkpoint here "
            f"(in a merge, finetuned and safe may be adapters)"
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if any(name.endswith(".safetensors.index.json") for name in names):
        return
    if len(weights) == 1:
        _refuse_single_shard(role, path / weights[0])
        _refuse_mistral_format(role, path / weights[0])
    elif not weights:
        try:
            # The engine knows what may stand in place of weights.
            _engine.Checkpoint(address(path))
        except CheckpointError as error:
            raise CheckpointError(f"{role}: {error}") from None


_SHARD = re.compile(r".*-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")


def _refuse_single_shard(role: str, file: Path) -> None:
    """Refuses one shard of several, which by itself would pass for a small model."""
    match = _SHARD.fullmatch(file.name)
    if match is not None and int(match["count"]) > 1:
        raise CheckpointError(
            f"{role}: {file} is shard {int(match['number'])} of {int(match['count'])}, not a whole model; give the "
            f"directory that holds all of them and their index"
        )


def _refuse_mistral_format(role: str, file: Path) -> None:
    """Refuses weights whose names transformers does not know, beside which an output would hold another config.json."""
    if file.name == "consolidated.safetensors":
        raise CheckpointError(
            f"{role}: {file} is in Mistral's own format; give the release for transformers (model.safetensors), or "
            f"convert it with transformers 4's convert_mistral_weights_to_hf.py"
        )


def _instead(file: Path) -> str:
    """What to give in place of a file that is no weights in safetensors."""
    if file.name.endswith(".safetensors.index.json"):
        return "give the checkpoint's directory"
    if file.suffix == ".gguf":
        return "give the checkpoint that the GGUF was made of"
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "it is a pickle; convert it: load the model with transformers and save_pretrained it"
    return "give one, or the checkpoint's directory"


def _read_config(role: str, path: Path) -> dict[str, Any]:
    """Reads config.json in the directory, or beside the file."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    # Some configurations have Infinity in them.
    config = read_json(file, CheckpointError, subject=f"{role}: {file}", nonfinite=True, optional=True)
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{role}: {file} should hold a JSON object, not a {type(config).__name__}")
    text = config.get("text_config")
    for where, part in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        for name, kind, word in _FIELDS:
            value = part.get(name)
            if value is not None and not isinstance(value, kind):
                raise CheckpointError(
                    f"{role}: {file}: {where}{name} should be {word}, not {printable(repr(value), 80)}"
                )
    return config


def _refuse_adapter(model: Model) -> None:
    """Refuses an adapter that came as a bare file."""
    for tensor in model.headers.tensors:
        if ".lora_A." in tensor.name or ".lora_B." in tensor.name or ".lora_embedding_A" in tensor.name:
            raise AdapterError(
                f"{model.role}: {model.path} is a PEFT adapter (it holds {tensor.name}) without its "
                f"adapter_config.json beside it, and its scale stands there; give the adapter's directory"
            )
