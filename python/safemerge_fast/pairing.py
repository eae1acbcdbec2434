"""Stage 2, pairing: one row per output tensor, its counterparts by name, and whether to analyse it.

Tensors are matched by name, never by position. Only headers and configurations are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ._engine import TensorInfo
from .checkpoint import FLOATS, ROLES, Model, quantization_method
from .errors import PairingError
from .modules import (
    PROJECTION,
    classify,
    decoder_layers,
    is_float_matrix,
    is_stored_transposed,
    layer_of,
    module_type,
)
from .names import match_names
from .operand import Operand, Term
from .tied import embedding_name, is_head, ties_head

__all__ = ["Pairing", "Row", "match_names", "pair"]


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor and what it could be made of.

    Attributes:
        name: Name of the output tensor, the fine-tuned model's.
        file: The fine-tuned model's file that holds it.
        dtype: Its dtype there, e.g. "BF16".
        shape: Its shape there.
        names: Role to that role's tensor name, for the checkpoints that have it with an equal shape; adapters
            are not among them.
        module_type: "q_proj", "experts.gate_proj", "embed_tokens", "norm", …, for counts per type.
        layer: The layer it belongs to, e.g. "model.layers.7", or None.
        analysed: Whether it is to be scored.
        transposed: Whether it is stored as (in, out), as GPT-2's Conv1D does.
        reason: Why it is left out of the analysis, or "projection".
        terms: What each role's tensor is made of, for the roles that have it; those of names, which are plain
            tensors, are filled in.
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
    terms: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = {role: (Term(Operand(role, name)),) for role, name in self.names.items()}
        object.__setattr__(self, "terms", {**plain, **self.terms})


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


def pair(models: Mapping[str, Model], *, include: str | None = None, exclude: str | None = None) -> Pairing:
    """Finds the counterparts of every tensor of the fine-tuned model.

    Args:
        models: Models by role; "finetuned" must be among them. Names are matched as match_names does;
            besides, a tied head that the fine-tuned model stores and another role does not is that role's
            embedding.
        include: Regular expression (re.search) on names: analyses what is left out by default, if it is 2-D
            float.
        exclude: Regular expression (re.search) on names: leaves out what it matches, whatever include says.

    Returns:
        The pairing.

    Raises:
        PairingError: No fine-tuned model is given, a pattern is malformed, or a tensor to be analysed is
            missing or of another shape in a role.
    """
    if "finetuned" not in models:
        raise PairingError("pairing needs the fine-tuned model; give --finetuned")
    finetuned = models["finetuned"]
    tensors = _in_file_order(finetuned)
    selection = _Selection(include, exclude, tensors)
    others = {role: models[role] for role in ROLES if role in models and role != "finetuned"}
    notes: list[str] = []
    matches: dict[str, dict[str, str]] = {}
    for role, model in others.items():
        matches[role], found = _counterparts(tensors, model)
        notes += found
    layers = decoder_layers(finetuned.config)
    rows: list[Row] = []
    unfit: list[str] = []
    kept: list[str] = []
    for tensor in tensors:
        kind = classify(tensor, layers)
        reason = selection.reason(tensor, kind)
        analysed = reason == PROJECTION
        names, faults = {"finetuned": tensor.name}, []
        for role, model in others.items():
            name = matches[role].get(tensor.name)
            fault = "missing" if name is None else _difference(tensor, model.headers.tensor(name))
            if name is None or fault is not None:
                faults.append(f"{fault} in {role}")
            else:
                names[role] = name
        if faults:
            sentence = f"{tensor.name} is {_shape(tensor)} in finetuned but {' and '.join(faults)}"
            (unfit if analysed else kept).append(sentence)
            reason = f"{reason}, {', '.join(faults)}"
        rows.append(
            Row(
                name=tensor.name,
                file=tensor.file,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                names=names,
                module_type=module_type(tensor.name, kind),
                layer=layer_of(tensor.name),
                analysed=analysed,
                transposed=is_stored_transposed(tensor, finetuned.config),
                reason=reason,
            )
        )
    if unfit:
        more = f" (and {len(unfit) - 1} more tensors do not fit)" if len(unfit) > 1 else ""
        raise PairingError(
            f"{unfit[0]}{more}; give models of one architecture, "
            f"or leave such tensors out with --exclude REGEX"
        )
    unused = _unused(rows, others)
    notes += _kept_notes(kept) + _unused_notes(unused) + selection.notes() + _config_notes(models)
    return Pairing(tuple(rows), unused, tuple(notes))


def _counterparts(tensors: Sequence[TensorInfo], other: Model) -> tuple[dict[str, str], list[str]]:
    """Maps names of the fine-tuned model to another model's; and says what was not an exact match."""
    notes = []
    found = match_names(
        [tensor.name for tensor in tensors], [tensor.name for tensor in other.headers.tensors]
    )
    renamed = [name for name, match in found.items() if name != match]
    if renamed:
        notes.append(
            f"{len(renamed)} tensors have other names in {other.role}, "
            f"such as {found[renamed[0]]} for {renamed[0]}"
        )
    embedding = embedding_name(found)
    for tensor in tensors:
        if tensor.name in found or embedding is None or not is_head(tensor.name):
            continue
        if ties_head(other.config):
            found[tensor.name] = found[embedding]
            notes.append(
                f"{tensor.name} is not stored in {other.role}, which ties it to {found[embedding]}; "
                f"that is taken for it"
            )
    return found, notes


