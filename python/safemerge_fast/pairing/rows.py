"""Stage 2, pairing: one row per output tensor, its counterparts by name, and whether to analyse it.

Tensors are matched by name, never by position. Only headers and configurations are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from .._engine import Checkpoint, TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import FLOATS, ROLES, Model, quantization_method
from ..errors import PairingError
from ..patterns import compile_pattern
from .adapter_terms import adapter_notes, adapter_terms
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

__all__ = [
    "Counterparts",
    "Pairing",
    "Row",
    "SameName",
    "counterparts",
    "in_file_order",
    "match_names",
    "pair",
    "pair_adapter",
]


class SameName(Mapping[str, str]):
    """The names of a tensor that is called the same in every role; models have a hundred thousand of them."""

    __slots__ = ("_name", "_roles")

    def __init__(self, name: str, roles: tuple[str, ...]) -> None:
        """Holds one name.

        Args:
            name: The name.
            roles: The roles that have it; one tuple for many tensors.
        """
        self._name = name
        self._roles = roles

    def __getitem__(self, role: str) -> str:
        if role in self._roles:
            return self._name
        raise KeyError(role)

    def __contains__(self, role: object) -> bool:
        return role in self._roles

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)


_Value = TypeVar("_Value")

_NOT_ADAPTED: Mapping[str, tuple[Term, ...]] = {}


class Row(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One output tensor and what it could be made of.

    Attributes:
        name: Name of the output tensor, the fine-tuned model's (the aligned model's if that is an adapter).
        file: That model's file that holds it.
        dtype: Its dtype there, e.g. "BF16".
        shape: Its shape there.
        names: Role to that role's tensor name, for the checkpoints that have it with an equal shape; adapters
            are not among them.
        module_type: "q_proj", "experts.gate_proj", "embed_tokens", "norm", …, for counts per type.
        layer: The layer it belongs to, e.g. "model.layers.7", or None.
        analysed: Whether it is to be scored.
        transposed: Whether it is stored as (in, out), as GPT-2's Conv1D does.
        reason: Why it is left out of the analysis, or "projection".
        adapted: What adapters make of it, by role; a role is there if it is an adapter.
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
    adapted: Mapping[str, tuple[Term, ...]] = _NOT_ADAPTED

    @property
    def terms(self) -> Mapping[str, tuple[Term, ...]]:
        """What each role's tensor is made of, for the roles that have it."""
        plain = {role: (Term(Operand(role, name)),) for role, name in self.names.items()}
        return {**plain, **self.adapted}

    def has(self, role: str) -> bool:
        """Whether a role has the tensor, or makes it."""
        return role in self.names or role in self.adapted

    def is_plain(self, role: str) -> bool:
        """Whether a role has the tensor stored under the row's own name."""
        return role not in self.adapted and role in self.names and self.names[role] == self.name


@dataclass(frozen=True, slots=True)
class Pairing:
    """All rows of a merge.

    Attributes:
        rows: In the order of the fine-tuned (or, if that is an adapter, the aligned) model's files, and of
            offsets within a file.
        unused: For each other role, its tensors that no row uses; for an adapter, those it adapts.
        notes: What a person should know, in sentences.
    """

    rows: tuple[Row, ...]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def pair(
    models: Mapping[str, Model],
    *,
    include: str | None = None,
    exclude: str | None = None,
    analyse: bool = True,
) -> Pairing:
    """Finds the counterparts of every tensor of the fine-tuned model.

    An adapter stands for the aligned model with some of its tensors changed. If the fine-tuned model is one,
    rows are the aligned model's tensors, and only those that it adapts are analysed.

    Args:
        models: Models by role; "finetuned" must be among them, and "aligned" if one is an adapter. Names are
            matched as match_names does; besides, a tied head that the fine-tuned model stores and another
            role does not is that role's embedding.
        include: Regular expression on names: analyses what is left out by default, if it is 2-D
            float.
        exclude: Regular expression on names: leaves out what it matches, whatever include says.
        analyse: Whether anything is to be analysed; without, tensors that do not fit are kept.

    Returns:
        The pairing.

    Raises:
        PairingError: No fine-tuned model is given, a pattern is malformed, or a tensor to be analysed is
            missing or of another shape in a role.
        AdapterError: An adapter does not fit the aligned model.
    """
    if "finetuned" not in models:
        raise PairingError("pairing needs the fine-tuned model; give --finetuned")
    adapted, notes = _adapted(models)
    # What rows are made from: the fine-tuned model, or the one that it is an adapter of.
    anchor = models["aligned" if "finetuned" in adapted else "finetuned"]
    tensors = in_file_order(anchor)
    selection = _Selection(include, exclude)
    others = {
        role: models[role] for role in ROLES if role in models and role not in adapted and role != anchor.role
    }
    matches: dict[str, Counterparts] = {}
    for role, model in others.items():
        matches[role], found = counterparts(anchor.headers, model)
        notes += found
    layers = decoder_layers(anchor.config)
    shared = _Shared((anchor.role, *others))
    rows: list[Row] = []
    unfit: list[str] = []
    kept: list[str] = []
    for tensor in tensors:
        own = tensor.name
        kind = classify(tensor, layers)
        reason = selection.reason(tensor, own, kind)
        if reason == PROJECTION and "finetuned" in adapted and own not in adapted["finetuned"]:
            reason = _not_adapted(own, adapted)
        analysed = analyse and reason == PROJECTION
        names: dict[str, str] = {anchor.role: own}
        faults = []
        for role, model in others.items():
            name = matches[role].get(own)
            fault = "missing" if name is None else _difference(tensor, model.headers.tensor(name))
            if name is None or fault is not None:
                faults.append(f"{fault} in {role}")
            else:
                names[role] = name
        if faults:
            sentence = f"{own} is {_shape(tensor)} in {anchor.role} but {' and '.join(faults)}"
            (unfit if analysed else kept).append(sentence)
            reason = f"{reason}, {', '.join(faults)}"
        rows.append(
            Row(
                name=own,
                file=shared(tensor.file),
                dtype=shared(tensor.dtype),
                shape=shared(tensor.shape),
                names=shared.names(own, names),
                module_type=shared(module_type(own, kind)),
                layer=shared(layer_of(own)),
                analysed=analysed,
                transposed=_is_transposed(tensor, anchor, adapted),
                reason=reason,
                adapted=_adapter_terms(names.get("aligned"), adapted) if adapted else _NOT_ADAPTED,
            )
        )
    if unfit:
        more = f" (and {len(unfit) - 1} more tensors do not fit)" if len(unfit) > 1 else ""
        raise PairingError(
            f"{unfit[0]}{more}; give models of one architecture, "
            f"or leave such tensors out with --exclude REGEX"
        )
    unused = {**_unused(rows, others), **_unused_adapted(rows, adapted)}
    notes += _kept_notes(kept) + _unused_notes(unused) + selection.notes() + _config_notes(models)
    return Pairing(tuple(rows), unused, tuple(notes))


