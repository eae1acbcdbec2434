"""Stage 2, pairing: one row per output tensor, with its counterparts by name and whether it is to be analysed.

Tensors are matched by name, never by position. Pure: only headers and configurations are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ._engine import TensorInfo
from .checkpoint import FLOATS, ROLES, Model, quantization_method
from .errors import PairingError

__all__ = ["Pairing", "Row", "pair"]


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor and what it could be made of.

    Attributes:
        name: Name of the output tensor, the fine-tuned model's.
        file: The fine-tuned model's file that holds it.
        dtype: Its dtype there, e.g. "BF16".
        shape: Its shape there.
        names: Role to that role's tensor name, for the roles that have it with an equal shape; always "finetuned".
        module_type: "q_proj", "experts.gate_proj", "embed_tokens", "norm", …, for counts per type.
        layer: The layer it belongs to, e.g. "model.layers.7", or None.
        analysed: Whether it is to be scored.
        transposed: Whether it is stored as (in, out), as GPT-2's Conv1D does.
        reason: Why it is left out of the analysis, or "projection".
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    names: Mapping[str, str]
    module_type: str
    layer: str | None
    analysed: bool
    transposed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """All rows of a merge.

    Attributes:
        rows: In the order of the fine-tuned model's files, and of offsets within a file.
        unused: For each other role, its tensors that no row uses.
        notes: What a person should know, in sentences.
    """

    rows: tuple[Row, ...]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def pair(
    models: Mapping[str, Model], *, include: str | None = None, exclude: str | None = None
) -> Pairing:
    """Finds the counterparts of every tensor of the fine-tuned model.

    A tensor is matched by its exact name; else by the only name that is it with, or without, a prefix; else by the
    only name with the same part from the layers' list on (`model.language_model.layers.0…` and
    `language_model.model.layers.0…`). A tied head that one role stores and another does not is the embedding.

    Args:
        models: Models by role; "finetuned" must be among them.
        include: Regular expression (re.search) on names: analyses what is left out by default, if it is 2-D float.
        exclude: Regular expression (re.search) on names: leaves out what it matches, whatever include says.

    Returns:
        The pairing.

    Raises:
        PairingError: A pattern is malformed, or a tensor to be analysed is missing or of another shape in a role.
    """
    finetuned = models["finetuned"]
    included, excluded = _compile("--include", include), _compile("--exclude", exclude)
    others = {role: models[role] for role in ROLES if role in models and role != "finetuned"}
    notes: list[str] = []
    matches = {role: _match(finetuned, model, notes) for role, model in others.items()}
    rows: list[Row] = []
    problems: list[str] = []
    missing: dict[str, list[str]] = {role: [] for role in others}
    decoder_layers = _decoder_layers(finetuned.config)
    conv1d = _is_conv1d_model(finetuned.config)
    files = {file: place for place, file in enumerate(finetuned.headers.files)}
    for info in sorted(finetuned.headers.tensors, key=lambda info: files[info.file]):
        reason = _classify(info, decoder_layers)
        analysed = reason == "projection"
        if included and included.search(info.name) and not analysed and _is_float_matrix(info):
            analysed, reason = True, "projection"
        if excluded and excluded.search(info.name):
            analysed, reason = False, "excluded"
        names = {"finetuned": info.name}
        faults: list[str] = []
        for role, model in others.items():
            name = matches[role].get(info.name)
            if name is None:
                faults.append(f"missing in {role}")
                if not analysed:
                    missing[role].append(info.name)
                continue
            other = model.headers.tensor(name)
            if other.shape != info.shape:
                faults.append(f"{_shape(other.shape)} in {role}")
                if not analysed:
                    notes.append(
                        f"{info.name} is {_shape(info.shape)} in finetuned but {_shape(other.shape)} in {role}; "
                        f"the fine-tuned tensor is kept"
                    )
            elif (other.dtype in FLOATS) != (info.dtype in FLOATS):
                faults.append(f"{other.dtype} in {role}")
            else:
                names[role] = name
        if faults and analysed:
            problems.append(f"{info.name} is {_shape(info.shape)} in finetuned but {', '.join(faults)}")
        rows.append(
            Row(
                name=info.name,
                file=info.file,
                dtype=info.dtype,
                shape=info.shape,
                names=names,
                module_type=_module_type(info.name, reason),
                layer=_layer(info.name),
                analysed=analysed,
                transposed=conv1d and _leaf(info.name) in _CONV1D_MODULES and len(info.shape) == 2,
                reason=reason if not faults else f"{reason}, {', '.join(faults)}",
            )
        )
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise PairingError(
            f"{problems[0]}{more}; give models of one architecture, or leave such tensors out with --exclude REGEX"
        )
    unused = _unused(rows, others)
    notes += _more_notes(models, rows, missing, unused, include, exclude)
    return Pairing(tuple(rows), unused, tuple(notes))


# --- counterparts ---------------------------------------------------------------------------------------------------


def _match(finetuned: Model, other: Model, notes: list[str]) -> dict[str, str]:
    """Maps names of the fine-tuned model to names of another one, and notes what was not an exact match."""
    mine = [tensor.name for tensor in finetuned.headers.tensors]
    theirs = {tensor.name for tensor in other.headers.tensors}
    found = {name: name for name in mine if name in theirs}
    for keys in (_suffixes, _from_layers):
        left = [name for name in mine if name not in found]
        rest = sorted(theirs - set(found.values()))
        renamed = match_by_tail(left, rest, keys)
        if renamed:
            mine_first, theirs_first = next(iter(renamed.items()))
            notes.append(
                f"{len(renamed)} tensor(s) have another prefix in {other.role}, e.g. {theirs_first} for {mine_first}"
            )
        found |= renamed
    for head in (name for name in mine if name not in found and _TIED_HEAD.search(name)):
        embedding = next((name for name in mine if name in found and _TIED_EMBEDDING.search(name)), None)
        if embedding is not None and _ties_head(other.config):
            found[head] = found[embedding]
            notes.append(f"{head} is not stored in {other.role}, which ties it to {found[embedding]}: taken from there")
    return found