class _Selection:
    """Applies --include and --exclude, and remembers what they did."""

    def __init__(self, include: str | None, exclude: str | None, tensors: Sequence[TensorInfo]) -> None:
        self._include = _compile("--include", include)
        self._exclude = _compile("--exclude", exclude)
        self._notes: list[str] = []
        self._impossible: list[str] = []
        for flag, pattern in (("--include", self._include), ("--exclude", self._exclude)):
            if pattern is not None and not any(pattern.search(tensor.name) for tensor in tensors):
                self._notes.append(f"{flag} {pattern.pattern} matches no tensor of the fine-tuned model")

    def reason(self, tensor: TensorInfo, kind: str) -> str:
        """Says why a tensor is left out of the analysis, or PROJECTION; kind is what classify says of it."""
        if self._exclude is not None and self._exclude.search(tensor.name):
            return kind if kind != PROJECTION else "excluded"
        if kind == PROJECTION or self._include is None or not self._include.search(tensor.name):
            return kind
        if is_float_matrix(tensor):
            return PROJECTION
        self._impossible.append(f"{tensor.name} ({kind})")
        return kind

    def notes(self) -> list[str]:
        """What a person should know of the patterns."""
        if not self._impossible:
            return self._notes
        count, first = len(self._impossible), self._impossible[0]
        return [*self._notes, f"--include matches {count} tensors that are not 2-D float, such as {first}"]


def _compile(flag: str, pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PairingError(f"{flag} {pattern} is not a regular expression: {error}") from error


def _in_file_order(model: Model) -> list[TensorInfo]:
    """Tensors by file, and by offset within a file, which is the order in which the headers list them."""
    places = {file: place for place, file in enumerate(model.headers.files)}
    return sorted(model.headers.tensors, key=lambda tensor: places[tensor.file])


def _difference(mine: TensorInfo, other: TensorInfo) -> str | None:
    """Says what of another model's tensor does not fit, or returns None."""
    if tuple(other.shape) != tuple(mine.shape):
        return _shape(other)
    if (other.dtype in FLOATS) != (mine.dtype in FLOATS):
        return other.dtype
    return None


def _shape(tensor: TensorInfo) -> str:
    return str(tuple(tensor.shape))


def _unused(rows: Iterable[Row], others: Mapping[str, Model]) -> dict[str, tuple[str, ...]]:
    """Lists what no row uses, by role."""
    used = {(role, name) for row in rows for role, name in row.names.items()}
    return {
        role: tuple(tensor.name for tensor in model.headers.tensors if (role, tensor.name) not in used)
        for role, model in others.items()
    }


def _kept_notes(kept: Sequence[str]) -> list[str]:
    """Notes on tensors that are not analysed and whose counterparts do not fit; a few one by one."""
    notes = [f"{sentence}; the fine-tuned tensor is kept" for sentence in kept[:4]]
    if len(kept) > 4:
        notes.append(f"{len(kept) - 4} more tensors that are not analysed do not fit and are kept")
    return notes


def _unused_notes(unused: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{len(names)} tensors of {role} have no counterpart in the fine-tuned model and are not used, "
        f"such as {names[0]}"
        for role, names in unused.items()
        if names
    ]


def _config_notes(models: Mapping[str, Model]) -> list[str]:
    """Notes on configurations that say something else than the tensors."""
    return [
        f"the config.json of {role} speaks of quantisation ({method}), "
        f"but all its weights are stored in full precision"
        for role, model in models.items()
        if (method := quantization_method(model.config)) is not None
    ]