def pair_adapter(model: Model, adapter: Adapter) -> Pairing:
    """Pairs a checkpoint with an adapter of it alone; nothing is to be analysed.

    Args:
        model: The checkpoint.
        adapter: The adapter.

    Returns:
        A row per tensor of the checkpoint; both roles' terms are in each.

    Raises:
        AdapterError: The adapter does not fit the checkpoint.
    """
    adapted = adapter_terms(adapter, model)
    layers = decoder_layers(model.config)
    shared = _Shared((model.role,))
    rows = tuple(
        Row(
            name=tensor.name,
            file=shared(tensor.file),
            dtype=shared(tensor.dtype),
            shape=shared(tensor.shape),
            names={model.role: tensor.name},
            module_type=shared(module_type(tensor.name, classify(tensor, layers))),
            layer=shared(layer_of(tensor.name)),
            analysed=False,
            transposed=is_stored_transposed(tensor, model.config),
            reason="adapted" if tensor.name in adapted else "not adapted",
            adapted={adapter.role: adapted.get(tensor.name, (Term(Operand(model.role, tensor.name)),))},
        )
        for tensor in in_file_order(model)
    )
    notes = (*adapter_notes(adapter, model, adapted), *_config_notes({model.role: model}))
    return Pairing(rows, {}, notes)


_Adapted = Mapping[str, Mapping[str, tuple[Term, ...]]]
"""The terms of adapted tensors by role and by the aligned model's names; a role is there if it is an adapter."""


def _adapted(models: Mapping[str, Model]) -> tuple[_Adapted, list[str]]:
    """Finds out what the adapters among the models do to the aligned one, and what to say of it."""
    adapted: dict[str, Mapping[str, tuple[Term, ...]]] = {}
    notes: list[str] = []
    for role, model in models.items():
        if not isinstance(model, Adapter):
            continue
        if "aligned" not in models:
            raise PairingError(
                f"{role} is an adapter, which needs the model it was trained on; give --aligned"
            )
        adapted[role] = adapter_terms(model, models["aligned"])
        notes += adapter_notes(model, models["aligned"], adapted[role])
    return adapted, notes


def _adapter_terms(aligned: str | None, adapted: _Adapted) -> dict[str, tuple[Term, ...]]:
    """What the adapters make of one tensor of the aligned model: those that do not adapt it leave it as it is."""
    if aligned is None:
        return {}
    plain = (Term(Operand("aligned", aligned)),)
    return {role: terms.get(aligned, plain) for role, terms in adapted.items()}


def _not_adapted(name: str, adapted: _Adapted) -> str:
    """Why a projection that the fine-tuned adapter leaves alone is not analysed: its update is zero."""
    return "only the safe adapter changes it" if name in adapted.get("safe", ()) else "not adapted"


def _is_transposed(tensor: TensorInfo, anchor: Model, adapted: _Adapted) -> bool:
    """Whether a tensor is stored as (in, out), as the model type says or the shapes of adapters' factors."""
    terms = adapted.get("finetuned", {}).get(tensor.name, ())
    products = [product for term in terms for product in term.operand.low_rank]
    if products:
        return products[0].transpose
    return is_stored_transposed(tensor, anchor.config)


