"""Stage 2, pairing: one row per output tensor, its counterparts by name, and whether to analyse it.

Tensors are matched by name, never by position. Only headers and configurations are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from .._engine import TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import FLOATS, ROLES, Model, quantization_method
from ..errors import PairingError
from ..patterns import Pattern, compile_pattern
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


def pair(models: Mapping[str, Model], *, include: str | None = None, exclude: str | None = None) -> Pairing:
    """Finds the counterparts of every tensor of the fine-tuned model.

    An adapter stands for the aligned model with some of its tensors changed. If the fine-tuned model is one,
    rows are the aligned model's tensors, and only those that it adapts are analysed.

    Args:
        models: Models by role; "finetuned" must be among them, and "aligned" if one is an adapter. Names are
            matched as match_names does; besides, a tied head that the fine-tuned model stores and another
            role does not is that role's embedding.
        include: Regular expression on parts of names: analyses what is left out by default, if it is 2-D
            float.
        exclude: Regular expression on parts of names: leaves out what it matches, whatever include says.

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
    selection = _Selection(include, exclude, tensors)
    others = {
        role: models[role] for role in ROLES if role in models and role not in adapted and role != anchor.role
    }
    matches: dict[str, dict[str, str]] = {}
    for role, model in others.items():
        matches[role], found = counterparts([tensor.name for tensor in tensors], model)
        notes += found
    layers = decoder_layers(anchor.config)
    rows: list[Row] = []
    unfit: list[str] = []
    kept: list[str] = []
    for tensor in tensors:
        kind = classify(tensor, layers)
        reason = selection.reason(tensor, kind)
        if reason == PROJECTION and "finetuned" in adapted and tensor.name not in adapted["finetuned"]:
            reason = _not_adapted(tensor.name, adapted)
        analysed = reason == PROJECTION
        names, faults = {anchor.role: tensor.name}, []
        for role, model in others.items():
            name = matches[role].get(tensor.name)
            fault = "missing" if name is None else _difference(tensor, model.headers.tensor(name))
            if name is None or fault is not None:
                faults.append(f"{fault} in {role}")
            else:
                names[role] = name
        if faults:
            sentence = f"{tensor.name} is {_shape(tensor)} in {anchor.role} but {' and '.join(faults)}"
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
    rows = tuple(
        Row(
            name=tensor.name,
            file=tensor.file,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            names={model.role: tensor.name},
            module_type=module_type(tensor.name, classify(tensor, layers)),
            layer=layer_of(tensor.name),
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


def counterparts(names: Sequence[str], other: Model) -> tuple[dict[str, str], list[str]]:
    """Maps names of one model's tensors to another model's; and says what was not an exact match.

    Args:
        names: Names of the one model; a head that the other does not store because it ties it is the embedding.
        other: The other model.

    Returns:
        The counterpart of each name that has one, and notes.
    """
    notes = []
    found = match_names(names, [tensor.name for tensor in other.headers.tensors])
    renamed = [name for name, match in found.items() if name != match]
    if renamed:
        notes.append(
            f"{len(renamed)} tensors have other names in {other.role}, "
            f"such as {found[renamed[0]]} for {renamed[0]}"
        )
    # Names of a part of a model may be without its embedding.
    embedding = embedding_name(found)
    tied = (
        embedding_name(tensor.name for tensor in other.headers.tensors)
        if embedding is None
        else found[embedding]
    )
    for name in names:
        if name in found or tied is None or not is_head(name):
            continue
        if ties_head(other.config):
            found[name] = tied
            notes.append(
                f"{name} is not stored in {other.role}, which ties it to {tied}; that is taken for it"
            )
    return found, notes


class _Selection:
    """Applies --include and --exclude, and remembers what they did."""

    def __init__(self, include: str | None, exclude: str | None, tensors: Sequence[TensorInfo]) -> None:
        self._include = _compile("--include", include)
        self._exclude = _compile("--exclude", exclude)
        self._notes: list[str] = []
        self._impossible: list[str] = []
        for flag, text, pattern in (
            ("--include", include, self._include),
            ("--exclude", exclude, self._exclude),
        ):
            if pattern is not None and not any(pattern.search(tensor.name) for tensor in tensors):
                self._notes.append(f"{flag} {text} matches no tensor of the fine-tuned model")

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


def _compile(flag: str, pattern: str | None) -> Pattern | None:
    return None if pattern is None else compile_pattern(flag, pattern, PairingError)


def in_file_order(model: Model) -> list[TensorInfo]:
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