class _Shared:
    """Gives one object for equal values, so that a hundred thousand rows hold few."""

    def __init__(self, roles: tuple[str, ...]) -> None:
        """Starts with no value known.

        Args:
            roles: The roles that a tensor may have a name in.
        """
        self._known: dict[Any, Any] = {}
        self._roles = roles

    def __call__(self, value: _Value) -> _Value:
        """The first value that was equal to this one."""
        found: _Value = self._known.setdefault(value, value)
        return found

    def names(self, own: str, names: dict[str, str]) -> Mapping[str, str]:
        """The same names, in less memory where they are all one."""
        if any(name != own for name in names.values()):
            return names
        return SameName(own, self(tuple(names)))


class Counterparts:
    """The names that one model's tensors have in another model: mostly their own."""

    def __init__(self, headers: Checkpoint, renamed: Mapping[str, str]) -> None:
        """Holds what differs.

        Args:
            headers: The other model's.
            renamed: Names that are others there.
        """
        self._headers = headers
        self._renamed = renamed

    def get(self, name: str) -> str | None:
        """The counterpart of a name, or None."""
        return name if name in self._headers else self._renamed.get(name)


def counterparts(names: Checkpoint | Sequence[str], other: Model) -> tuple[Counterparts, list[str]]:
    """Maps names of one model's tensors to another model's; and says what was not an exact match.

    Args:
        names: Names of the one model, or its headers; a head that the other does not store because it ties it is the
            embedding.
        other: The other model.

    Returns:
        The counterpart of each name that has one, and notes.
    """
    notes = []
    all_names = names if isinstance(names, Sequence) else names.names
    headers = other.headers
    lost = [name for name in all_names if name not in headers]
    renamed: dict[str, str] = {}
    if lost:
        known = set(all_names)
        left = [name for name in headers.names if name not in known]
        renamed = match_names(lost, left)
        if renamed:
            first = next(iter(renamed))
            notes.append(
                f"{len(renamed)} tensors have other names in {other.role}, such as {renamed[first]} for {first}"
            )
    heads = [name for name in lost if name not in renamed and is_head(name)]
    if heads and ties_head(other.config):
        # Names of a part of a model may be without its embedding.
        embedding = embedding_name(name for name in all_names if name in headers or name in renamed)
        tied = embedding_name(headers.names) if embedding is None else renamed.get(embedding, embedding)
        for name in heads:
            if tied is not None:
                renamed[name] = tied
                notes.append(
                    f"{name} is not stored in {other.role}, which ties it to {tied}; that is taken for it"
                )
    return Counterparts(headers, renamed), notes


class _Selection:
    """Applies --include and --exclude, and remembers what they did."""

    def __init__(self, include: str | None, exclude: str | None) -> None:
        self._include = _Pattern("--include", include)
        self._exclude = _Pattern("--exclude", exclude)
        self._impossible: list[str] = []

    def reason(self, tensor: TensorInfo, name: str, kind: str) -> str:
        """Says why a tensor is left out of the analysis, or PROJECTION; kind is what classify says of it."""
        included = self._include.matches(name)
        if self._exclude.matches(name):
            return kind if kind != PROJECTION else "excluded"
        if kind == PROJECTION or not included:
            return kind
        if is_float_matrix(tensor):
            return PROJECTION
        self._impossible.append(f"{name} ({kind})")
        return kind

    def notes(self) -> list[str]:
        """What a person should know of the patterns; to be asked when all tensors were looked at."""
        notes = [
            f"{pattern.flag} {pattern.text} matches no tensor of the fine-tuned model"
            for pattern in (self._include, self._exclude)
            if pattern.text is not None and not pattern.has_matched
        ]
        if self._impossible:
            count, first = len(self._impossible), self._impossible[0]
            notes.append(f"--include matches {count} tensors that are not 2-D float, such as {first}")
        return notes


class _Pattern:
    """A pattern that may not be given, and whether it ever matched."""

    def __init__(self, flag: str, text: str | None) -> None:
        self.flag = flag
        self.text = text
        self.has_matched = False
        self._pattern = None if text is None else compile_pattern(flag, text, PairingError)

    def matches(self, name: str) -> bool:
        """Whether a part of the name matches."""
        found = self._pattern is not None and self._pattern.search(name)
        self.has_matched |= found
        return found


def in_file_order(model: Model) -> list[TensorInfo]:
    """Tensors by file, and by offset within a file, which is the order in which the headers list them."""
    return model.headers.tensors


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
    rows = list(rows)
    unused = {}
    for role, model in others.items():
        plain = sum(row.is_plain(role) for row in rows)
        used = {row.names[role] for row in rows if role in row.names} if plain < len(model.headers) else set()
        unused[role] = tuple(
            name for name in (model.headers.names if plain < len(model.headers) else ()) if name not in used
        )
    return unused


def _unused_adapted(rows: Iterable[Row], adapted: _Adapted) -> dict[str, tuple[str, ...]]:
    """Lists the aligned model's tensors that an adapter changes and no row is made of, by role."""
    used = {row.names.get("aligned") for row in rows}
    return {role: tuple(name for name in terms if name not in used) for role, terms in adapted.items()}


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
